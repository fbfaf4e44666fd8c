"""A checkpoint directory, understood and checked from its headers alone: architecture, names, shapes, settings."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.errors import ConvertError
from convert.weights import Weight, read_weights

ARCHITECTURE = "Qwen3ForCausalLM"
LAYER_NAMES = {  # ours (GGUF) -> theirs (transformers); the order is that of llama.cpp's own files
    "attn_k": "self_attn.k_proj",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "attn_output": "self_attn.o_proj",
    "attn_q": "self_attn.q_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_v": "self_attn.v_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.up_proj",
}


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConvertError where the file is missing, is no JSON, or holds something else than an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConvertError(f"{path.name} is missing in {path.parent}; a model directory needs it.") from error
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConvertError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise ConvertError(f"{path} holds {type(content).__name__}, not a JSON object.")
    return content


@dataclass(frozen=True)
class Shape:
    """The numbers of a Qwen3 configuration."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    epsilon: float
    rope_theta: float
    rope_scaling: dict[str, Any] = field(default_factory=dict)  # empty, or of type linear or yarn

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """transformers' name of a tensor in a layer, without prefix and ".weight", -> its shape."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.k_norm": (self.head_dim,),
            "input_layernorm": (self.hidden,),
            "self_attn.o_proj": (self.hidden, queries),
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.q_norm": (self.head_dim,),
            "self_attn.v_proj": (keys, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "post_attention_layernorm": (self.hidden,),
            "mlp.up_proj": (self.intermediate, self.hidden),
        }


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be converted."""

    directory: Path
    config: dict[str, Any]
    generation: dict[str, Any]  # generation_config.json, {} without one
    shape: Shape
    weights: dict[str, Any]  # GGUF name -> Weight (or adapter.Merged), in the order of the file to write
    notes: tuple[str, ...]  # what a person should know about choices made

    @property
    def tied(self) -> bool:
        return "output.weight" not in self.weights

    @property
    def files(self) -> list[Path]:
        return sorted({weight.path for weight in self.weights.values()})


def read_rope(config: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """theta and scaling, from the layout of transformers 5 (rope_parameters) or 4 (rope_theta, rope_scaling)."""
    rope = dict(config.get("rope_parameters") or {})
    scaling = rope or dict(config.get("rope_scaling") or {})
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if not isinstance(theta, int | float) or theta <= 0:
        raise ConvertError(f"config.json states no rope_theta (found {theta!r}); without it every position would be wrong.")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return float(theta), {}
    if kind not in ("linear", "yarn"):
        raise ConvertError(f"config.json scales positions by {kind!r}; GGUF knows linear and yarn for this architecture.")
    if not isinstance(scaling.get("factor"), int | float):
        raise ConvertError(f"config.json scales positions by {kind} without a factor.")
    return float(theta), scaling | {"rope_type": kind}


def read_shape(config: dict[str, Any]) -> Shape:
    """Raises ConvertError for another architecture, by name, and for what this one's GGUF cannot express."""
    found = config.get("architectures") or [config.get("model_type")]
    if list(found) != [ARCHITECTURE]:
        names = ", ".join(map(str, found))
        raise ConvertError(f"config.json describes {names}; this converter knows {ARCHITECTURE} alone. Use llama.cpp's own.")
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "unknown")
        raise ConvertError(f"The weights are already quantized ({method}); use the model's original weights.")
    for key, wanted in (("attention_bias", False), ("hidden_act", "silu"), ("use_sliding_window", False)):
        if config.get(key, wanted) != wanted:
            raise ConvertError(f"config.json sets {key} to {config[key]!r}; Qwen3 in GGUF means {wanted!r}.")

    def whole(key: str) -> int:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConvertError(f"config.json: {key} is {value!r}; it must be a positive whole number.")
        return value

    epsilon = config.get("rms_norm_eps")
    if not isinstance(epsilon, float) or epsilon <= 0:
        raise ConvertError(f"config.json: rms_norm_eps is {epsilon!r}; it must be a small positive number.")
    theta, scaling = read_rope(config)
    return Shape(
        hidden=whole("hidden_size"),
        intermediate=whole("intermediate_size"),
        layers=whole("num_hidden_layers"),
        heads=whole("num_attention_heads"),
        kv_heads=whole("num_key_value_heads"),
        head_dim=whole("head_dim"),
        vocabulary=whole("vocab_size"),
        positions=whole("max_position_embeddings"),
        epsilon=epsilon,
        rope_theta=theta,
        rope_scaling=scaling,
    )


def equal(left: Weight, right: Weight) -> bool:
    """Whether two tensors hold the same numbers; stops at the first difference."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    step = max(1, (8 << 20) // left.columns)
    return all(
        (left.stored(start, stop) == right.stored(start, stop)).all()
        for start in range(0, left.rows, step)
        for stop in [min(start + step, left.rows)]
    )


def read_source(directory: Path) -> Source:
    """Read headers and settings, no weights but a second copy of the head. Raises ConvertError with the tensor's name."""
    if not directory.is_dir():
        raise ConvertError(f"{directory} is not a directory with a model in it.")
    config = read_json(directory / "config.json")
    shape = read_shape(config)
    generation_file = directory / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    stored = read_weights(directory)
    notes = []

    head = stored.pop("lm_head.weight", None)
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    if not config.get("tie_word_embeddings", False):
        if head is None:
            raise ConvertError("lm_head.weight is missing, and config.json does not tie it to the embedding.")
        stored["lm_head.weight"] = head
        expected["output.weight"] = ("lm_head.weight", (shape.vocabulary, shape.hidden))
    expected["output_norm.weight"] = ("model.norm.weight", (shape.hidden,))
    expected["token_embd.weight"] = ("model.embed_tokens.weight", (shape.vocabulary, shape.hidden))
    shapes = shape.tensors()
    for i in range(shape.layers):
        for ours, theirs in LAYER_NAMES.items():
            expected[f"blk.{i}.{ours}.weight"] = (f"model.layers.{i}.{theirs}.weight", shapes[theirs])
    weights = {}
    for ours, (theirs, wanted) in expected.items():
        weight = stored.pop(theirs, None)
        if weight is None:
            raise ConvertError(f"{theirs} is missing; config.json promises {shape.layers} layers. Is a shard missing?")
        if weight.shape != wanted:
            raise ConvertError(
                f"{weight.path.name}: {theirs} has shape {list(weight.shape)}; config.json implies {list(wanted)}."
            )
        weights[ours] = weight
    if stored:
        name, weight = next(iter(stored.items()))
        raise ConvertError(
            f"{weight.path.name}: {name} has no place in {ARCHITECTURE} ({len(stored)} such tensors); "
            "is this another architecture, or an adapter that was not merged?"
        )
    embedding = weights["token_embd.weight"]
    if "output.weight" in weights:
        if equal(weights["output.weight"], embedding):
            del weights["output.weight"]
            notes.append("lm_head.weight equals the embedding and was dropped; llama.cpp reuses the embedding.")
    elif head is not None:
        same = equal(head, embedding)
        notes.append(
            "lm_head.weight was dropped: config.json ties it to the embedding"
            + (", which it equals." if same else ", although its numbers differ; transformers ignores it too.")
        )
    return Source(directory, config, generation, shape, weights, tuple(notes))
