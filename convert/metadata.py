"""The head of a GGUF file: key-values and tensor infos, written by the stock gguf writer. No weight is read here."""

import re
import struct
import tempfile
from dataclasses import dataclass
from math import nan, prod
from pathlib import Path
from typing import Any

import gguf

from convert.errors import ConvertError
from convert.quantizer import row_bytes
from convert.source import Source
from convert.vocabulary import Vocabulary

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
# Written as "not measured" first and filled in place when the finished file has been compared with its source.
MEASURED = {"convert.kld.tokens": 0, "convert.kld.mean": nan, "convert.kld.p999": nan, "convert.same_top": nan}


@dataclass(frozen=True)
class Slot:
    """Where one tensor goes."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # from the beginning of the file
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """A whole file, but for the weights."""

    head: bytes  # everything before the first weight, padded
    slots: tuple[Slot, ...]
    size: int  # bytes of the finished file


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from; what is unknown stays empty."""

    name: str
    repo: str = ""  # hub id of the source
    revision: str = ""  # its commit
    license: str = ""
    base_models: tuple[str, ...] = ()  # hub ids the source was made from


def patches(head: bytes, values: dict[str, int | float]) -> list[tuple[int, bytes]]:
    """(offset, bytes) that set keys of MEASURED in a head written by `lay_out`."""
    found = []
    for key, value in values.items():
        whole = isinstance(MEASURED[key], int)
        kind = gguf.GGUFValueType.UINT32 if whole else gguf.GGUFValueType.FLOAT32
        name = len(key).to_bytes(8, "little") + key.encode() + int(kind).to_bytes(4, "little")
        assert head.count(name) == 1, f"{key} is not in the head once"
        found.append((head.index(name) + len(name), struct.pack("<I" if whole else "<f", value)))
    return found


def read_card(directory: Path) -> dict[str, Any]:
    """The YAML at the top of README.md, {} where there is none that can be read."""
    import yaml

    try:
        text = (directory / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        card = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}


def read_provenance(directory: Path, name: str = "", repo: str = "", revision: str = "") -> Provenance:
    card = read_card(directory)
    base = card.get("base_model") or ()
    return Provenance(
        name=name or repo.rpartition("/")[2] or directory.resolve().name,
        repo=repo,
        revision=revision,
        license=str(card.get("license") or ""),
        base_models=tuple(map(str, [base] if isinstance(base, str) else base)),
    )


def padded(size: int) -> int:
    return gguf.GGUFWriter.ggml_pad(size, ALIGNMENT)


def slots(source: Source, kinds: dict[str, gguf.GGMLQuantizationType]) -> list[tuple[str, tuple[int, ...], int]]:
    """(name, shape, bytes) of every tensor, in the order of the file."""
    return [
        (name, weight.shape, prod(weight.shape[:-1]) * row_bytes(kinds[name], weight.columns))
        for name, weight in source.weights.items()
    ]


def add_shape(writer: gguf.GGUFWriter, source: Source) -> None:
    shape = source.shape
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    scaling = shape.rope_scaling
    if not scaling:
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
    writer.add_rope_scaling_factor(float(scaling["factor"]))
    if scaling["rope_type"] == "yarn":
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            if scaling.get(key) is not None:
                raise ConvertError(f"config.json scales positions by yarn with {key}, which this converter cannot carry over.")
        writer.add_rope_scaling_orig_ctx_len(int(scaling.get("original_max_position_embeddings") or shape.positions))
        if scaling.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(float(scaling["beta_fast"]))
        if scaling.get("beta_slow") is not None:
            writer.add_rope_scaling_yarn_beta_slow(float(scaling["beta_slow"]))


def add_sampling(writer: gguf.GGUFWriter, generation: dict[str, Any]) -> None:
    """generation_config.json's recommendation, where it has one."""
    for key, add in (
        ("top_k", writer.add_sampling_top_k),
        ("top_p", writer.add_sampling_top_p),
        ("min_p", writer.add_sampling_min_p),
        ("temperature", writer.add_sampling_temp),
        ("repetition_penalty", writer.add_sampling_penalty_repeat),
    ):
        value = generation.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            add(int(value) if key == "top_k" else float(value))


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Ids and flags are all stated: llama.cpp's guesses for absent ones are wrong for this family."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_eos_token_id(vocabulary.eos)
    writer.add_eot_token_id(vocabulary.eot)
    if vocabulary.eom is not None:
        writer.add_eom_token_id(vocabulary.eom)
    writer.add_pad_token_id(vocabulary.padding)
    writer.add_bos_token_id(vocabulary.bos)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    named = sorted(vocabulary.templates.keys() - {"default"})
    for name in named:
        writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), vocabulary.templates[name])
    if named:
        writer.add_array(gguf.Keys.Tokenizer.CHAT_TEMPLATES, named)
    writer.add_chat_template(vocabulary.template)


def add_provenance(writer: gguf.GGUFWriter, provenance: Provenance) -> None:
    writer.add_license(provenance.license)
    if provenance.repo:
        writer.add_source_repo_url(f"https://huggingface.co/{provenance.repo}")
        if provenance.revision:
            writer.add_string("general.source.commit", provenance.revision)
    if provenance.base_models:
        writer.add_base_model_count(len(provenance.base_models))
    for number, base in enumerate(provenance.base_models):
        organization, _, name = base.rpartition("/")
        writer.add_base_model_name(number, name)
        writer.add_base_model_organization(number, organization)
        writer.add_base_model_repo_url(number, f"https://huggingface.co/{base}")


def lay_out(
    source: Source,
    vocabulary: Vocabulary,
    provenance: Provenance,
    kinds: dict[str, gguf.GGMLQuantizationType],
    file_type: int,
    extra: dict[str, str | int] | None = None,
) -> Layout:
    """The finished file without its weights: equal arguments give equal bytes. `extra`: further key-values."""
    writer = gguf.GGUFWriter(None, "qwen3")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(provenance.name)
    count = sum(prod(weight.shape) for weight in source.weights.values())
    writer.add_size_label(gguf.utility.size_label(count, count, 0, 0))
    add_provenance(writer, provenance)
    add_shape(writer, source)
    add_sampling(writer, source.generation)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in (extra or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    for key, value in MEASURED.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    add_vocabulary(writer, vocabulary)
    tensors = slots(source, kinds)
    for name, shape, nbytes in tensors:
        writer.add_tensor_info(name, shape, gguf.np.dtype("float32"), nbytes, raw_dtype=kinds[name])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.gguf"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = path.read_bytes()
    head += bytes(padded(len(head)) - len(head))
    offset, placed = len(head), []
    for name, shape, nbytes in tensors:
        placed.append(Slot(name, kinds[name], shape, offset, nbytes))
        offset += padded(nbytes)
    return Layout(head, tuple(placed), offset)
