"""What a run will need before any weight is loaded: memory per phase, time, disk, and what to change so that it fits.

All numbers are estimates from the models' config files. They count weights, optimizer, KV cache, activations, loss tiles and
hidden states; they leave out the framework's own memory (about 0.5 GB on CUDA) and fragmentation.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from distill.errors import DistillError
from distill.recipe import ADAPTER_OFF, Recipe

GB = 1e9
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, from config.json."""

    vocabulary: int
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    @classmethod
    def of(cls, name: str, what: str) -> "Shape":
        """Of a folder, or of a hub id's config (a small download). Raises DistillError."""
        path = Path(name)
        if path.is_dir():
            file = path / "config.json"
        else:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

            try:
                file = Path(hf_hub_download(name, "config.json"))
            except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as exc:
                raise DistillError(f"The config of the {what} {name!r} cannot be read: {exc}") from exc
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
            heads = read["num_attention_heads"]
            return cls(
                read["vocab_size"],
                read["hidden_size"],
                read["num_hidden_layers"],
                read["intermediate_size"],
                heads,
                read.get("num_key_value_heads", heads),
                read.get("head_dim") or read["hidden_size"] // heads,
                read.get("tie_word_embeddings", False),
            )
        except (OSError, KeyError, json.JSONDecodeError) as exc:
            raise DistillError(f"{file} is no config of a decoder model: {exc}") from exc

    @property
    def layer(self) -> int:
        """Parameters of the linear layers of one block."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.head * (1 if self.tied else 2)

    def lora(self, rank: int) -> int:
        pairs = (self.heads + 2 * self.kv_heads) * self.head_dim + 3 * self.hidden  # q k v, and the inputs of q k v
        pairs += self.heads * self.head_dim + self.hidden + 3 * (self.hidden + self.intermediate)
        return self.layers * rank * pairs

    def kv(self, width: int) -> int:
        """Bytes of the KV cache per token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width


