"""vLLM as the writer of answers: what it is asked, whose weights it has, and what its answers become. With a stand-in.

Run: pytest tests/distill/test_writer.py
"""

import inspect
import os
import sys
import types
from dataclasses import dataclass

import pytest
import torch

from distill import models
from distill.errors import DistillError
from distill.rollout import rollout


@dataclass(frozen=True)
class SamplingParams:
    """The part of vLLM's parameters that we use, with vLLM's names and defaults; others are refused, as there."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    detokenize: bool = True
    allowed_token_ids: list[int] | None = None


class Weights:
    """What vLLM calls the model: it takes weights by their Hugging Face names."""

    def __init__(self, model):
        self.model = model

    def load_weights(self, weights) -> set[str]:
        weights = dict(weights)
        self.model.load_state_dict(weights)
        return set(weights)


@dataclass(frozen=True)
class CompletionOutput:
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: int | None


@dataclass(frozen=True)
class RequestOutput:
    outputs: list[CompletionOutput]


class LLM:
    """A stand-in for vllm.LLM that really samples, with our own rollout; it works only in the order the real one allows."""

    made: "LLM"

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enable_sleep_mode: bool = False,
        seed: int = 0,
    ):
        assert enable_sleep_mode
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        self.weights = Weights(models.load_model(model, "student", getattr(torch, dtype)))
        self.room = max_model_len
        self.awake = {"weights", "kv_cache"}
        self.fresh = False
        self.asked: list[SamplingParams] = []
        LLM.made = self

    def sleep(self, level: int = 1) -> None:
        assert level == 2
        self.awake.clear()
        self.fresh = False
        with torch.no_grad():  # level 2 throws the weights away
            for value in self.weights.model.parameters():
                value.fill_(float("nan"))

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.awake |= set(tags or ("weights", "kv_cache"))

    def apply_model(self, func) -> list:
        assert "weights" in self.awake
        return [func(self.weights)]

    def reset_prefix_cache(self) -> bool:
        self.fresh = True
        return True

    def generate(self, prompts, sampling_params, *, use_tqdm: bool = True) -> list[RequestOutput]:
        assert self.awake == {"weights", "kv_cache"}
        assert self.fresh
        assert len(prompts) == len(sampling_params)
        self.asked += sampling_params
        found = []
        for prompt, wanted in zip(prompts, sampling_params, strict=True):
            ids = prompt["prompt_token_ids"]
            assert len(ids) + wanted.max_tokens <= self.room
            from distill.rollout import Sampling

            drawn = Sampling(
                wanted.max_tokens,
                tuple(wanted.stop_token_ids),
                wanted.temperature,
                wanted.top_p,
                wanted.seed,
                vocabulary=max(wanted.allowed_token_ids) + 1 if wanted.allowed_token_ids else 0,
            )
            (answer,) = rollout(self.weights.model, [ids], [0], drawn)
            stopped = answer[-1] in wanted.stop_token_ids
            # the engine's own EOS stays in the answer; another stop token is named apart
            token_ids = answer if not stopped or answer[-1] == wanted.stop_token_ids[0] else answer[:-1]
            reason = answer[-1] if stopped else None
            found.append(RequestOutput([CompletionOutput(tuple(token_ids), "stop" if stopped else "length", reason)]))
        return found


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    return module


def test_a_run_learns_on_what_vllm_wrote_with_the_weights_of_each_window(trainer, vllm):
    made = trainer(mode="on-policy", generator="vllm", new_tokens=12, steps=3)
    lines = [line for line in made.train() if line["kind"] == "step"]
    assert len(lines) == 3
    assert all(line["loss"] > 0 and line["length"] > 1 for line in lines)
    engine = LLM.made
    assert engine.awake == set()
    assert len({wanted.seed for wanted in engine.asked}) == 18  # a seed for each row of each window
    prompts = [[5, 9, 30, 31], [7, 8]]
    sampling = made.answers.sampling(0, "student")
    first = made.answers.writer.write(made.model, prompts, [1, 2], sampling, made_stats())
    assert first == made.answers.writer.write(made.model, prompts, [1, 2], sampling, made_stats())
    with torch.no_grad():
        for parameter in made.learner.parameters.values():
            parameter.mul_(-1.5)
    assert first != made.answers.writer.write(made.model, prompts, [1, 2], sampling, made_stats())


def made_stats():
    from distill.rollout import Stats

    return Stats()


def test_greedy_answers_of_both_writers_are_equal_and_hold_their_end(trainer, vllm):
    made = trainer(mode="on-policy", generator="vllm", lora_rank=4, teacher="adapter-off")
    with torch.no_grad():
        for name, parameter in made.learner.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    from dataclasses import replace

    from distill.writer import OwnWriter

    sampling = replace(made.answers.sampling(0, "student"), temperature=0.0, ends=tuple(range(0, 400, 3)), new_tokens=30)
    prompts = [[5, 9, 30 + n, 31] for n in range(12)]
    own = OwnWriter().write(made.model, prompts, range(12), sampling, made_stats())
    assert made.answers.writer.write(made.model, prompts, range(12), sampling, made_stats()) == own
    assert sum(answer[-1] in sampling.ends for answer in own) > 6


def test_without_vllm_a_sentence_says_what_to_do(trainer, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(DistillError, match=r"package vllm is missing.*generator=own"):
        trainer(mode="on-policy", generator="vllm")
    trainer(mode="kd", generator="vllm")  # nothing is written, so nothing is missing


def test_several_processes_do_not_write_with_vllm(vllm):
    from distill.recipe import Recipe
    from distill.writer import make_writer

    with pytest.raises(DistillError, match="one process only"):
        make_writer(Recipe(generator="vllm", student="x/y"), 2)


def test_the_stand_in_has_the_names_of_vllm():
    """Read in vLLM's sampling_params.py and entrypoints/llm.py; where vLLM is installed, compared with it."""
    real = pytest.importorskip("vllm")
    for ours, theirs in ((SamplingParams, real.SamplingParams), (LLM.generate, real.LLM.generate)):
        assert set(inspect.signature(ours).parameters) <= set(inspect.signature(theirs).parameters)
