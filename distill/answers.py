"""On whose answers a window is trained: the data's, the student's own of this moment, or the teacher's."""

from collections.abc import Sequence

import torch
from torch import nn

from distill.clock import Clock
from distill.evaluation import extended
from distill.machine import Machine
from distill.recipe import Recipe
from distill.rollout import Sampling, Stats
from distill.teacher import Teacher
from distill.tokens import TokenRow
from distill.writer import make_writer


class Answers:
    """Raises DistillError when the recipe's generator is missing. `vocabulary`: tokens beyond it are never drawn."""

    def __init__(
        self, recipe: Recipe, ends: tuple[int, ...], vocabulary: int, teacher: Teacher | None, machine: Machine, clock: Clock
    ):
        self.recipe, self.ends, self.vocabulary, self.teacher = recipe, ends, vocabulary, teacher
        self.device, self.clock = machine.device, clock
        self.writer = make_writer(recipe, machine.world) if max(recipe.on_policy_share) > 0 else None
        self.texts: dict[int, list[int]] = {}  # seqkd: what the teacher wrote, by row key

    def sampling(self, step: int, stream: str) -> Sampling:
        recipe = self.recipe
        return Sampling(
            recipe.new_tokens,
            self.ends,
            recipe.temperature,
            recipe.top_p,
            recipe.seed,
            step,
            stream,
            recipe.generate_tokens,
            self.vocabulary,
        )

    def own(self, rows: Sequence[TokenRow], student: nn.Module, step: int, stats: Stats) -> list[TokenRow]:
        """The rows' prompts with the student's own answers; no gradient goes through sampling."""
        prompts, keys = [row.ids[: row.prompt].tolist() for row in rows], [row.key for row in rows]
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.autocast)
        with self.clock.phase("generate"), autocast:
            written = self.writer.write(student, prompts, keys, self.sampling(step, "student"), stats)
        return [extended(row, answer) for row, answer in zip(rows, written, strict=True)]

    def given(self, rows: Sequence[TokenRow]) -> list[TokenRow]:
        """The rows as they are; for seqkd with the teacher's answers, each written once and then remembered."""
        if self.recipe.mode != "seqkd":
            return list(rows)
        missing = [row for row in rows if row.key not in self.texts]
        if missing:
            with self.clock.phase("generate"):
                prompts, keys = [row.ids[: row.prompt].tolist() for row in missing], [row.key for row in missing]
                written = self.teacher.answer(prompts, keys, self.sampling(0, "teacher"))
            self.texts |= {row.key: answer for row, answer in zip(missing, written, strict=True)}
        return [extended(row, self.texts[row.key]) for row in rows]
