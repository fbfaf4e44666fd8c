"""What may be asked of a conversion, and what it gives back."""

import os
from dataclasses import dataclass
from pathlib import Path

from convert.errors import ConvertError


@dataclass(frozen=True)
class Request:
    """What to make. The command line's options are these fields."""

    source: str | Path  # a directory, a hub id (owner/name, @revision if wanted), or a directory with a LoRA adapter
    out: str | Path  # a file; with several types a directory, or a name with {quant} in it
    quant: tuple[str, ...] = ("Q4_K_M",)
    force: bool = False  # replace existing files
    verify: str = "quick"  # none, quick, full
    text: str | Path = ""  # what to measure on, instead of convert/texts/evaluation.jsonl
    max_kld: float | None = None  # refuse a file with a larger mean KLD; None: only what cannot be right
    adapter: str | Path = ""  # a LoRA adapter to merge: a directory, or a hub id
    imatrix: str | Path = ""  # a text to collect an importance matrix on, or a matrix as .gguf; "default": ours
    name: str = ""  # general.name; by default the directory's or the repository's
    threads: int = 0  # 0: as many as this process may use
    allow_nan: bool = False
    push: str = ""  # owner/name on the hub to upload the result to

    def __post_init__(self) -> None:
        if isinstance(self.quant, str):
            raise ConvertError(f"quant is the text {self.quant!r}; it must be a tuple of types.")
        if self.threads < 0:
            raise ConvertError(f"threads is {self.threads}; it must be 0 (all cores) or more.")


@dataclass(frozen=True)
class Result:
    """One finished file."""

    path: Path
    quant: str
    size: int  # bytes
    bits_per_weight: float
    sha256: str
    seconds: float  # from the request to the name
    resumed: int  # tensors found finished from an earlier, interrupted run
    manifest: Path
    kld_mean: float | None  # nats per token; None where nothing was measured
    kld_interval: tuple[float, float] | None
    same_top: float | None
    notes: tuple[str, ...]
    pushed: str = ""  # address of the upload


def usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def output_paths(request: Request, stem: str) -> dict[str, Path]:
    """Type -> file; `stem` names files in a directory. Raises ConvertError where two would be one, or a file exists."""
    out, quants = Path(request.out), [name.upper() for name in request.quant]
    if not quants:
        raise ConvertError("No type was asked for; --quant Q4_K_M is a good first choice.")
    if len(set(quants)) != len(quants):
        raise ConvertError(f"--quant names a type twice: {' '.join(quants)}.")
    if out.is_dir():
        paths = {quant: out / f"{stem}-{quant}.gguf" for quant in quants}
    elif "{quant}" in out.name:
        paths = {quant: out.with_name(out.name.replace("{quant}", quant)) for quant in quants}
    elif len(quants) > 1:
        raise ConvertError(f"Several types need several files: write {{quant}} into the name, as {out.stem}-{{quant}}.gguf.")
    else:
        paths = {quants[0]: out}
    for path in paths.values():
        if path.is_dir():
            raise ConvertError(f"{path} is a directory.")
        if path.exists() and not request.force:
            raise ConvertError(f"{path} exists already; --force replaces it, once the new file is whole.")
    return paths
