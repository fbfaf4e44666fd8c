"""Who writes the student's answers: our own sampler (distill/rollout.py), or vLLM on the same GPU for those who have it.

`generator: vllm` in a recipe. The engine sleeps while the student learns; before each window it wakes and takes the weights of
now. Every row draws with a seed of its own, from the same parts as our own noise. Measuring always uses our own sampler.

The calls follow vLLM's `LLM` and `SamplingParams` and are tested with a stand-in; nobody ran them on a GPU yet.
"""

import os
from collections.abc import Sequence
from typing import Protocol

from torch import nn

from distill import models
from distill.errors import DistillError
from distill.recipe import Recipe
from distill.rollout import Sampling, Stats, rollout
from distill.windows import digest


class Writer(Protocol):
    def write(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling, stats: Stats
    ) -> list[list[int]]:
        """New tokens for each prompt (ids), the end token included. `keys` name each row's noise."""


class OwnWriter:
    def write(self, model, prompts, keys, sampling, stats) -> list[list[int]]:
        return rollout(model, prompts, keys, sampling, stats)


class VllmWriter:
    """Raises DistillError when vLLM is missing or the recipe asks for what it cannot do here."""

    def __init__(self, recipe: Recipe, world: int):
        if world > 1:
            raise DistillError("generator is vllm, which writes in one process only; say generator=own, or start one process.")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: weights go over without a copy
        try:
            import vllm
        except ModuleNotFoundError as exc:
            if exc.name != "vllm":
                raise
            raise DistillError(
                "generator is vllm, but the package vllm is missing (`pip install vllm`: Linux, CUDA); say generator=own."
            ) from exc
        self.parameters = vllm.SamplingParams
        self.engine = vllm.LLM(
            model=models.locate(recipe.student, "student"),
            dtype=recipe.dtype,
            max_model_len=recipe.max_tokens + recipe.new_tokens,
            gpu_memory_utilization=recipe.vllm_memory,
            enable_sleep_mode=True,
            seed=recipe.seed,
        )
        self.engine.sleep(level=2)  # 2: its weights are dropped too, for ours will come

    def write(self, model, prompts, keys, sampling, stats) -> list[list[int]]:
        self.engine.wake_up(tags=["weights"])
        weights = list(models.merged(model).items())
        self.engine.apply_model(lambda own: own.load_weights(weights) and None)
        self.engine.reset_prefix_cache()  # what was kept of prompts belongs to the weights before
        self.engine.wake_up(tags=["kv_cache"])
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        found = self.engine.generate(asked, [self.drawing(key, sampling, model) for key in keys], use_tqdm=False)
        self.engine.sleep(level=2)
        answers = [ended(output.outputs[0], sampling.ends) for output in found]
        stats.tokens += sum(map(len, answers))
        return answers

    def drawing(self, key: int, sampling: Sampling, model: nn.Module):
        width = len(models.head_of(model))
        padded = sampling.vocabulary and sampling.vocabulary < width  # tokens of a padded head are never drawn
        return self.parameters(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.new_tokens,
            stop_token_ids=list(sampling.ends),
            seed=digest(sampling.seed, sampling.stream, sampling.window, key) % 2**63,
            allowed_token_ids=list(range(sampling.vocabulary)) if padded else None,
            detokenize=False,
        )


def ended(output, ends: Sequence[int]) -> list[int]:
    """An answer's ids with its end token, which vLLM names apart where it was told to stop there."""
    ids = list(output.token_ids)
    if isinstance(output.stop_reason, int) and output.stop_reason in ends and (not ids or ids[-1] not in ends):
        ids.append(output.stop_reason)
    return ids


def make_writer(recipe: Recipe, world: int) -> Writer:
    return VllmWriter(recipe, world) if recipe.generator == "vllm" else OwnWriter()
