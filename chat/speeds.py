"""How fast each model file has read and written on this machine, remembered from real answers.

`Speeds(data_dir / "speeds.json")`; a file is known by `fingerprint(path)`, so a copy or a new name keeps its figures.
"""

import json
import statistics
import threading
from pathlib import Path

from chat.engine import Stats
from chat.fingerprint import fingerprint
from chat.models import Speed

KEPT = 15  # latest answers that count, each way
READ, WRITTEN = 64, 16  # tokens; shorter ones measure the start, not the speed


class Speeds:
    """A file that is damaged or cannot be written costs the figures, never an answer."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._known: dict[str, dict[str, list[float]]] = {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            for name, kept in found.items():
                self._known[name] = {way: [float(one) for one in kept[way]][-KEPT:] for way in ("read", "write")}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            self._known = {}

    def of(self, path: Path, backend: str) -> Speed:
        with self._lock:
            kept = self._known.get(_name(path, backend), {})
            return Speed(*(statistics.median(kept[way]) if kept.get(way) else None for way in ("read", "write")))

    def learn(self, path: Path, backend: str, stats: Stats) -> None:
        """From an answer that is finished."""
        new = {
            "read": [stats.read_tps] if stats.prompt - stats.reused >= READ and stats.read_tps > 0 else [],
            "write": [stats.write_tps] if stats.completion >= WRITTEN and stats.write_tps > 0 else [],
        }
        if not any(new.values()) or not path.exists():
            return
        with self._lock:
            kept = self._known.setdefault(_name(path, backend), {"read": [], "write": []})
            for way, figures in new.items():
                kept[way] = [round(one, 2) for one in [*kept[way], *figures]][-KEPT:]
            self._write()

    def _write(self) -> None:
        half = self._path.with_name(self._path.name + ".half")
        try:
            half.write_text(json.dumps(self._known), encoding="utf-8")
            half.replace(self._path)
        except OSError:
            half.unlink(missing_ok=True)


def _name(path: Path, backend: str) -> str:
    try:
        return f"{backend} {fingerprint(path)}"
    except OSError:
        return ""
