"""The student while it learns: gradients, optimizer, and its weights as whole tensors; one process, or replicas on several.

`Learner` is whole on every process; distill/sharding.py (FSDP2) and distill/zero.py (DeepSpeed) hold the ones in shards.
"""

import math

import torch
from torch import Tensor, nn

from distill import models
from distill.batch import Batch, nothing
from distill.errors import DistillError
from distill.loss import Objective
from distill.machine import Machine, sum_gradients
from distill.optimizer import load_optimizer_state, make_optimizer, optimizer_state
from distill.recipe import Recipe
from distill.teacher import Teacher


class Learner:
    """`backward` for every batch, then once `norm`, which sums and clips the gradients, then `update`, which uses them up."""

    def __init__(self, model: nn.Module, recipe: Recipe, machine: Machine):
        self.model, self.recipe, self.machine = model, recipe, machine
        self.student = models.Student(model)
        self.parameters = models.trainable(model)
        self.optimizer = make_optimizer(self.parameters, recipe)

    def share(self, teacher: Teacher) -> None:
        """Spreads the teacher over the processes the way the student is."""

    def whole(self) -> nn.Module:
        """The student as one plain model with its weights of now: for sampling, measuring and exporting."""
        return self.model

    def evened(self, pieces: list[Batch], pad: int) -> list[Batch]:
        """As many batches as every process must have."""
        return pieces

    def train(self) -> None:
        self.student.train()

    def backward(self, batch: Batch, objective: Objective, last: bool) -> float:
        """Adds a batch's gradients; gives its loss, weighted. `last`: of the window. Raises NotFinite."""
        loss = self.forward(batch, objective)
        loss.backward()
        return loss.item()

    def forward(self, batch: Batch, objective: Objective) -> Tensor:
        with torch.autocast(self.machine.device.type, torch.bfloat16, enabled=self.recipe.autocast):
            return self.student(batch.ids, batch.positions, batch.weights, objective)[0]

    def norm(self) -> float:
        """The gradient's norm, after summing over the processes and before clipping; not finite when the gradient is not."""
        self.fill_gradients()
        if self.machine.world > 1:
            sum_gradients(list(self.parameters.values()))
        return self.clipped()

    def fill_gradients(self) -> None:
        """Zeros where this process had nothing to learn."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def clipped(self) -> float:
        limit = self.recipe.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit)
        return norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item()  # with FSDP it is in shards

    def update(self, rate: float) -> None:
        """One step of the optimizer; gradients are gone afterwards."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drops the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    # ---------------------------------------------------------------- whole tensors

    def weights(self) -> dict[str, Tensor]:
        """What is trained, by name. Every process must ask."""
        return {name: parameter.detach().contiguous() for name, parameter in self.parameters.items()}

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state, as `{parameter}/{slot}`. Every process must ask."""
        return optimizer_state(self.optimizer, self.parameters)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Raises DistillError for the weights of another model."""
        if set(weights) != set(self.parameters):
            raise DistillError("The checkpoint belongs to another model than the recipe's student.")
        with torch.no_grad():
            for name, value in weights.items():
                self.put(name, value)

    def put(self, name: str, value: Tensor) -> None:
        self.parameters[name].copy_(value)

    def load_moments(self, stored: dict[str, Tensor]) -> None:
        load_optimizer_state(self.optimizer, self.parameters, stored)


def refused(recipe: Recipe) -> None:
    """Raises DistillError for what cannot be sharded."""
    if recipe.lora_rank:
        raise DistillError("LoRA is not sharded; launch without shards (a 4 B student with LoRA fits one 24 GB GPU).")
    if recipe.mode == "seqkd":
        raise DistillError("A sharded teacher cannot write texts; make them first in one process, then use mode: sft.")
    if recipe.teacher_bits < 16 or recipe.phase_swap:
        raise DistillError("A sharded teacher is neither quantised nor swapped; set teacher_bits=16 and phase_swap=false.")


def as_many(pieces: list[Batch], pad: int, machine: Machine) -> list[Batch]:
    """With shards, equally many batches on every process: each forward and backward waits for all of them."""
    return pieces + [nothing(pad)] * (max(machine.gather(len(pieces))) - len(pieces))


def make_learner(model: nn.Module, recipe: Recipe, machine: Machine) -> Learner:
    """The kind the launcher asked for. Raises DistillError for what cannot be sharded."""
    if machine.shards == "fsdp":
        from distill.sharding import ShardedLearner

        return ShardedLearner(model, recipe, machine)
    if machine.shards == "zero":
        from distill.zero import ZeroLearner

        return ZeroLearner(model, recipe, machine)
    return Learner(model, recipe, machine)
