"""The importance matrix: how strongly each input column of a matrix is used, as mean squares over text.

Collected in one pass of the reference over chat-formatted text; stored as GGUF in the form of llama.cpp's tools/imatrix
(per matrix `NAME.in_sum2` and `NAME.counts`), so that llama-quantize reads it and we read theirs. As there, the embedding
and the head get none.
"""

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from convert.errors import ConvertError
from convert.reference import Reference

GROUP = 4096  # positions in one pass over the weights
KEY = "convert.fingerprint"


@dataclass(frozen=True)
class Importance:
    file: str  # where it lies
    dataset: str
    chunks: int
    chunk: int  # tokens
    squares: dict[str, np.ndarray]  # GGUF name -> float32 (columns,), sums
    counts: dict[str, float]  # GGUF name -> rows summed

    def weights(self) -> dict[str, np.ndarray]:
        """Mean squares, float32, as the quantizers take them; ones where nothing was counted."""
        return {
            name: sums / np.float32(self.counts[name]) if self.counts[name] else np.ones_like(sums)
            for name, sums in self.squares.items()
        }

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, values in sorted(self.weights().items()):
            digest.update(name.encode() + values.tobytes())
        return digest.hexdigest()

    def metadata(self) -> dict[str, str | int]:
        """What llama-quantize notes in a model made with it."""
        return {
            "quantize.imatrix.file": self.file,
            "quantize.imatrix.dataset": self.dataset,
            "quantize.imatrix.entries_count": len(self.squares),
            "quantize.imatrix.chunks_count": self.chunks,
        }


def collect(
    reference: Reference, windows: Sequence[np.ndarray], dataset: str, file: str
) -> Generator[float, None, Importance]:
    """Yields the work done, 0 to 1; returns the Importance."""
    size = len(windows[0])
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, float] = {}

    def watch(name: str, inputs: np.ndarray) -> None:
        squares = np.square(inputs).sum(axis=0, dtype=np.float64)
        sums[name] = sums.get(name, 0) + squares
        counts[name] = counts.get(name, 0) + len(inputs)

    group = max(1, GROUP // size)
    for first in range(0, len(windows), group):
        some = windows[first : first + group]
        for state in reference.hidden(some, watch):
            if isinstance(state, int):
                yield (first + len(some) * state / reference.shape.layers) / len(windows)
    return Importance(file, dataset, len(windows), size, {n: s.astype(np.float32) for n, s in sums.items()}, counts)


def write_importance(path: Path, found: Importance, fingerprint: str) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, "imatrix")
    del writer.kv_data[0][gguf.Keys.General.ARCHITECTURE]
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [found.dataset])
    writer.add_uint32("imatrix.chunk_count", found.chunks)
    writer.add_uint32("imatrix.chunk_size", found.chunk)
    writer.add_string(KEY, fingerprint)
    for name, sums in found.squares.items():
        writer.add_tensor(f"{name}.in_sum2", sums[None])
        writer.add_tensor(f"{name}.counts", np.array([[found.counts[name]]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)


def read_importance(path: Path, columns: dict[str, int]) -> tuple[Importance, str]:
    """And the fingerprint it was written with, "" if by another program. `columns`: GGUF name -> length wanted.

    Raises ConvertError where the file is no importance matrix, or one of another model.
    """
    try:
        reader = gguf.GGUFReader(path)
        datasets = reader.fields["imatrix.datasets"].contents()
        chunks = int(reader.fields["imatrix.chunk_count"].contents())
        chunk = int(reader.fields["imatrix.chunk_size"].contents())
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ConvertError(f"{path} is not an importance matrix in GGUF form ({error}).") from error
    squares, counts = {}, {}
    for tensor in reader.tensors:
        name, _, part = tensor.name.rpartition(".")
        if part == "in_sum2":
            squares[name] = np.array(tensor.data, np.float32).reshape(-1)
        elif part == "counts":
            counts[name] = float(np.array(tensor.data).reshape(-1)[0])
    for name, sums in squares.items():
        if columns.get(name) != len(sums) or name not in counts:
            raise ConvertError(
                f"{path}: {name} has {len(sums)} columns, the model {columns.get(name)}: made for another model."
            )
        if not np.isfinite(sums).all():
            raise ConvertError(f"{path}: {name} holds NaN or infinity; collect the matrix again.")
    stated = reader.fields.get(KEY)
    return Importance(path.name, ", ".join(datasets), chunks, chunk, squares, counts), stated.contents() if stated else ""
