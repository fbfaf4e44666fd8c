"""Tiny folders that many tests share, and a maker of trainers."""

import itertools
from pathlib import Path

import pytest

from tests.distill.tiny_models import conversation, write_model, write_rows


@pytest.fixture(scope="session")
def student(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("student"), seed=0)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("teacher"), seed=1)


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", [conversation(f"say {n}", f"number {n}") for n in range(24)])


@pytest.fixture
def trainer(tmp_path, student, teacher, rows):
    """make(**recipe) -> Trainer of a fresh run folder, on one thread."""
    import torch

    from distill.machine import Machine
    from distill.recipe import Recipe
    from distill.run import Run
    from distill.trainer import Trainer

    number = itertools.count()

    def make(**changes) -> Trainer:
        values = {
            "student": str(student),
            "teacher": str(teacher),
            "data": str(rows),
            "run": str(tmp_path / f"run{next(number)}"),
            "window": 6,
            "steps": 4,
            "holdout": 0.0,
            "new_tokens": 12,
            "max_tokens": 128,
            "threads": 1,
            "lr": 1e-3,
            "seed": 7,
            "warm_start": "off",
            "watch": "off",
        }
        recipe = Recipe.of({name: value for name, value in (values | changes).items() if value is not None})
        torch.set_num_threads(1)
        return Trainer(Run.create(recipe), Machine(torch.device("cpu")))

    return make