def loss_tiles(shape: Shape, on_gpu: bool) -> float:
    """Five fp32 tiles and the narrow copies of the projections."""
    rows = 256 if on_gpu else max(8, min(1024, (20 << 20) // (4 * shape.vocabulary)))
    return rows * shape.vocabulary * (5 * 4 + 2 * 2)


def memory(recipe: Recipe, student: Shape, teacher: Shape | None, on_gpu: bool) -> dict[str, dict[str, float]]:
    """Bytes by phase and part."""
    width = BYTES[recipe.dtype]
    weights = student.parameters * width
    trained = student.lora(recipe.lora_rank) if recipe.lora_rank else student.parameters
    adapter = trained * 4 if recipe.lora_rank else 0
    state = trained * (4 if recipe.lora_rank else width) * 3  # gradient and Adam's two moments
    resident = teacher.parameters * width * recipe.teacher_bits / 16 if teacher else 0.0
    if recipe.teacher_bits < 16 and teacher:  # embedding and head stay at full width
        resident = (teacher.layers * teacher.layer) * recipe.teacher_bits / 8 * 1.06 + teacher.head * width
    swaps = recipe.phase_swap and teacher is not None
    head = teacher.head * width if swaps else 0.0
    tokens = recipe.micro_tokens if recipe.micro_tokens > recipe.max_tokens else recipe.max_tokens
    cache = min(recipe.generate_tokens, recipe.window * recipe.max_tokens) * student.kv(width)
    activations = tokens * student.hidden * width * student.layers  # one per block when checkpointing
    if not recipe.checkpointing:
        activations += (
            tokens
            * student.layers
            * width
            * (6 * student.hidden + 4 * student.intermediate + 3 * student.heads * student.head_dim)
        )
    block = tokens * width * (3 * student.intermediate + 6 * student.hidden)
    positions = recipe.window * recipe.max_tokens
    phases: dict[str, dict[str, float]] = {}
    if max(recipe.on_policy_share) > 0:
        phases["generate"] = {
            "student": weights + adapter,
            "teacher": head if swaps else resident,
            "optimizer": state,
            "KV cache": cache,
        }
        if recipe.generator == "vllm":  # asleep in the other phases
            phases["generate"]["vLLM's weights"] = weights
    if swaps:
        phases["score"] = {"teacher": resident, "optimizer": state, "activations of one block": block}
    phases["train"] = {
        "student": weights + adapter,
        "teacher": head if swaps else resident,
        "optimizer": state,
        "activations": activations + block,
        "loss": loss_tiles(student, on_gpu) + (0 if recipe.lora_rank else student.head * 4),
    }
    if swaps:
        phases["in CPU memory"] = {
            "waiting model": max(weights, resident),
            "hidden states": positions * teacher.hidden * width,
        }
    return phases


def machine_memory() -> tuple[str, float]:
    """(which memory, bytes): of the first CUDA GPU, else of the machine."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0), float(torch.cuda.get_device_properties(0).total_memory)
    try:
        import os

        return "this machine's memory", float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError):  # Windows
        return "this machine's memory (unknown)", 0.0


def plan(recipe: Recipe, memory_gb: float = 0.0, flops: float = 0.0, bandwidth: float = 0.0) -> dict:
    """The estimate. memory_gb, flops (1/s) and bandwidth (bytes/s): of another machine; 0 measures or asks this one."""
    student = Shape.of(recipe.student, "student")
    teacher = None
    if recipe.needs_teacher and recipe.teacher != ADAPTER_OFF:
        teacher = Shape.of(recipe.teacher, "teacher")
    where, available = ("the memory given", memory_gb * GB) if memory_gb else machine_memory()
    on_gpu = memory_gb > 0 or "machine" not in where
    phases = memory(recipe, student, teacher, on_gpu)
    device = {name: parts for name, parts in phases.items() if name != "in CPU memory"}
    peak = max(sum(parts.values()) for parts in device.values())
    if not flops:
        flops, bandwidth = measure_machine()
    time = seconds_per_step(recipe, student, teacher or student, flops, bandwidth)
    disk = student.parameters * BYTES[recipe.dtype] * 2 + recipe.keep_checkpoints * 3 * 4 * (
        student.lora(recipe.lora_rank) if recipe.lora_rank else student.parameters
    )
    return {
        "student_parameters": student.parameters,
        "teacher_parameters": teacher.parameters if teacher else 0,
        "trained_parameters": student.lora(recipe.lora_rank) if recipe.lora_rank else student.parameters,
        "memory_gb": {name: {part: round(value / GB, 3) for part, value in parts.items()} for name, parts in phases.items()},
        "peak_gb": round(peak / GB, 2),
        "available": where,
        "available_gb": round(available / GB, 2),
        "fits": not available or peak <= 0.92 * available,
        "seconds_per_step": {name: round(value, 2) for name, value in time.items()},
        "seconds": round(sum(time.values()) * recipe.steps, 1) if recipe.steps else None,
        "disk_gb": round(disk / GB, 2),
        "advice": [] if not available or peak <= 0.92 * available else advice(recipe, student, teacher, on_gpu, available),
    }


def seconds_per_step(recipe: Recipe, student: Shape, teacher: Shape, flops: float, bandwidth: float) -> dict[str, float]:
    """Decoding reads all weights per pass; reading and training are bound by arithmetic. Windows of full length."""
    tokens = recipe.window * recipe.max_tokens
    rows = max(1, min(recipe.window, recipe.generate_tokens // recipe.max_tokens))
    passes = -(-recipe.window // rows) * recipe.new_tokens
    one = student.parameters * BYTES[recipe.dtype]
    decode = passes * max(one / bandwidth, 2 * student.parameters * rows / flops)
    first, last = recipe.on_policy_share
    backward = 4 if recipe.lora_rank else 6
    return {
        "generate": (first + last) / 2 * decode,
        "teacher": 2 * teacher.parameters * tokens / flops if recipe.needs_teacher else 0.0,
        "student": (backward + (2 if recipe.checkpointing else 0)) * student.parameters * tokens / flops,
    }


def refuse_what_does_not_fit(recipe: Recipe) -> None:
    """Raises DistillError, with advice, before any weight is loaded."""
    student = Shape.of(recipe.student, "student")
    teacher = Shape.of(recipe.teacher, "teacher") if recipe.needs_teacher and recipe.teacher != ADAPTER_OFF else None
    where, available = machine_memory()
    on_gpu = "machine" not in where
    peak = peak_of(recipe, student, teacher, on_gpu)
    if available and peak > 0.92 * available:
        changes = "; ".join(advice(recipe, student, teacher, on_gpu, available))
        raise DistillError(
            f"About {peak / GB:.1f} GB would be needed and {where} has {available / GB:.1f} GB. To fit: {changes}. "
            "`plan` shows the parts; --force starts anyway."
        )


def measure_machine() -> tuple[float, float]:
    """(matrix multiplication in flop/s, memory bandwidth in bytes/s), measured in about a second."""
    import time

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, dtype = (4096, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    matrix, long = torch.randn(size, size, device=device, dtype=dtype), torch.empty(1 << 25, device=device)

    def best(run) -> float:
        found = []
        for _ in range(4):
            begin = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - begin)
        return min(found)

    return 2 * size**3 / best(lambda: matrix @ matrix), long.numel() * 4 / best(lambda: long.sum())


CHANGES = (
    ("checkpointing=true", {"checkpointing": True}),
    ("dtype=bfloat16", {"dtype": "bfloat16"}),
    ("lora_rank=16", {"lora_rank": 16}),
    ("generate_tokens=16384", {"generate_tokens": 16384}),
    ("phase_swap=true", {"phase_swap": True}),
    ("teacher_bits=4", {"teacher_bits": 4}),
    ("micro_tokens=1024", {"micro_tokens": 1024}),
)


def advice(recipe: Recipe, student: Shape, teacher: Shape | None, on_gpu: bool, available: float) -> list[str]:
    """The shortest run of changes, in the order above, that makes it fit; or a sentence that none does."""
    wanted = recipe
    said: list[str] = []
    for text, change in CHANGES:
        if all(getattr(wanted, name) == value for name, value in change.items()) or ("teacher_bits" in change and not on_gpu):
            continue
        if "lora_rank" in change and wanted.lora_rank:
            continue
        before = peak_of(wanted, student, teacher, on_gpu)
        changed = wanted.but(**change)
        after = peak_of(changed, student, teacher, on_gpu)
        if after < before:
            wanted = changed
            said.append(f"{text} (peak {after / GB:.1f} GB)")
        if after <= 0.92 * available:
            return said
    return [*said, "even so it does not fit: take a smaller model or a larger machine"]


def peak_of(recipe: Recipe, student: Shape, teacher: Shape | None, on_gpu: bool) -> float:
    phases = memory(recipe, student, teacher, on_gpu)
    return max(sum(parts.values()) for name, parts in phases.items() if name != "in CPU memory")


def as_text(found: dict) -> str:
    lines = [
        f"student {found['student_parameters'] / 1e6:.1f} M parameters, {found['trained_parameters'] / 1e6:.2f} M trained; "
        f"teacher {found['teacher_parameters'] / 1e6:.1f} M",
        "memory, estimated (GB):",
    ]
    for phase, parts in found["memory_gb"].items():
        lines.append(
            f"  {phase:<14} {sum(parts.values()):7.2f}   " + "  ".join(f"{part} {gb:.2f}" for part, gb in parts.items())
        )
    verdict = "fits" if found["fits"] else "does not fit"
    lines.append(f"peak {found['peak_gb']} GB of {found['available_gb']} GB ({found['available']}): {verdict}")
    times = "  ".join(f"{name} {value:.2f} s" for name, value in found["seconds_per_step"].items())
    lines.append(f"a step with rows of full length, at most: {times}")
    if found["seconds"]:
        lines.append(f"all steps: {found['seconds'] / 3600:.2f} h")
    lines.append(f"disk: {found['disk_gb']} GB")
    lines += [f"to fit: {change}" for change in found["advice"]]
    return "\n".join(lines)
