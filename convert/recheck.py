"""Verify a file that is finished already: its bytes against its manifest, its behaviour against its source."""

from collections.abc import Generator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf

from convert.dialogue import EVALUATION, read_conversations, windows
from convert.divergence import compare
from convert.errors import ConvertError, Refused
from convert.llama import Model
from convert.manifest import hash_files, read_manifest, versions, write_manifest
from convert.preflight import Sources, locate, tokenizer_directory, understand
from convert.progress import Progress, relay, share_of
from convert.report import describe
from convert.request import usable_cores
from convert.source import Source
from convert.verify import LEVELS, Verification, examine, judge, recognising


@dataclass(frozen=True)
class Recheck:
    """What to verify. The options of `verify` are these fields."""

    file: str | Path
    against: str | Path  # the source (a directory, hub id or adapter), or an unquantized GGUF of it
    adapter: str | Path = ""
    level: str = "quick"
    text: str | Path = ""
    max_kld: float | None = None
    threads: int = 0


def check_tensors(path: Path, source: Source) -> None:
    """Raises Refused unless the file holds exactly the source's tensors, in the source's shapes."""
    found = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in gguf.GGUFReader(path).tensors}
    for name, weight in source.weights.items():
        if found.get(name) != weight.shape:
            raise Refused(f"{path.name}: {name} has shape {found.get(name)}, the source {weight.shape}.")
    for name in found.keys() - source.weights.keys():
        raise Refused(f"{path.name} holds {name}, which the source has not.")


def check_bytes(path: Path, manifest: dict[str, Any] | None) -> str:
    """The file's sha256. Raises Refused, with the tensor's name, where it is not what the manifest states."""
    digest = hash_files({path.name: path})[path.name]["sha256"]
    if manifest and manifest["file"].get("sha256") not in (None, digest):
        import hashlib

        for tensor in gguf.GGUFReader(path).tensors:
            stated = manifest.get("tensors", {}).get(tensor.name)
            if stated and hashlib.sha256(tensor.data.tobytes()).hexdigest() != stated["sha256"]:
                raise Refused(f"{path.name}: {tensor.name} is not what the manifest says it was; convert again.")
        raise Refused(f"{path.name} is not the file its manifest describes (sha256 {digest[:12]}...); its head was changed.")
    return digest


def rechecking(request: Recheck) -> Generator[Progress, None, Verification]:
    """Returns what was measured, after noting it in the manifest. Raises Refused where the file is wrong."""
    path, threads = Path(request.file), request.threads or usable_cores()
    if request.level not in LEVELS:
        raise ConvertError(f"--level {request.level} is unknown; choose {' or '.join(LEVELS)}.")
    if not path.is_file():
        raise ConvertError(f"{path} does not exist.")
    row, manifest = describe(path), read_manifest(path)
    digest = check_bytes(path, manifest)
    if Path(request.against).suffix == ".gguf":
        steps = against_file(request, path, row.quant, threads)
    else:
        sources: Sources = yield from locate(request.against, request.adapter)
        source, vocabulary = understand(sources)
        check_tensors(path, source)
        steps = examine(
            {row.quant: path},
            source,
            vocabulary,
            tokenizer_directory(sources) / "tokenizer.json",
            level=request.level,
            threads=threads,
            text=Path(request.text) if request.text else None,
            most=request.max_kld,
        )
    found = (yield from relay(steps, share_of("verify")))[0]
    size = sum(prod(map(int, tensor.shape)) for tensor in gguf.GGUFReader(path).tensors)
    content = manifest or {
        "file": {
            "name": path.name,
            "size": row.size,
            "sha256": digest,
            "quant": row.quant,
            "bits_per_weight": row.bits_per_weight,
        },
        "source": {"name": Path(request.against).name, "weights": size},
    }
    write_manifest(path, content | {"verification": found.as_dict(), "verified_with": versions()})
    return found


def against_file(request: Recheck, path: Path, quant: str, threads: int) -> Generator[float, None, list[Verification]]:
    """Predictions only, compared with those of another GGUF."""
    base_path = Path(request.against)
    level, size = LEVELS[request.level], LEVELS[request.level].window
    text = Path(request.text) if request.text else EVALUATION
    with (
        Model(base_path, context=size, threads=threads) as base,
        Model(path, context=size, threads=threads) as other,
    ):
        template = base.template()
        if not template or base.size != other.size:
            raise ConvertError(f"{base_path.name} has no chat template, or another vocabulary than {path.name}.")
        cut = windows(recognising(base), template, read_conversations(text), size, level.windows)
        found = yield from compare(base, [other], cut)
    judge(quant, found[0], request.max_kld)
    return [Verification(request.level, text.name, base_path.name, None, found[0])]
