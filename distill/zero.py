"""DeepSpeed ZeRO-3: student and teacher sharded over the processes, parameter by parameter.

Used when `accelerate launch` was told to (distill/launch/zero3.yaml). As with FSDP2, sampling, measuring and exporting work on
a plain copy of the student. The engine here is DeepSpeed's own; windows, losses, rates and checkpoints stay ours.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distill import models
from distill.batch import Batch
from distill.errors import DistillError
from distill.learner import Learner, as_many, refused
from distill.loss import Objective
from distill.machine import Machine
from distill.optimizer import make_optimizer
from distill.recipe import Recipe
from distill.teacher import Teacher


def library():
    try:
        import deepspeed
    except ModuleNotFoundError as exc:
        raise DistillError("ZeRO-3 needs the package deepspeed (`pip install deepspeed`).") from exc
    return deepspeed


def settings(recipe: Recipe) -> dict:
    """DeepSpeed's configuration: the sharding is its work, the rest is ours."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # it only counts with this; our batches vary
        "gradient_accumulation_steps": 1,  # the window's end is told with set_gradient_accumulation_boundary
        "gradient_clipping": recipe.clip,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": recipe.dtype == "bfloat16"},
        "wall_clock_breakdown": False,
    }


class ZeroReader:
    """The teacher in shards: parameters only, no optimizer."""

    def __init__(self, model: nn.Module, recipe: Recipe):
        self.model = model
        self.engine = library().initialize(model=models.HiddenStates(model), config=settings(recipe))[0]

    def __call__(self, ids: Tensor) -> Tensor:
        return self.engine(ids)

    @contextmanager
    def opened(self) -> Iterator[None]:
        yield  # every module gathers what it needs


class ZeroLearner(Learner):
    def __init__(self, model: nn.Module, recipe: Recipe, machine: Machine):
        refused(recipe)
        deepspeed = library()
        self.plain = copy.deepcopy(model).requires_grad_(False)
        super().__init__(model, recipe, machine)
        optimizer = make_optimizer(self.parameters, recipe, fused=False)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.student, optimizer=optimizer, config=settings(recipe)
        )
        deepspeed.zero.register_external_parameter(self.student, models.head_of(model))

    def share(self, teacher: Teacher) -> None:
        head = teacher.head.clone()
        teacher.shard(ZeroReader(teacher.model, self.recipe))
        teacher.head = head

    def train(self) -> None:
        self.engine.train()

    @torch.no_grad()
    def whole(self) -> nn.Module:
        targets = dict(self.plain.named_parameters())
        for name, value in self.weights().items():
            targets[name].copy_(value)
        return self.plain

    def evened(self, pieces: list[Batch], pad: int) -> list[Batch]:
        return as_many(pieces, pad, self.machine)

    def forward(self, batch: Batch, objective: Objective) -> Tensor:
        with torch.autocast(self.machine.device.type, torch.bfloat16, enabled=self.recipe.autocast):
            return self.engine(batch.ids, batch.positions, batch.weights, objective)[0]

    def backward(self, batch: Batch, objective: Objective, last: bool) -> float:
        self.engine.set_gradient_accumulation_boundary(last)
        loss = self.forward(batch, objective)
        self.engine.backward(loss * self.machine.world)  # it averages over the processes, and this is a sum
        return loss.item()

    def norm(self) -> float:
        """DeepSpeed clips in its step, by the same norm."""
        from deepspeed.utils import safe_get_local_grad

        squares = sum(safe_get_local_grad(parameter).double().square().sum().item() for parameter in self.parameters.values())
        return math.sqrt(self.machine.sum(squares)[0])

    def update(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()

    def forget(self) -> None:
        self.engine.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(value).clone() for name, value in self.parameters.items()}

    def moments(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        found = {
            f"{name}/{slot}": safe_get_full_optimizer_state(parameter, slot).clone()
            for name, parameter in self.parameters.items()
            for slot in ("exp_avg", "exp_avg_sq")
        }
        return found | {f"{name}/step": self.steps_done().clone() for name in self.parameters}

    def steps_done(self) -> Tensor:
        return next(torch.as_tensor(state["step"]).float().cpu() for state in self.optimizer.optimizer.state.values())

    def put(self, name: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(self.parameters[name], value)

    def load_moments(self, stored: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for key, value in stored.items():
            name, slot = key.rsplit("/", 1)
            if slot != "step":
                safe_set_full_optimizer_state(self.parameters[name], value.to(self.machine.device), slot)
        done = next(value for key, value in stored.items() if key.endswith("/step"))
        for state in self.optimizer.optimizer.state.values():
            state["step"] = done.clone()
