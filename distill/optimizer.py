"""AdamW with a schedule, and its state as named tensors."""

import math

import torch
from torch import Tensor, nn

from distill.recipe import Recipe
from distill.sharding import like


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Of step 0 to steps - 1: linear warmup, then the schedule down to `min_lr`."""
    warmup = round(recipe.warmup * steps) if recipe.warmup < 1 else int(recipe.warmup)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if recipe.schedule == "constant":
        return recipe.lr
    share = 1 - done if recipe.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * share


def make_optimizer(parameters: dict[str, nn.Parameter], recipe: Recipe, fused: bool = True) -> torch.optim.Optimizer:
    """Matrices decay, vectors (norms) do not."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=recipe.lr, betas=betas, fused=fused)


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """`{parameter}/{slot}` -> tensor."""
    return {
        f"{name}/{slot}": value.detach().contiguous()
        for name, parameter in parameters.items()
        for slot, value in optimizer.state[parameter].items()
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], stored: dict[str, Tensor]
) -> None:
    for key, value in stored.items():
        name, slot = key.rsplit("/", 1)
        parameter = parameters[name]
        optimizer.state[parameter][slot] = value if slot == "step" else like(value.to(parameter.device), parameter)
