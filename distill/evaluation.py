"""What is measured of a student: divergences from the teacher on fresh answers of its own, and how those answers look.

`Evaluation(...).measure()` gives one flat dict of numbers; `name_ci` is the half width of a 95 % interval over rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill import models
from distill.batch import batches, targets_of
from distill.loss import CrossEntropy, log_softmax_, rows_per_chunk
from distill.recipe import Recipe
from distill.rollout import Sampling, rollout
from distill.task import Score
from distill.teacher import Teacher
from distill.tokens import TokenRow

TOP = 16  # of the top-k overlap


@torch.no_grad()
def compare(
    hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, vocabulary: int, temperature: float
) -> Tensor:
    """[N, 5] per position: KL(teacher||student), KL(student||teacher), equal argmax, top-16 overlap, student's entropy."""
    found = []
    chunk = rows_per_chunk(len(head), hidden.device)
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        log_p = (hidden[part].to(head.dtype) @ head[:vocabulary].T).float().div_(temperature)
        log_q = (teacher[part].to(teacher_head.dtype) @ teacher_head[:vocabulary].T).float().div_(temperature)
        log_softmax_(log_p)
        log_softmax_(log_q)
        p, q, gap = log_p.exp(), log_q.exp(), log_q - log_p
        k = min(TOP, vocabulary)
        top_p, top_q = log_p.topk(k).indices, log_q.topk(k).indices
        overlap = (top_p[:, :, None] == top_q[:, None, :]).any(-1).float().mean(-1)
        same = (top_p[:, 0] == top_q[:, 0]).float()
        entropy = -torch.linalg.vecdot(p, log_p)
        found.append(torch.stack([torch.linalg.vecdot(q, gap), -torch.linalg.vecdot(p, gap), same, overlap, entropy], 1))
    return torch.cat(found) if found else torch.zeros(0, 5)


