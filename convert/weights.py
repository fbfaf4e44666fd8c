"""Tensors of safetensors files, read row by row: no mapping, no copy of a whole tensor, no torch.

Format: 8 bytes with the length of a JSON header (little endian), the header, then the numbers, row-major.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from convert.errors import ConvertError

STORED = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
LONGEST_HEADER = 100_000_000  # the format's own limit


def widen(stored: np.ndarray) -> np.ndarray:
    """BF16 (as uint16), F16 or F32 -> float32 of the same shape."""
    if stored.dtype == np.uint16:
        return np.left_shift(stored, np.uint32(16), dtype=np.uint32).view(np.float32)
    return stored.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Weight:
    """One tensor in a safetensors file."""

    name: str
    path: Path
    offset: int  # of the first byte in the file
    dtype: str  # a key of STORED
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """A vector is one row."""
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def columns(self) -> int:
        return self.shape[-1]

    def stored(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop as the file holds them, (stop - start, columns). Raises ConvertError where the file ends early."""
        kind = STORED[self.dtype]
        count = (stop - start) * self.columns
        offset = self.offset + start * self.columns * kind.itemsize
        numbers = np.fromfile(self.path, kind, count, offset=offset)
        if numbers.size != count:
            raise ConvertError(f"{self.path.name} ends inside {self.name}; it was changed while it was read. Start again.")
        return numbers.reshape(stop - start, self.columns)

    def float32(self, start: int, stop: int) -> np.ndarray:
        return widen(self.stored(start, stop))


def read_shard(path: Path) -> dict[str, Weight]:
    """The tensors of one file, by name. Raises ConvertError for whatever is not whole safetensors with known numbers."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(LONGEST_HEADER, size - 8):
                raise ConvertError(f"{path.name} is cut off inside its header ({size:,} bytes); download it again.")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConvertError(f"{path.name} does not begin with a safetensors header; download it again.") from error
    header.pop("__metadata__", None)
    weights = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConvertError(f"{path.name}: the header's entry for {name} is damaged; download the file again.") from error
        if dtype not in STORED:
            raise ConvertError(
                f"{path.name}: {name} is stored as {dtype}; only BF16, F16 and F32 can be converted. "
                "Use the model's original, unquantized weights."
            )
        if not 0 <= begin <= end or end - begin != prod(shape) * STORED[dtype].itemsize:
            raise ConvertError(f"{path.name}: {name} has shape {list(shape)} but {end - begin:,} bytes of {dtype}.")
        if 8 + length + end > size:
            last = 8 + length + end
            raise ConvertError(
                f"{path.name} is cut off: {name} ends at byte {last:,}, the file at {size:,}; download it again."
            )
        weights[name] = Weight(name, path, 8 + length + begin, dtype, shape)
    return weights


def read_weights(directory: Path) -> dict[str, Weight]:
    """All tensors of a checkpoint, sharded or not. Raises ConvertError where index and files disagree."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise ConvertError(f"{directory} holds neither model.safetensors nor model.safetensors.index.json.")
        return read_shard(single)
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(placed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConvertError(f"{index} has no readable weight_map; download it again.") from error
    weights: dict[str, Weight] = {}
    for file in files:
        if Path(file).name != file:
            raise ConvertError(f"{index.name} points outside the directory: {file!r}.")
        if not (directory / file).is_file():
            raise ConvertError(f"{file} is missing; {index.name} lists {len(files)} files. Download it into {directory}.")
        shard = read_shard(directory / file)
        for name in shard:
            if placed.get(name) != file:
                where = f"expects it in {placed[name]}" if name in placed else "does not know it"
                raise ConvertError(f"{file} holds {name}, but {index.name} {where}; files of two models may be mixed.")
        weights |= shard
    for name, file in placed.items():
        if name not in weights:
            raise ConvertError(f"{index.name} expects {name} in {file}, which does not hold it; download both again.")
    return weights
