"""The teacher: hidden states for the loss, text for seqkd; resident, swapped in by phase, or the student's own base."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from distill import models
from distill.batch import Batch
from distill.loss import NotFinite
from distill.recipe import ADAPTER_OFF, Recipe
from distill.rollout import Sampling, rollout


class Reader(Protocol):
    """A teacher in shards."""

    def __call__(self, ids: Tensor) -> Tensor:
        """Last hidden states [B, L, H] of right-padded ids [B, L]."""

    def opened(self) -> AbstractContextManager[None]:
        """Inside, the model may be run layer by layer, but for its head."""


class Teacher:
    """`scored(batches)` yields every batch with the teacher's hidden states [N, Ht] at its positions.

    With phase swap the student waits in CPU memory while the teacher's blocks are on the device; only the head stays.
    """

    def __init__(self, model: nn.Module, student: nn.Module, recipe: Recipe, device: torch.device):
        self.model, self.student, self.device = model, student, device
        self.is_base = recipe.teacher == ADAPTER_OFF
        self.swaps = recipe.phase_swap and not self.is_base
        self.autocast = recipe.autocast
        if not self.is_base:
            model.requires_grad_(False)
            if recipe.teacher_bits == 16:
                model.to("cpu" if self.swaps else device)
        self.head = models.head_of(model).detach().to(device)
        self.reader: Reader | None = None

    def shard(self, reader: Reader) -> None:
        """From now on `reader` reads for the model, whose blocks are about to be spread over the processes.

        The head stays whole on each of them, for the loss needs all of it.
        """
        self.head = self.head.clone()
        self.reader = reader

    @contextmanager
    def at_work(self) -> Iterator[nn.Module]:
        """The teacher on the device, in `eval` mode, without gradients."""
        training = self.model.training
        with torch.no_grad(), models.adapter_off(self.model) if self.is_base else nullcontext():
            if self.swaps:
                move(self.student, torch.device("cpu"))
                move(self.model, self.device)
            self.model.eval()
            try:
                yield self.model
            finally:
                self.model.train(training)
                if self.swaps:
                    move(self.model, torch.device("cpu"))
                    move(self.student, self.device)

    def hidden(self, batch: Batch) -> Tensor:
        """[N, Ht] at the batch's positions. Raises NotFinite."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            ids = batch.ids.to(self.device)
            found = self.reader(ids) if self.reader else models.hidden_states(self.model, ids)
        found = found.flatten(0, 1)[batch.positions.to(self.device)]
        finite = torch.isfinite(found).all(-1)
        if not finite.all():
            error = NotFinite("The teacher's output", int((~finite).nonzero()[0]))
            error.batch = batch
            raise error
        return found

    def scored(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        if self.swaps:  # 5 KB per token at H = 2560 in bf16; the whole window waits in CPU memory
            with self.at_work():
                held = [self.hidden(batch).cpu() for batch in batches]
            for batch, hidden in zip(batches, held, strict=True):
                yield batch, hidden.to(self.device)
            return
        for batch in batches:
            with self.at_work():
                hidden = self.hidden(batch)
            yield batch, hidden

    def answer(self, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling) -> list[list[int]]:
        with self.at_work(), self.reader.opened() if self.reader else nullcontext():
            return rollout(self.model, prompts, keys, sampling, head=self.head if self.reader else None)


def move(model: nn.Module, device: torch.device) -> None:
    model.to(device)
    if device.type == "cpu" and torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_teacher(recipe: Recipe, student: nn.Module, device: torch.device) -> Teacher:
    if recipe.teacher == ADAPTER_OFF:
        return Teacher(student, student, recipe, device)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[recipe.dtype]
    return Teacher(models.load_model(recipe.teacher, "teacher", dtype, recipe.teacher_bits), student, recipe, device)
