"""Which rows are trained in which step, in which pieces, and on whose answers: pure functions of the seed.

A window is the rows of one optimizer step. Nothing here keeps state, so a resumed run and every rank agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np


def digest(*parts: object) -> int:
    """64 bits that depend on every part."""
    text = ":".join(map(str, parts))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def uniform(*parts: object) -> float:
    """A number in [0, 1). 53 bits, because 64 over 2**64 can round up to 1."""
    return (digest(*parts) >> 11) / 2**53


def is_on_policy(seed: int, window: int, share: float) -> bool:
    """The coin of a window: equal on every rank, no communication, no state."""
    return uniform(seed, "coin", window) < share


@dataclass(frozen=True)
class Windows:
    """`rows` rows in windows of `size`, reshuffled every epoch; the last, smaller window of an epoch is kept."""

    rows: int
    size: int
    seed: int

    @property
    def per_epoch(self) -> int:
        return -(-self.rows // self.size)

    def rows_of(self, window: int) -> list[int]:
        """Row numbers of a window, in shuffled order."""
        epoch, index = divmod(window, self.per_epoch)
        order = np.random.default_rng(digest(self.seed, "epoch", epoch)).permutation(self.rows)
        return order[index * self.size : (index + 1) * self.size].tolist()


def share_of(rows: Sequence[int], rank: int, world: int, lengths: Sequence[int]) -> list[int]:
    """The rows of one rank: dealt out by length, so that every rank gets about the same work."""
    return sorted(rows, key=lambda row: (-lengths[row], row))[rank::world]


def by_length(lengths: Sequence[int], budget: int, enough: int = 1024) -> list[list[int]]:
    """Indexes of `lengths` in batches, longest first, each at most `budget` padded tokens (or a single row).

    A batch that has `enough` tokens also ends where the next row would be padded by more than a fifth.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        size = len(batches[-1]) * longest if batches else 0
        if not batches or size + longest > budget or (size >= enough and length < 0.8 * longest):
            batches.append([])
            longest = length
        batches[-1].append(index)
    return batches
