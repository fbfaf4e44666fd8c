"""What evaluations mean: is the student ready to start, how much of the gap is closed, which student is the best so far."""

import math
from dataclasses import dataclass, field

from distill.errors import DistillError
from distill.evaluation import gap_closed
from distill.recipe import Recipe

WEAK = 0.5  # a share of ended answers below this at the start means: supervised training first
COLLAPSED = 0.1  # of the entropy at the start: a student that learns from a surer teacher keeps more
HIGHER_IS_BETTER = ("score", "top1", "overlap", "end_rate")


@dataclass
class Judge:
    """Its fields are its whole state, and part of every checkpoint."""

    start: dict = field(default_factory=dict)  # the teacher's scores and the first evaluation
    best: dict = field(default_factory=dict)  # step, name and value of the best evaluation
    worse: int = 0  # evaluations since the best one

    def add(self, line: dict) -> None:
        """Takes in an evaluation; the first one is what later ones are compared with, in `gap_closed`."""
        if line["step"] == 0:
            self.start |= line
        elif "teacher_greedy_score" in self.start and "greedy_score" in line:
            error = math.hypot(self.start["teacher_greedy_score_ci"], self.start["greedy_score_ci"]) / 1.96
            start, teacher = self.start["greedy_score"], self.start["teacher_greedy_score"]
            line["gap_closed"] = gap_closed(line["greedy_score"], start, teacher, error)

    def readiness(self, recipe: Recipe) -> str:
        """Why the student may not be ready for on-policy training (arXiv 2306.13649 starts from adequate writers), or ""."""
        signs = []
        ended = self.start.get("end_rate", 1.0)
        if max(recipe.on_policy_share) > 0 and ended < WEAK:
            signs.append(f"only {ended:.0%} of its answers end within new_tokens")
        teacher, own = self.start.get("teacher_greedy_score"), self.start.get("greedy_score")
        if teacher is not None and own is not None and teacher <= own:
            signs.append(f"the teacher scores {teacher:.3f}, not above its {own:.3f}")
        return "; ".join(signs)

    def collapse(self, line: dict) -> str:
        """Why this evaluation looks like a collapse, or "": the student is far surer of its words than at the start."""
        before, now = self.start.get("entropy"), line.get("entropy")
        if not before or now is None or now >= COLLAPSED * before:
            return ""
        return f"the entropy of its choices fell from {before:.3f} to {now:.3f} nats"

    def is_best(self, line: dict, wanted: str) -> bool:
        """Whether this evaluation is the best so far by `wanted`, answers ending at least half as often as at the start.

        Raises DistillError when no evaluation gives that number.
        """
        name = wanted
        if wanted == "auto":
            name = "kl_student_teacher" if "kl_student_teacher" in line else "heldout_loss"
        if not isinstance(line.get(name), float):
            raise DistillError(f"best_by is {name!r}, which no evaluation gives; expected one of {', '.join(line)}.")
        value, higher = line[name], any(word in name for word in HIGHER_IS_BETTER)
        broken = line.get("end_rate", 1.0) < 0.5 * self.start.get("end_rate", 0.0)
        if broken or (self.best and not (value > self.best["value"] if higher else value < self.best["value"])):
            self.worse += 1
            return False
        self.best, self.worse = {"step": line["step"], "name": name, "value": value}, 0
        return True

    def has_seen_enough(self, patience: int) -> bool:
        """Whether the last `patience` evaluations were all no better than the best one."""
        return bool(patience) and self.worse >= patience
