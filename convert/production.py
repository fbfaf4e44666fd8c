"""From a Job to finished files: importance, the pass, verification, the final names."""

import shlex
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from convert.card import upload
from convert.dialogue import CALIBRATION, read_conversations, windows
from convert.errors import ConvertError, Refused
from convert.importance import Importance, collect, read_importance, write_importance
from convert.manifest import hash_files, manifest_path, versions, write_manifest
from convert.partial import Partial
from convert.preflight import Job, about_source
from convert.progress import Progress, relay, share_of
from convert.reference import Reference
from convert.request import Result, usable_cores
from convert.stream import Worker, pour
from convert.verify import Verification, examine
from convert.vocabulary import encoder

WINDOW, WINDOWS = 512, 128  # of the calibration text


def produce(job: Job, began: float) -> Generator[Progress, None, list[Result]]:
    """From a Job to finished files."""
    if job.request.imatrix:
        job.lay_out({}, importance=True)  # is there room, before long work begins
    importance = yield from importance_of(job)
    extra = importance.metadata() if importance else {}
    layouts = job.lay_out(extra, importance=importance is not None)
    used = importance.fingerprint() if importance else ""
    fingerprint, known = job.fingerprint(used), job.known()
    partials: list[Partial] = []
    stop = Event()
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as background:
        try:
            for quant, path in job.paths.items():
                partials.append(Partial(path, layouts[quant], fingerprint))
            unknown = {name: path for name, path in job.files().items() if name not in known}
            hashing = background.submit(hash_files, unknown, stop)
            yield from pour_all(job, partials, importance.weights() if importance else {})
            hashes = known | hashing.result()
            if job.fingerprint(used) != fingerprint:
                raise ConvertError(f"{job.source.directory} changed while it was read; run it again.")
            verified = yield from verify_all(job, partials)
            results = yield from name_all(job, partials, verified, hashes, began)
        finally:
            stop.set()
            for partial in partials:
                partial.close()
    if job.request.push:
        yield Progress("upload", 0.0, 1.0, "", 0.0)
        address = upload(job.request.push, job.provenance, results)
        results = [replace(result, pushed=address) for result in results]
    return results


def importance_of(job: Job) -> Generator[Progress, None, Importance | None]:
    """The importance matrix that was asked for: read, or collected and kept beside the result; None without one."""
    asked = job.request.imatrix
    if not asked:
        return None
    columns = {name: weight.columns for name, weight in job.source.weights.items()}
    if Path(asked).suffix == ".gguf":
        return read_importance(Path(asked), columns)[0]
    text = CALIBRATION if str(asked) == "default" else Path(asked)
    cut = windows(encoder(job.tokenizer), job.vocabulary.template, read_conversations(text), WINDOW, WINDOWS)
    first = next(iter(job.paths.values()))
    kept = first.with_name(first.name.replace(".gguf", "") + ".imatrix.gguf")
    fingerprint = job.fingerprint(f"{text.name} {[window.tolist() for window in cut]}")
    if kept.exists():
        found, made_with = read_importance(kept, columns)
        if made_with == fingerprint:
            return found
        if not job.request.force:
            raise ConvertError(f"{kept} exists already, from other weights or text; --force replaces it.")
    found = yield from relay(collect(Reference(job.source), cut, text.name, kept.name), share_of("importance"))
    write_importance(kept, found, fingerprint)
    return found


def pour_all(job: Job, partials: list[Partial], importance: dict[str, np.ndarray]) -> Generator[Progress, None, None]:
    """Quantize and write what is missing."""
    missing = [
        prod(weight.shape)
        for name, weight in job.source.weights.items()
        if any(name not in partial.hashes for partial in partials)
    ]
    worker = Worker(job.quantizer, job.source.weights, importance, job.request.allow_nan)
    steps = pour(worker, partials, job.request.threads or usable_cores())
    yield from relay(steps, lambda done, seconds: Progress("convert", done, sum(missing), "weights", seconds))


def verify_all(job: Job, partials: list[Partial]) -> Generator[Progress, None, list[Verification | None]]:
    """One Verification per file, or None where none was asked for."""
    request = job.request
    if request.verify == "none":
        return [None] * len(partials)
    steps = examine(
        dict(zip(job.paths, (partial.path for partial in partials), strict=True)),
        job.source,
        job.vocabulary,
        job.tokenizer,
        level=request.verify,
        threads=request.threads or usable_cores(),
        text=Path(request.text) if request.text else None,
        most=request.max_kld,
    )
    try:
        return (yield from relay(steps, share_of("verify")))
    except Refused as error:
        kept = ", ".join(str(partial.path) for partial in partials)
        raise Refused(f"{error} What was written lies in {kept}.") from error


def name_all(
    job: Job, partials: list[Partial], verified: list[Verification | None], hashes: dict[str, Any], began: float
) -> Generator[Progress, None, list[Result]]:
    """Put in what was measured, read the files back, give them their names, write the manifests."""
    results, total = [], sum(partial.layout.size for partial in partials)
    for (quant, path), partial, found in zip(job.paths.items(), partials, verified, strict=True):
        if found:
            partial.measured(found.measured())
        before = sum(result.size for result in results)

        def show(done: int, seconds: float, before: int = before) -> Progress:
            return Progress("read back", before + done, total, "bytes", seconds)

        digest = yield from relay(partial.read_back(), show)
        partial.commit()
        slots = partial.layout.slots
        bits = 8 * sum(slot.nbytes for slot in slots) / job.weights
        divergence = found.divergence if found else None
        result = Result(
            path=path,
            quant=quant,
            size=partial.layout.size,
            bits_per_weight=bits,
            sha256=digest,
            seconds=time.monotonic() - began,
            resumed=partial.resumed,
            manifest=manifest_path(path),
            kld_mean=divergence.kld_mean if divergence else None,
            kld_interval=divergence.kld_interval if divergence else None,
            same_top=divergence.same_top if divergence else None,
            notes=job.source.notes + job.vocabulary.notes,
        )
        write_manifest(
            path,
            {
                "file": {"name": path.name, "size": result.size, "sha256": digest, "quant": quant, "bits_per_weight": bits},
                "source": about_source(job, hashes),
                "versions": versions(),
                "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                "seconds": round(result.seconds, 3),
                "notes": list(result.notes),
                "verification": found.as_dict() if found else None,
                "tensors": {slot.name: {"type": slot.kind.name, "sha256": partial.hashes[slot.name]} for slot in slots},
            },
        )
        results.append(result)
    return results
