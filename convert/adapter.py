"""A LoRA adapter, merged row by row while its base streams by: W + scale * B @ A, in float32.

Files as peft writes them: adapter_config.json, adapter_model.safetensors. The scale is alpha / rank, or alpha / sqrt(rank)
with rank-stabilised scaling (arXiv 2312.03732).
"""

import re
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConvertError
from convert.source import LAYER_NAMES, Source, read_json
from convert.weights import Weight, read_shard

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Merged:
    """A weight with its update, to be read like a Weight that is stored in float32."""

    base: Weight
    a: Weight  # (rank, columns)
    b: Weight  # (rows, rank)
    scale: float

    dtype = "F32"

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def rows(self) -> int:
        return self.base.rows

    @property
    def columns(self) -> int:
        return self.base.columns

    def stored(self, start: int, stop: int) -> np.ndarray:
        update = self.b.float32(start, stop) @ self.a.float32(0, self.a.rows)
        update *= np.float32(self.scale)
        update += self.base.float32(start, stop)
        return update

    float32 = stored


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def base_of(directory: Path) -> str:
    """The directory or hub id of the model that the adapter belongs to."""
    stated = read_json(directory / CONFIG).get("base_model_name_or_path")
    if not stated:
        raise ConvertError(
            f"{directory / CONFIG} does not say what it adapts; give the base as SRC and --adapter {directory}."
        )
    beside = directory / stated
    return str(beside) if beside.is_dir() else stated


def check_config(config: dict[str, Any]) -> None:
    """Raises ConvertError, by name, for whatever is not plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConvertError(f"The adapter is {kind}; only LORA can be merged.")
    for key, name in (
        ("use_dora", "DoRA, whose magnitudes need the merged norm of every column"),
        ("use_qalora", "QALoRA"),
        ("fan_in_fan_out", "stored transposed (fan_in_fan_out)"),
        ("lora_bias", "LoRA with biases (lora_bias)"),
        ("layer_replication", "made for replicated layers (layer_replication)"),
    ):
        if config.get(key):
            raise ConvertError(f"The adapter is {name}; merge it with peft first and convert the result.")
    if config.get("bias", "none") != "none":
        raise ConvertError(f"The adapter trained biases (bias = {config['bias']!r}), which Qwen3 has not.")
    if config.get("modules_to_save"):
        raise ConvertError(f"The adapter replaces whole modules ({config['modules_to_save']}); merge it with peft first.")


def pattern_value(patterns: dict[str, Any] | None, module: str, default: float) -> float:
    """peft's rank_pattern and alpha_pattern: the first key that matches the end of the module's name."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def scale_of(config: dict[str, Any], module: str, rank: int) -> float:
    alpha = pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def merge(source: Source, directory: Path) -> Source:
    """The source with the adapter in it. Raises ConvertError where the two do not belong together."""
    config = read_json(directory / CONFIG)
    check_config(config)
    if not (directory / WEIGHTS).is_file():
        raise ConvertError(f"{directory} has no {WEIGHTS}; adapters in pickle files are not read.")
    stored = read_shard(directory / WEIGHTS)
    targets = {"model.embed_tokens": "token_embd.weight", "lm_head": "output.weight"}
    for layer in range(source.shape.layers):
        targets |= {f"model.layers.{layer}.{theirs}": f"blk.{layer}.{ours}.weight" for ours, theirs in LAYER_NAMES.items()}
    pairs: dict[str, dict[str, Weight]] = {}
    for name, weight in stored.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name.removeprefix(PREFIX))
        if not match:
            raise ConvertError(f"{WEIGHTS}: {name} is not part of a plain LoRA adapter for linear layers.")
        pairs.setdefault(match[1], {})[match[2]] = weight
    if not pairs:
        raise ConvertError(f"{directory / WEIGHTS} is empty.")
    merged = dict(source.weights)
    for module, pair in pairs.items():
        ours = targets.get(module)
        base = source.weights.get(ours or "")
        if base is None:
            why = "the head is tied to the embedding" if module == "lm_head" else f"it has {source.shape.layers} layers"
            raise ConvertError(f"{WEIGHTS} adapts {module}, which {source.directory.name} has not ({why}): another base?")
        if set(pair) != {"A", "B"}:
            raise ConvertError(f"{WEIGHTS} has only one half of the update of {module}; download it again.")
        a, b = pair["A"], pair["B"]
        if len(base.shape) != 2 or (b.rows, a.columns) != base.shape or a.rows != b.columns:
            raise ConvertError(
                f"{WEIGHTS} updates {module} by {list(b.shape)} x {list(a.shape)}, but in {source.directory.name} it is "
                f"{list(base.shape)}: this adapter belongs to another base."
            )
        assert isinstance(base, Weight)
        merged[ours] = Merged(base, a, b, scale_of(config, module, a.rows))
    note = f"The LoRA adapter {directory.name} was merged into {len(pairs)} matrices, in float32."
    return replace(source, weights=merged, notes=(*source.notes, note))
