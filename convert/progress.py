"""What long work says while it runs. Work is a generator: it yields Progress, returns its result, and may be closed."""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

OFTEN = 0.2  # seconds between two calls of a progress function


@dataclass(frozen=True)
class Progress:
    """How far one stage of a conversion is."""

    stage: str  # "download", "importance", "convert", "verify", "read back"
    done: float
    total: float
    unit: str  # of done and total: "bytes", "weights", "" for a plain share
    seconds: float  # since the stage began

    @property
    def fraction(self) -> float:
        return self.done / self.total if self.total else 1.0

    @property
    def rate(self) -> float:
        """Units per second."""
        return self.done / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """None before anything is known."""
        return (self.total - self.done) / self.rate if self.rate else None


def relay(steps: Generator[Any, None, Any], show: Callable[[Any, float], Progress]) -> Generator[Progress, None, Any]:
    """`steps` with every yielded value turned into Progress by show(value, seconds since the beginning)."""
    began = time.monotonic()
    with closing(steps):
        while True:
            try:
                value = next(steps)
            except StopIteration as stop:
                return stop.value
            yield show(value, time.monotonic() - began)


def share_of(stage: str) -> Callable[[float, float], Progress]:
    """For `relay`, where the values are shares of the work."""
    return lambda share, seconds: Progress(stage, share, 1.0, "", seconds)


def finish(steps: Generator[Progress, None, Any], progress: Callable[[Progress], None] | None) -> Any:
    """Run to the end and return the result; `progress` is called at times, and may raise to stop the work."""
    shown, stage = 0.0, ""
    with closing(steps):
        while True:
            try:
                step = next(steps)
            except StopIteration as stop:
                return stop.value
            if progress and (step.stage != stage or step.done >= step.total or time.monotonic() - shown > OFTEN):
                progress(step)
                shown, stage = time.monotonic(), step.stage
