"""The single pass: rows out of the safetensors, through the quantizer, into one or several files at once.

Slabs of rows are worked on in parallel and written in order. About 16 MB of float32 per slab and two slabs per thread are
alive at a time, whatever the size of the model.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType

from convert.adapter import Merged
from convert.errors import ConvertError
from convert.partial import Partial
from convert.quantizer import SOURCE_TYPES, Quantizer
from convert.weights import Weight, widen

SLAB = 4 << 20  # numbers


@dataclass(frozen=True)
class Slab:
    """Rows start..stop of one tensor, and the types wanted of them."""

    name: str
    start: int
    stop: int
    kinds: tuple[GGMLQuantizationType, ...]


@dataclass(frozen=True)
class Worker:
    """Reads and quantizes slabs; called from several threads."""

    quantizer: Quantizer
    weights: dict[str, Weight | Merged]
    importance: dict[str, np.ndarray]
    allow_nan: bool = False

    def run(self, slab: Slab) -> list[np.ndarray]:
        """One array of bytes per kind. Raises ConvertError for a NaN or an infinity, by tensor and row."""
        weight = self.weights[slab.name]
        stored = weight.stored(slab.start, slab.stop)
        stored_kind = SOURCE_TYPES[weight.dtype]
        if not self.allow_nan and not self.quantizer.is_finite(stored_kind, stored):
            row, column = np.argwhere(~np.isfinite(widen(stored)))[0]
            raise ConvertError(
                f"{weight.path.name}: {weight.name} holds {widen(stored)[row, column]} in row {slab.start + row}, "
                f"column {column}. The model is damaged; --allow-nan converts it all the same."
            )
        rows = None
        results = []
        for kind in slab.kinds:
            if kind == stored_kind:
                results.append(stored.reshape(-1).view(np.uint8))
                continue
            rows = widen(stored) if rows is None else rows
            result = self.quantizer.quantize(kind, rows, self.importance.get(slab.name))
            if not self.allow_nan and not self.quantizer.is_finite(kind, result):
                raise ConvertError(f"{weight.path.name}: {weight.name} has numbers too large for {kind.name}; try BF16.")
            results.append(result)
        return results


def slabs(weights: dict[str, Weight | Merged], outputs: Sequence[Partial]) -> Iterator[tuple[Slab, list[Partial], bool]]:
    """What remains to be done: the slab, who wants it, and whether it is the tensor's last."""
    kinds = [{slot.name: slot.kind for slot in output.layout.slots} for output in outputs]
    for name, weight in weights.items():
        waiting = [(output, kind[name]) for output, kind in zip(outputs, kinds, strict=True) if name not in output.hashes]
        if not waiting:
            continue
        step = max(1, SLAB // weight.columns)
        for start in range(0, weight.rows, step):
            stop = min(start + step, weight.rows)
            yield (
                Slab(name, start, stop, tuple(kind for _, kind in waiting)),
                [output for output, _ in waiting],
                stop == weight.rows,
            )


def pour(worker: Worker, outputs: Sequence[Partial], threads: int) -> Iterator[int]:
    """Write everything that is missing; yields the source's numbers done so far in this run. Closing it stops it soon."""
    slots = [{slot.name: slot for slot in output.layout.slots} for output in outputs]
    done = 0
    pending: deque[tuple[tuple[Slab, list[Partial], bool], Future[list[np.ndarray]]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="quantize")

    def write_oldest() -> int:
        (slab, takers, last), future = pending.popleft()
        for output, data in zip(takers, future.result(), strict=True):
            output.write(memoryview(data))
            if last:
                output.finish(slots[outputs.index(output)][slab.name])
        return (slab.stop - slab.start) * worker.weights[slab.name].columns

    try:
        for item in slabs(worker.weights, outputs):
            pending.append((item, pool.submit(worker.run, item[0])))
            if len(pending) > 2 * threads:
                done += write_oldest()
                yield done
        while pending:
            done += write_oldest()
            yield done
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
