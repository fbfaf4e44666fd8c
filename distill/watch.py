"""Watches the student's own answers for collapse: cut off, three times as long, never ending, repeating themselves."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from distill.evaluation import repeated

SPAN = 5  # windows: the first ones are the measure, the last ones are judged


def look(answers: Sequence[Sequence[int]], ends: Sequence[int]) -> dict[str, float]:
    """How a window's answers look: mean length, share that ended, share of repeated 4-grams."""
    if not answers:
        return {}
    return {
        "length": round(float(np.mean([len(answer) for answer in answers])), 3),
        "end_rate": round(float(np.mean([answer[-1] in ends for answer in answers])), 4),
        "repeated": round(float(np.mean([repeated(answer) for answer in answers])), 4),
    }


@dataclass
class Watch:
    """Feed it the look of every on-policy window; it answers with a warning, once per kind."""

    first: list[dict] = field(default_factory=list)
    last: list[dict] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def add(self, seen: dict[str, float]) -> str:
        if len(self.first) < SPAN:
            self.first.append(seen)
        self.last = [*self.last, seen][-SPAN:]
        if len(self.last) < SPAN:
            return ""
        mean = {name: (average(self.first, name), average(self.last, name)) for name in seen}
        (_, cut), (length, now) = mean["end_rate"], mean["length"]
        ended, _ = mean["end_rate"]
        signs = {
            "cut": (cut < 0.5, f"{1 - cut:.0%} of the answers are cut off at new_tokens"),
            "long": (now > 3 * length, f"answers grew from {length:.0f} to {now:.0f} tokens"),
            "end": (cut < 0.5 * ended, f"the share of answers that end fell from {ended:.0%} to {cut:.0%}"),
            "repeat": (
                mean["repeated"][1] > max(0.3, 2 * mean["repeated"][0]),
                f"{mean['repeated'][1]:.0%} of the 4-grams are repeats",
            ),
        }
        found = [(name, text) for name, (is_so, text) in signs.items() if is_so and name not in self.said]
        self.said += [name for name, _ in found]
        return "; ".join(text for _, text in found)


def average(seen: Sequence[dict], name: str) -> float:
    return float(np.mean([one[name] for one in seen]))
