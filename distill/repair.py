"""Mending what was forgotten, in miniature, the way the flagship model was made.

A model that solves task A (reach the goal) is trained on task B (pass a waypoint first) and loses much of A. GKD on A's
prompts, with the model as it was before B as the teacher, brings A back while B stays.

What it shows today is a failure: A comes back (100 -> 20 -> 99.8 %) and B goes with it (95 -> 7 %). Tried on one seed, at
rates from 3e-5 to 3e-4 with 20 to 100 steps: letters for digits in B's prompts (78-88 % of B's gain lost), B known a little
before (72 % to all), sorting letters as B, which shares no word with A (A 11 -> 33 %, B 99.7 -> 1 % after 20 steps at 1e-4).
So neither shared words nor a high rate explain it alone; LoRA and wider models were not tried.

Run: python -m distill mini --repair [--out runs/repair]
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distill.grid import Lab, Scale, workers, write_blank, write_tasks


@dataclass(frozen=True)
class RepairScale:
    """Sizes of the experiment."""

    rows: int = 20000
    first_steps: int = 900
    second_steps: int = 600
    steps: int = 100
    lr: float = 3e-4
    tests: int = 400


class RepairLab(Lab):
    """Two tasks, each with its tests."""

    def __init__(self, folder: Path, scale: RepairScale):
        super().__init__(folder, Scale(tests=scale.tests))
        self.more_tests = folder / "tests-b.jsonl"
        self.avoid_b = write_tasks(self.more_tests, scale.tests, 0.0, 20_000, points=3)

    def both(self, name: str, model: Path) -> dict:
        """Greedy scores on A and B."""
        return {"model": name, "a": self.score(model)["greedy"], "b": self.score(model, self.more_tests)["greedy"]}


def prepare(folder: Path, scale: RepairScale) -> list[dict]:
    """The model before B, and after."""
    lab = RepairLab(folder, scale)
    write_tasks(folder / "a.jsonl", scale.rows, 0.2, 1, lab.avoid, repeat=True)
    write_tasks(folder / "b.jsonl", scale.rows, 0.0, 2, lab.avoid_b, points=3)
    blank = write_blank(folder / "blank", 3, 96, 0)
    before = lab.train(
        "before", mode="sft", student=str(blank), data=str(folder / "a.jsonl"), steps=scale.first_steps, lr=2e-3
    )
    after = lab.train(
        "after", mode="sft", student=str(before), data=str(folder / "b.jsonl"), steps=scale.second_steps, lr=1e-3
    )
    return [lab.both("before", before), lab.both("after", after)]


REPAIRS: dict[str, dict[str, object]] = {
    "repaired, lambda 1": {"mode": "on-policy", "beta": 0.0},
    "repaired, lambda 0.25": {"mode": "gkd", "lmbda": 0.25, "beta": 0.0},
    "B continued": {"mode": "sft"},
}


def mend(folder: Path, scale: RepairScale, name: str) -> dict:
    lab, recipe = RepairLab(folder, scale), REPAIRS[name]
    data = "b.jsonl" if recipe["mode"] == "sft" else "a.jsonl"
    teacher = "" if recipe["mode"] == "sft" else str(folder / "before" / "final")
    made = lab.train(
        name.replace(" ", "-").replace(",", ""),
        student=str(folder / "after" / "final"),
        teacher=teacher,
        data=str(folder / data),
        steps=scale.steps,
        lr=scale.lr,
        **recipe,
    )
    return lab.both(name, made)


def repair(folder: Path, scale: RepairScale | None = None) -> Iterator[dict]:
    """A line per model, then the shares of A regained and of B lost, and whether the rule held (>= 70 %, <= 20 %)."""
    scale = scale or RepairScale()
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with workers() as pool:
        before, after = pool.submit(prepare, folder, scale).result()
        yield before
        yield after
        found = {}
        jobs = {name: pool.submit(mend, folder, scale, name) for name in REPAIRS}
        for name, job in jobs.items():
            found[name] = job.result()
            yield found[name]
    yield verdict(before, after, found["repaired, lambda 1"]) | {"seconds": round(time.perf_counter() - begin, 1)}


def verdict(before: dict, after: dict, repaired: dict) -> dict:
    """B's gain is measured from the model before B."""
    lost, gained = before["a"] - after["a"], after["b"] - before["b"]
    regained = 100 * (repaired["a"] - after["a"]) / lost if lost > 0 else 0.0
    gave_up = 100 * (after["b"] - repaired["b"]) / gained if gained > 0 else 100.0
    return {
        "model": "verdict",
        "a_lost": round(lost, 1),
        "a_regained_percent": round(regained, 1),
        "b_lost_percent": round(gave_up, 1),
        "passed": lost >= 15 and regained >= 70 and gave_up <= 20,
    }
