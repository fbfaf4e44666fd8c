"""FSDP2: student and teacher sharded over the processes, block by block.

Used when `accelerate launch` was told to (distill/launch/fsdp2.yaml). Sampling, measuring and exporting work on a plain copy
of the student that is filled from the shards when needed: each process then samples its own rows without waiting for others.
"""

import os

import torch
from torch import Tensor, nn

from distill import models
from distill.errors import DistillError
from distill.recipe import Recipe


def is_asked_for() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check(recipe: Recipe) -> None:
    """Raises DistillError for what cannot be sharded here."""
    if recipe.lora_rank:
        raise DistillError("LoRA is not sharded; launch without FSDP (a 4 B student with LoRA fits one 24 GB GPU).")
    if recipe.mode == "seqkd":
        raise DistillError("A sharded teacher cannot write texts; make them first in one process, then use mode: sft.")
    if recipe.teacher_bits < 16 or recipe.phase_swap:
        raise DistillError("A sharded teacher is neither quantised nor swapped; set teacher_bits=16 and phase_swap=false.")


class Reader(nn.Module):
    """A model whose forward gives its last hidden states, so that FSDP sees one call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return models.hidden_states(self.model, ids)


def shard(root: nn.Module, model: nn.Module) -> None:
    """Shards `model`, which `root` wraps; `root` is what must be called from now on."""
    from torch.distributed.fsdp import fully_shard

    for layer in models.backbone(model).layers:
        fully_shard(layer)
    fully_shard(root)


def full(value: Tensor) -> Tensor:
    """The whole tensor of a shard (every process must ask), or the tensor itself."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor cut the way `other` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    return distribute_tensor(value, other.device_mesh, other.placements) if isinstance(other, DTensor) else value


@torch.no_grad()
def refill(plain: nn.Module, sharded: nn.Module) -> None:
    """The sharded weights into the plain copy."""
    targets = dict(plain.named_parameters())
    for name, value in sharded.named_parameters():
        targets[name].copy_(full(value))
