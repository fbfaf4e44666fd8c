"""Which ggml type each tensor gets: llama.cpp's own mixtures, for dense Qwen3.

Ported from `llama_tensor_get_type_impl` and `tensor_type_fallback` in src/llama-quant.cpp of llama.cpp 0.5.0-dev
(commit 0c1e57098, in llama-cpp-python 0.3.36). Its dry run is the oracle in tests/convert/test_mixture.py.
"""

from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from convert.errors import ConvertError

Type = GGMLQuantizationType


@dataclass(frozen=True)
class Mixture:
    name: str
    file_type: LlamaFileType  # as general.file_type states it
    base: Type


MIXTURES = {
    mixture.name: mixture
    for mixture in (
        Mixture("F32", LlamaFileType.ALL_F32, Type.F32),
        Mixture("BF16", LlamaFileType.MOSTLY_BF16, Type.BF16),
        Mixture("F16", LlamaFileType.MOSTLY_F16, Type.F16),
        Mixture("Q8_0", LlamaFileType.MOSTLY_Q8_0, Type.Q8_0),
        Mixture("Q6_K", LlamaFileType.MOSTLY_Q6_K, Type.Q6_K),
        Mixture("Q5_K_M", LlamaFileType.MOSTLY_Q5_K_M, Type.Q5_K),
        Mixture("Q5_K_S", LlamaFileType.MOSTLY_Q5_K_S, Type.Q5_K),
        Mixture("Q4_K_M", LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K),
        Mixture("Q4_K_S", LlamaFileType.MOSTLY_Q4_K_S, Type.Q4_K),
        Mixture("Q4_0", LlamaFileType.MOSTLY_Q4_0, Type.Q4_0),
        Mixture("IQ4_NL", LlamaFileType.MOSTLY_IQ4_NL, Type.IQ4_NL),
        Mixture("IQ4_XS", LlamaFileType.MOSTLY_IQ4_XS, Type.IQ4_XS),
        Mixture("Q3_K_M", LlamaFileType.MOSTLY_Q3_K_M, Type.Q3_K),
        Mixture("Q2_K", LlamaFileType.MOSTLY_Q2_K, Type.Q2_K),
    )
}
UNQUANTIZED = (Type.F32, Type.F16, Type.BF16)
FALLBACK = {
    Type.IQ4_XS: Type.IQ4_NL,
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}


def find_mixture(name: str) -> Mixture:
    try:
        return MIXTURES[name.upper()]
    except KeyError:
        raise ConvertError(f"--quant {name} is unknown; choose from {', '.join(MIXTURES)}.") from None


def fits(kind: Type, columns: int) -> bool:
    return columns % GGML_QUANT_SIZES[kind][0] == 0


def more_bits(layer: int, layers: int) -> bool:
    """The layers where Q4_K_M and Q5_K_M spend more: first and last eighth, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


@dataclass(frozen=True)
class Plan:
    """The facts that choose types: everything but the tensor itself."""

    mixture: Mixture
    layers: int
    grouped: int  # query heads per key-value head
    tied: bool  # no output.weight: the embedding serves as head
    importance: bool  # an importance matrix is given

    def type_of(self, name: str, shape: tuple[int, ...]) -> Type:
        """The type of one GGUF tensor. Vectors and norms stay float32."""
        if len(shape) < 2 or name.endswith("_norm.weight"):
            return Type.F32
        if self.mixture.base in UNQUANTIZED:
            return self.mixture.base
        wanted = self._wanted(name, shape[-1])
        if not fits(wanted, shape[-1]):
            wanted = FALLBACK.get(wanted, wanted)
        return wanted if fits(wanted, shape[-1]) else Type.F16

    def _wanted(self, name: str, columns: int) -> Type:
        base, quant, layers = self.mixture.base, self.mixture.name, self.layers
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            if not fits(base, columns) or base is Type.Q8_0:
                return Type.Q8_0
            return Type.Q6_K
        if name == "token_embd.weight":
            return base
        _, number, role, _ = name.split(".")
        layer = int(number)
        if role == "attn_v":
            if quant == "Q2_K":
                return Type.Q4_K if self.grouped >= 4 else Type.Q3_K
            if quant == "Q3_K_M":
                return Type.Q5_K if layer < 2 else Type.Q4_K
            if quant in ("IQ4_NL", "IQ4_XS") and self.grouped >= 4:
                return Type.Q5_K
            if quant in ("Q4_K_M", "Q5_K_M") and more_bits(layer, layers):
                return Type.Q6_K
            if quant == "Q4_K_S" and layer < 4:
                return Type.Q5_K
        elif role == "ffn_down":
            if quant == "Q2_K":
                return Type.Q3_K
            if quant == "Q3_K_M":
                return Type.Q5_K if layer < layers // 16 else Type.Q4_K
            if quant in ("Q4_K_M", "Q5_K_M") and more_bits(layer, layers):
                return Type.Q6_K
            if layer < layers // 8:
                if quant == "Q4_K_S" or (quant in ("IQ4_NL", "IQ4_XS") and not self.importance):
                    return Type.Q5_K
                if quant == "Q4_0" and self.importance:
                    return Type.Q4_1
        elif role == "attn_output":
            if quant == "Q2_K":
                return Type.Q3_K
            if quant == "Q3_K_M":
                return Type.Q4_K
        return base
