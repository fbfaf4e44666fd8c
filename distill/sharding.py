"""FSDP2: student and teacher sharded over the processes, block by block.

Used when `accelerate launch` was told to (distill/launch/fsdp2.yaml). Sampling, measuring and exporting work on a plain copy
of the student that is filled from the shards when needed: each process then samples its own rows without waiting for others.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distill import models
from distill.batch import Batch
from distill.learner import Learner, as_many, refused
from distill.loss import Objective
from distill.machine import Machine
from distill.optimizer import make_optimizer
from distill.recipe import Recipe
from distill.teacher import Teacher


class Reader(models.HiddenStates):
    """The teacher in shards: FSDP sees one call."""

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Embedding and head are whole after a first forward of the root."""
        self(torch.zeros(1, 1, dtype=torch.int64, device=models.head_of(self.model).device))
        yield


class ShardedLearner(Learner):
    def __init__(self, model: nn.Module, recipe: Recipe, machine: Machine):
        refused(recipe)
        self.plain = copy.deepcopy(model).requires_grad_(False)
        super().__init__(model, recipe, machine)
        shard(self.student, model)
        self.parameters = models.trainable(model)  # sharding replaced them
        self.optimizer = make_optimizer(self.parameters, recipe, fused=False)

    def share(self, teacher: Teacher) -> None:
        reader = Reader(teacher.model)
        teacher.shard(reader)
        shard(reader, teacher.model)

    @torch.no_grad()
    def whole(self) -> nn.Module:
        targets = dict(self.plain.named_parameters())
        for name, value in self.model.named_parameters():
            targets[name].copy_(full(value))
        return self.plain

    def evened(self, pieces: list[Batch], pad: int) -> list[Batch]:
        return as_many(pieces, pad, self.machine)

    def backward(self, batch: Batch, objective: Objective, last: bool) -> float:
        loss = self.forward(batch, objective)
        (loss * self.machine.world).backward()  # FSDP averages over the processes, and this is a sum
        return loss.item()

    def norm(self) -> float:
        self.fill_gradients()
        return self.clipped()

    def weights(self) -> dict[str, Tensor]:
        return {name: full(value).contiguous() for name, value in super().weights().items()}

    def moments(self) -> dict[str, Tensor]:
        return {name: full(value) for name, value in super().moments().items()}

    def put(self, name: str, value: Tensor) -> None:
        self.parameters[name].copy_(like(value, self.parameters[name]))

    def load_moments(self, stored: dict[str, Tensor]) -> None:
        owners = {key: self.parameters[key.rsplit("/", 1)[0]] for key in stored}
        cut = {key: value if key.endswith("/step") else like(value, owners[key]) for key, value in stored.items()}
        super().load_moments(cut)


def shard(root: nn.Module, model: nn.Module) -> None:
    """Shards `model`, which `root` wraps; `root` is what must be called from now on."""
    for layer in models.backbone(model).layers:
        fully_shard(layer)
    fully_shard(root)


def full(value: Tensor) -> Tensor:
    """The whole tensor of a shard (every process must ask), or the tensor itself."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, other: DTensor) -> DTensor:
    """A whole tensor cut the way `other` is."""
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)
