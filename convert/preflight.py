"""Everything that can be known before a weight is read: the sources on disk, and each file laid out to the last byte."""

import hashlib
import json
from collections.abc import Generator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from convert import hub
from convert.adapter import WEIGHTS as ADAPTER
from convert.adapter import base_of, is_adapter, merge
from convert.errors import ConvertError
from convert.metadata import Layout, Provenance, lay_out, read_provenance
from convert.mixture import Plan, find_mixture
from convert.partial import check_space, part_path
from convert.progress import Progress, relay
from convert.quantizer import Quantizer, open_quantizer
from convert.request import Request, output_paths
from convert.source import Source, read_source
from convert.verify import find_level
from convert.vocabulary import Vocabulary, read_vocabulary


@dataclass(frozen=True)
class Sources:
    """The directories of a request, and what is known of their files."""

    base: hub.Checkout
    adapter: hub.Checkout | None
    stem: str  # names results


@dataclass(frozen=True)
class Job:
    """A request, understood; nothing was written yet."""

    request: Request
    sources: Sources
    source: Source
    vocabulary: Vocabulary
    provenance: Provenance
    quantizer: Quantizer
    paths: dict[str, Path]  # type -> file

    @property
    def tokenizer(self) -> Path:
        return tokenizer_directory(self.sources) / "tokenizer.json"

    @property
    def weights(self) -> int:
        return sum(prod(weight.shape) for weight in self.source.weights.values())

    def files(self) -> dict[str, Path]:
        """Every file that the result depends on, by the name that the manifest gives it."""
        found = {path.name: path for path in self.source.files}
        for prefix, checkout in (("", self.sources.base), ("adapter/", self.sources.adapter)):
            if checkout:
                folder = checkout.directory
                found |= {prefix + path.name: path for path in sorted((*folder.glob("*.json"), *folder.glob("*.jinja")))}
        if self.sources.adapter:
            found["adapter/" + ADAPTER] = self.sources.adapter.directory / ADAPTER
        return found

    def known(self) -> dict[str, dict[str, Any]]:
        """Size and sha256 of the files whose download was checked."""
        adapter = self.sources.adapter.hashes if self.sources.adapter else {}
        return self.sources.base.hashes | {f"adapter/{name}": value for name, value in adapter.items()}

    def fingerprint(self, importance: str) -> str:
        """Of all that decides the bytes; `importance` identifies the matrix, "" for none."""
        stats = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in self.files().items()]
        decides = [stats, self.quantizer.version, self.request.allow_nan, importance]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def lay_out(self, extra: dict[str, str | int], *, importance: bool) -> dict[str, Layout]:
        """Type -> file. Raises ConvertError where there is no room for what is still missing."""
        shape, layouts = self.source.shape, {}
        for quant in self.paths:
            mixture = find_mixture(quant)
            plan = Plan(mixture, shape.layers, shape.heads // shape.kv_heads, self.source.tied, importance)
            kinds = {name: plan.type_of(name, weight.shape) for name, weight in self.source.weights.items()}
            layouts[quant] = lay_out(self.source, self.vocabulary, self.provenance, kinds, int(mixture.file_type), extra)
        for folder in {path.parent for path in self.paths.values()}:
            here = {quant: path for quant, path in self.paths.items() if path.parent == folder}
            begun = sum(part.stat().st_size for path in here.values() if (part := part_path(path)).exists())
            check_space(folder, sum(layouts[quant].size for quant in here) - begun)
        return layouts


def tokenizer_directory(sources: Sources) -> Path:
    """An adapter that was saved with a tokenizer was trained with it."""
    if sources.adapter and (sources.adapter.directory / "tokenizer.json").is_file():
        return sources.adapter.directory
    return sources.base.directory


def check_out(place: str | Path, only: str | None = None) -> Generator[Progress, None, hub.Checkout]:
    """A directory as it is, or a download, with `only` of one file; returns the Checkout."""
    text = str(place)
    if not hub.is_id(text):
        return hub.Checkout(Path(place))
    steps = hub.check_out(text, only)
    return (yield from relay(steps, lambda step, seconds: Progress("download", *step, "bytes", seconds)))


def locate(source: str | Path, adapter: str | Path) -> Generator[Progress, None, Sources]:
    """Download what is not here; returns Sources."""
    first = yield from check_out(source)
    if not first.directory.is_dir():
        raise ConvertError(f"{source} is neither a directory with a model in it nor a hub id (owner/name).")
    stem = first.repo.rpartition("/")[2] or first.directory.resolve().name
    if not is_adapter(first.directory):
        second = (yield from check_out(adapter)) if adapter else None
        if second and not is_adapter(second.directory):
            raise ConvertError(f"{adapter} holds no LoRA adapter (adapter_config.json).")
        return Sources(first, second, stem)
    if adapter:
        raise ConvertError(f"{source} is an adapter itself; --adapter needs a whole model as SRC.")
    base = base_of(first.directory)
    found = yield from check_out(base)
    if not found.directory.is_dir():
        raise ConvertError(f"The adapter's base {base!r} is not here; give its directory as SRC and --adapter {source}.")
    return Sources(found, first, stem)


def understand(sources: Sources) -> tuple[Source, Vocabulary]:
    """Raises ConvertError for what cannot be converted."""
    source = read_source(sources.base.directory)
    if sources.adapter:
        source = merge(source, sources.adapter.directory)
    return source, read_vocabulary(source, tokenizer_directory(sources))


def prepare(request: Request) -> Generator[Progress, None, Job]:
    """Returns the Job. Raises ConvertError."""
    find_level(request.verify)
    for name in request.quant:
        find_mixture(name)
    if request.push:
        hub.check_push(request.push)
    sources = yield from locate(request.source, request.adapter)
    paths = output_paths(request, sources.stem)
    source, vocabulary = understand(sources)
    named = sources.adapter or sources.base
    provenance = read_provenance(named.directory, request.name or sources.stem, named.repo, named.revision)
    return Job(request, sources, source, vocabulary, provenance, open_quantizer(), paths)


def about_source(job: Job, hashes: dict[str, Any]) -> dict[str, Any]:
    """For the manifest."""
    found: dict[str, Any] = {"name": job.provenance.name, "weights": job.weights, "files": hashes}
    for key, checkout in (("base", job.sources.base), ("adapter", job.sources.adapter)):
        if checkout:
            found[key] = {"repo": checkout.repo, "revision": checkout.revision} if checkout.repo else {}
            found[key]["directory"] = checkout.directory.name
    return found
