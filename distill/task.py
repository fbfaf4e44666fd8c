"""The score of an answer: `exact`, `regex:PATTERN`, or `file.py:function` of your own.

A function is called as `function(prompt, answer, reference)` with text and returns 0 to 1 (or a bool). `regex` compares the
last match (its first group, if it has one) in answer and reference; the reference is the dataset's answer.
"""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

from distill.errors import DistillError

Score = Callable[[str, str, str], float]


def load_task(text: str) -> Score | None:
    """Raises DistillError when the text names no task."""
    if not text:
        return None
    if text == "exact":
        return lambda prompt, answer, reference: float(answer.strip() == reference.strip())
    kind, _, rest = text.partition(":")
    if kind == "regex":
        return regex_score(rest)
    if kind.endswith(".py") or ".py:" in text:
        path, _, name = text.rpartition(":")
        return python_score(Path(path), name)
    raise DistillError(f"task is {text!r}; expected exact, regex:PATTERN or file.py:function.")


def regex_score(pattern: str) -> Score:
    try:
        compiled = re.compile(pattern)
    except re.error as exc:
        raise DistillError(f"The task's pattern {pattern!r} is no regular expression: {exc}") from exc

    def found(text: str) -> str | None:
        matches = list(compiled.finditer(text))
        return None if not matches else matches[-1].group(1 if compiled.groups else 0)

    return lambda prompt, answer, reference: float(found(reference) is not None and found(answer) == found(reference))


def python_score(path: Path, name: str) -> Score:
    if not path.is_file():
        raise DistillError(f"There is no task file {path}.")
    spec = importlib.util.spec_from_file_location("distill_task", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise DistillError(f"{path} has no function {name}.")
    return lambda prompt, answer, reference: float(function(prompt, answer, reference))