def token_mean(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """(mean over tokens, half width of its 95 % interval), rows being the independent units."""
    sums, counts = np.asarray(sums, float), np.asarray(counts, float)
    if not counts.sum():
        return math.nan, math.nan
    mean = sums.sum() / counts.sum()
    if len(sums) < 2:
        return mean, math.nan
    rest = sums - mean * counts
    return mean, 1.96 * math.sqrt(len(sums) / (len(sums) - 1) * (rest**2).sum()) / counts.sum()


def share(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width). For shares near 0 or 1 Wilson's interval, which is never empty."""
    n = len(values)
    if not n:
        return math.nan, math.nan
    mean = float(np.mean(values))
    if all(value in (0, 1) for value in values):
        z2 = 1.96**2
        return mean, 1.96 * math.sqrt(mean * (1 - mean) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return mean, 1.96 * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan


def repeated(ids: Sequence[int], size: int = 4) -> float:
    """The share of 4-grams that occurred before in the same answer."""
    grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(answers: Sequence[Sequence[int]], size: int = 2) -> float:
    """Different n-grams over all n-grams of all answers: it falls when answers become alike."""
    grams = [tuple(ids[i : i + size]) for ids in answers for i in range(len(ids) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def extended(row: TokenRow, answer: Sequence[int]) -> TokenRow:
    """The row's prompt with another answer, all of which is trained."""
    ids = np.concatenate([row.ids[: row.prompt], np.asarray(answer, row.ids.dtype)])
    return TokenRow(ids, np.arange(len(ids)) >= row.prompt, row.prompt, row.held_out, row.key, row.place)


@dataclass(frozen=True)
class Evaluation:
    """The models and rows of an evaluation. `decode`: ids -> text without special tokens."""

    student: models.Student
    teacher: Teacher | None
    rows: Sequence[TokenRow]
    keep: Sequence[TokenRow]
    recipe: Recipe
    ends: tuple[int, ...]
    pad: int
    vocabulary: int
    decode: Callable[[Sequence[int]], str]
    score: Score | None = None

    @property
    def device(self) -> torch.device:
        return models.head_of(self.student.model).device

    def measure(self) -> dict:
        """All numbers of the student as it is now."""
        self.student.eval()
        answered = [row for row in self.rows if targets_of(row)]
        line: dict = {"rows": len(self.rows)}
        if answered:
            line |= self.loss_on(answered, "heldout_loss")
        if kept := [row for row in self.keep if targets_of(row)]:
            line |= self.loss_on(kept, "keep_loss")
        if self.teacher and answered:
            line |= pick(self.divergences(answered), "data_", ("kl_teacher_student", "kl_student_teacher", "top1"))
        asked = [row for row in self.rows if row.prompt]
        if self.recipe.eval_samples and asked and (self.teacher or self.score):
            line |= self.of_samples(asked)
        if self.score and (asked := [row for row in self.keep if row.prompt]):
            greedy = self.sample(asked, 0.0)
            line |= pair("keep_greedy_score", share(self.scores(asked, greedy)))
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in line.items()}

    def of_samples(self, rows: Sequence[TokenRow]) -> dict:
        line: dict = {}
        drawn = self.sample(rows, self.recipe.temperature)
        if self.teacher:
            line |= self.divergences([extended(row, answer) for row, answer in zip(rows, drawn, strict=True)])
        lengths = [len(answer) for answer in drawn]
        ended = [float(answer[-1] in self.ends) for answer in drawn]
        line |= pair("end_rate", share(ended)) | pair("length", share(lengths))
        line |= {"repeated": float(np.mean([repeated(answer) for answer in drawn])), "distinct": distinct(drawn)}
        if self.score:
            line |= pair("score", share(self.scores(rows, drawn)))
            line |= pair("greedy_score", share(self.scores(rows, self.sample(rows, 0.0))))
        return line

    def sample(self, rows: Sequence[TokenRow], temperature: float, of_teacher: bool = False) -> list[list[int]]:
        """Answers with noise that is the same in every evaluation, so that two evaluations differ by their models alone."""
        recipe = self.recipe
        sampling = Sampling(
            recipe.new_tokens,
            self.ends,
            temperature,
            1.0,
            recipe.seed,
            0,
            "evaluation",
            recipe.generate_tokens,
            self.vocabulary,
        )
        prompts, keys = [row.ids[: row.prompt].tolist() for row in rows], [row.key for row in rows]
        if of_teacher:
            return self.teacher.answer(prompts, keys, sampling)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.autocast):
            return rollout(self.student.model, prompts, keys, sampling)

    def examples(self, count: int = 4) -> list[dict[str, str]]:
        """Greedy answers to a few held-out prompts, of the student and of the teacher."""
        rows = [row for row in self.rows if row.prompt][:count]
        if not rows:
            return []
        found = [
            {"prompt": self.decode(row.ids[: row.prompt]), "student": self.decode(answer)}
            for row, answer in zip(rows, self.sample(rows, 0.0), strict=True)
        ]
        if self.teacher:
            for one, answer in zip(found, self.sample(rows, 0.0, of_teacher=True), strict=True):
                one["teacher"] = self.decode(answer)
        return found

    def teacher_scores(self) -> dict:
        """The task's score of the teacher, for the share of the gap that is closed."""
        rows = [row for row in self.rows if row.prompt]
        line = pair("teacher_score", share(self.scores(rows, self.sample(rows, self.recipe.temperature, True))))
        return line | pair("teacher_greedy_score", share(self.scores(rows, self.sample(rows, 0.0, True))))

    def scores(self, rows: Sequence[TokenRow], answers: Sequence[Sequence[int]]) -> list[float]:
        return [
            self.score(self.decode(row.ids[: row.prompt]), self.decode(answer), self.decode(row.ids[row.prompt :]))
            for row, answer in zip(rows, answers, strict=True)
        ]

    @torch.no_grad()
    def loss_on(self, rows: Sequence[TokenRow], name: str) -> dict:
        """Mean cross-entropy per trained token, in nats."""
        sums, counts = np.zeros(len(rows)), np.zeros(len(rows))
        for batch in batches(rows, [1.0] * len(rows), self.recipe.micro_tokens, self.pad):
            moved = batch.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.autocast):
                _, values = self.student(moved.ids, moved.positions, moved.weights, CrossEntropy(moved.labels))
            where = np.asarray(batch.rows)[batch.rows_of_positions.numpy()]
            np.add.at(sums, where, values.double().cpu().numpy())
            np.add.at(counts, where, 1)
        return pair(name, token_mean(sums, counts))

    @torch.no_grad()
    def divergences(self, rows: Sequence[TokenRow]) -> dict:
        """Of student and teacher on the trained tokens of `rows`, exact over the vocabulary."""
        names = ("kl_teacher_student", "kl_student_teacher", "top1", "top16_overlap", "entropy")
        sums, counts = np.zeros((len(rows), len(names))), np.zeros(len(rows))
        made = batches(rows, [1.0] * len(rows), self.recipe.micro_tokens, self.pad)
        for batch, teacher in self.teacher.scored(made):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.autocast):
                hidden = models.hidden_states(self.student.model, batch.ids.to(self.device)).flatten(0, 1)
            hidden = hidden[batch.positions.to(self.device)]
            head = models.head_of(self.student.model)
            width = min(self.vocabulary or len(head), len(head), len(self.teacher.head))
            values = compare(hidden, head, teacher, self.teacher.head, width, self.recipe.temperature_of_loss)
            where = np.asarray(batch.rows)[batch.rows_of_positions.numpy()]
            np.add.at(sums, where, values.double().cpu().numpy())
            np.add.at(counts, where, 1)
        line: dict = {}
        for index, name in enumerate(names):
            line |= pair(name, token_mean(sums[:, index], counts))
        return line


def pair(name: str, value: tuple[float, float]) -> dict:
    return {name: value[0], f"{name}_ci": value[1]}


def pick(line: dict, prefix: str, names: Sequence[str]) -> dict:
    return {f"{prefix}{name}{end}": line[f"{name}{end}"] for name in names for end in ("", "_ci")}


def gap_closed(student: float, start: float, teacher: float, error: float) -> float | None:
    """(student - start) / (teacher - start); None when the teacher is not above the start by two standard errors."""
    return (student - start) / (teacher - start) if teacher - start > 2 * error else None
