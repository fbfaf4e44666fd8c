"""Token rows as tensors: right-padded, with the flat positions that count and a weight for each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.tokens import TokenRow
from distill.windows import by_length


@dataclass(frozen=True)
class Batch:
    """ids [B, L]; positions [N] into the flat B*L, each predicting labels [N]; weights [N]; rows: which rows, in order."""

    ids: Tensor
    positions: Tensor
    labels: Tensor
    weights: Tensor
    rows: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(value.to(device) for value in (self.ids, self.positions, self.labels, self.weights)), self.rows)

    @property
    def rows_of_positions(self) -> Tensor:
        """Which row (0 to B-1) each position belongs to, [N]."""
        return self.positions // self.ids.shape[1]


def collate(rows: Sequence[TokenRow], numbers: Sequence[int], weights: Sequence[float], pad: int) -> Batch:
    """`weights`: the weight of every trained token of each row."""
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    positions, labels, each = [], [], []
    for index, row in enumerate(rows):
        own = torch.from_numpy(row.ids.astype("int64"))
        ids[index, : len(own)] = own
        targets = torch.from_numpy(row.trained).nonzero().squeeze(1)
        targets = targets[targets > 0]
        positions.append(targets - 1 + index * length)
        labels.append(own[targets])
        each.append(torch.full((len(targets),), weights[index], dtype=torch.float32))
    return Batch(ids, torch.cat(positions), torch.cat(labels), torch.cat(each), tuple(numbers))


def nothing(pad: int) -> Batch:
    """A batch without a position that counts."""
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(torch.tensor([[pad]]), none, none, none.float(), ())


def targets_of(row: TokenRow) -> int:
    """How many tokens of a row count in the loss (the first token of a row has nothing before it)."""
    return int(row.trained[1:].sum())


def batches(rows: Sequence[TokenRow], weights: Sequence[float], budget: int, pad: int) -> list[Batch]:
    """Rows in batches of at most `budget` padded tokens, longest first. Rows without a target are left out."""
    used = [number for number, row in enumerate(rows) if targets_of(row)]
    groups = by_length([len(rows[number].ids) for number in used], budget)
    made = []
    for group in groups:
        numbers = [used[index] for index in group]
        made.append(collate([rows[n] for n in numbers], numbers, [weights[n] for n in numbers], pad))
    return made


def weights_of(rows: Sequence[TokenRow], norm: str, tokens: float, count: float) -> list[float]:
    """The weight of each row's tokens, given the window's tokens and rows over all processes."""
    if norm == "token":
        return [1 / max(tokens, 1)] * len(rows)
    return [1 / max(count, 1) / max(targets_of(row), 1) for row in rows]
