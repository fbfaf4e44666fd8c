"""The rows of a run: read, split by prompt, turned into tokens, and counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill.errors import DistillError
from distill.recipe import Recipe
from distill.rows import Report, Row, read_rows
from distill.tokens import TokenRow, read_tokens
from distill.windows import digest


@dataclass(frozen=True)
class Dataset:
    """Rows to train on, rows held out, and the second set that is only measured."""

    training: list[TokenRow]
    held_out: list[TokenRow]
    keep: list[TokenRow]
    report: Report

    def describe(self) -> dict:
        """For the run folder: the report, and a histogram of row lengths by powers of two."""
        counts: dict[int, int] = {}
        for row in self.training:
            upper = 1 << max(0, len(row.ids) - 1).bit_length()
            counts[upper] = counts.get(upper, 0) + 1
        return self.report.as_dict() | {
            "training_rows": len(self.training),
            "held_out_rows": len(self.held_out),
            "tokens": sum(len(row.ids) for row in self.training),
            "rows_up_to_length": {str(upper): counts[upper] for upper in sorted(counts)},
        }


def read_dataset(recipe: Recipe, tokenizer, ends: Sequence[int], cache: Path) -> Dataset:
    """Raises DistillError when nothing is left to train on, or for a bad row if the recipe asks so."""
    if not recipe.data:
        raise DistillError("The recipe names no data; add `data: FILE.jsonl`.")
    report = Report()
    rows = read_rows(recipe.data, report)

    def tokens_of(rows: Sequence[Row], settings: Recipe, report: Report) -> list[TokenRow]:
        found = read_tokens(rows, tokenizer, ends, settings, report, cache)
        return [found[index] for index in range(len(found))]

    whole = recipe.but(holdout=0.0, mode="sft", train_on="last")  # measured rows need no split, but answers
    other = read_rows(recipe.eval_data, report) if recipe.eval_data else []
    if other:
        held = {row.prompt_key for row in other}
        for row in rows:
            if row.prompt_key in held:
                report.refuse(row.place, "its prompt is among the held-out rows")
        rows = [row for row in rows if row.prompt_key not in held]
    if recipe.max_rows and len(rows) > recipe.max_rows:
        order = np.random.default_rng(digest(recipe.seed, "subset")).permutation(len(rows))
        rows = [rows[index] for index in sorted(order[: recipe.max_rows])]
    found = tokens_of(rows, recipe, report)
    training = [row for row in found if not row.held_out]
    held_out = tokens_of(other, whole, report) if other else [row for row in found if row.held_out]
    keep = tokens_of(read_rows(recipe.keep_data, report), whole, report) if recipe.keep_data else []
    if report.reasons and recipe.bad_rows == "fail":
        raise DistillError(f"bad_rows is fail: {report.sentence()}")
    if not training:
        raise DistillError(f"No row is left to train on: {report.sentence()}")
    return Dataset(training, held_out, keep, report)
