"""From weights to files, as one public function: `convert(source, out, quant=("Q4_K_M",), progress=show)`.

`progress` is called with a Progress about five times a second, in the calling thread. To cancel, raise from it: what is
done so far stays beside the result as OUT.part and OUT.journal, and the next call goes on from there (`discard` deletes both).
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from convert.errors import ConvertError

DEFAULT_QUANT = ("Q4_K_M",)


@dataclass(frozen=True)
class Progress:
    """How far a conversion is."""

    stage: str  # "download", "convert", "verify"
    done: int
    total: int
    unit: str  # of done and total: "bytes", "weights", "tokens"
    seconds: float  # since the stage began

    @property
    def fraction(self) -> float:
        return self.done / self.total if self.total else 0.0

    @property
    def rate(self) -> float:
        """Units per second."""
        return self.done / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """None before anything is known."""
        return (self.total - self.done) / self.rate if self.rate else None


@dataclass(frozen=True)
class Request:
    """What to make. The command line's options are these fields."""

    source: str | Path  # a directory, or a hub id
    out: str | Path  # a file; with several types a directory, or a name with {quant} in it
    quant: tuple[str, ...] = DEFAULT_QUANT
    force: bool = False  # overwrite
    name: str = ""  # general.name; by default the directory's or the repository's
    threads: int = 0  # 0: as many as this process may use
    allow_nan: bool = False
    verify: str = "none"


@dataclass(frozen=True)
class Result:
    """One finished file."""

    path: Path
    quant: str
    size: int  # bytes
    bits_per_weight: float
    seconds: float
    resumed: int  # tensors found finished from an earlier, interrupted run
    notes: tuple[str, ...]


def usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def output_paths(request: Request) -> dict[str, Path]:
    """Type -> file. Raises ConvertError where two types would share a file, or a file exists."""
    out, quants = Path(request.out), [name.upper() for name in request.quant]
    if not quants:
        raise ConvertError("No type was asked for; --quant Q4_K_M is a good first choice.")
    if len(set(quants)) != len(quants):
        raise ConvertError(f"--quant names a type twice: {' '.join(quants)}.")
    if out.is_dir():
        stem = request.name or Path(request.source).resolve().name
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


def fingerprint(source, library: str, options: dict[str, object]) -> str:
    """Of everything the written bytes depend on, but for the head, which is compared by itself."""
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in source.files}
    return hashlib.sha256(json.dumps([files, library, options], sort_keys=True).encode()).hexdigest()


def convert(
    source: str | Path,
    out: str | Path,
    *,
    progress: Callable[[Progress], None] | None = None,
    **options: object,
) -> list[Result]:
    """Write `out` (see Request for the options) and return what was made, one Result per type.

    Raises ConvertError with a sentence for the user; nothing half made is ever seen under a final name.
    """
    steps = converting(Request(source, out, **options))
    shown = 0.0
    try:
        while True:
            step = next(steps)
            if progress and (step.done == step.total or time.monotonic() - shown > 0.2):
                progress(step)
                shown = time.monotonic()
    except StopIteration as stop:
        return stop.value
    finally:
        steps.close()


def converting(request: Request) -> Iterator[Progress]:
    """`convert` as a generator: yields Progress, returns the results, may be closed at any time."""
    from convert.metadata import lay_out, read_provenance
    from convert.mixture import Plan, find_mixture
    from convert.partial import Partial, check_space, part_path
    from convert.quantizer import open_quantizer
    from convert.source import read_source
    from convert.stream import Worker, pour
    from convert.vocabulary import read_vocabulary

    began = time.monotonic()
    mixtures = [find_mixture(name) for name in request.quant]
    source = read_source(Path(request.source))
    vocabulary = read_vocabulary(source)
    paths = output_paths(request)
    quantizer = open_quantizer()
    provenance = read_provenance(source.directory, request.name)
    shape = source.shape
    layouts = {}
    for mixture in mixtures:
        plan = Plan(mixture, shape.layers, shape.heads // shape.kv_heads, source.tied, importance=False)
        kinds = {name: plan.type_of(name, weight.shape) for name, weight in source.weights.items()}
        layouts[mixture.name] = lay_out(source, vocabulary, provenance, kinds, int(mixture.file_type))
    for folder in {path.parent for path in paths.values()}:
        here = {quant: path for quant, path in paths.items() if path.parent == folder}
        begun = sum(part.stat().st_size for path in here.values() if (part := part_path(path)).exists())
        check_space(folder, sum(layouts[quant].size for quant in here) - begun)

    print_of = fingerprint(source, quantizer.version, {"allow_nan": request.allow_nan})
    partials: list[Partial] = []
    try:
        for quant, path in paths.items():
            partials.append(Partial(path, layouts[quant], print_of))
        missing = [
            prod(weight.shape)
            for name, weight in source.weights.items()
            if any(name not in partial.hashes for partial in partials)
        ]
        total = sum(missing)
        worker = Worker(quantizer, source.weights, {}, request.allow_nan)
        pouring = pour(worker, partials, request.threads or usable_cores())
        try:
            for done in pouring:
                yield Progress("convert", done, total, "weights", time.monotonic() - began)
        finally:
            pouring.close()
        results = []
        for (quant, path), partial in zip(paths.items(), partials, strict=True):
            partial.commit()
            count = sum(prod(weight.shape) for weight in source.weights.values())
            bits = 8 * sum(slot.nbytes for slot in partial.layout.slots) / count
            results.append(
                Result(
                    path=path,
                    quant=quant,
                    size=partial.layout.size,
                    bits_per_weight=bits,
                    seconds=time.monotonic() - began,
                    resumed=partial.resumed,
                    notes=source.notes + vocabulary.notes,
                )
            )
        return results
    except OSError as error:
        place = error.filename or request.out
        raise ConvertError(
            f"Writing {place} failed: {error.strerror}. What is done is kept; run it again to go on."
        ) from error
    finally:
        for partial in partials:
            partial.close()
