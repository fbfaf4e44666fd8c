"""Seconds per phase, and what to do when asked to stop."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds per phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return {name: round(value, 4) for name, value in taken.items()}


class Signals:
    """SIGTERM and Ctrl-C ask for a checkpoint at the end of the step; a second one stops at once."""

    def __init__(self):
        self.asked = ""

    @contextmanager
    def caught(self) -> Iterator["Signals"]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
