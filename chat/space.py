"""What a Hugging Face Space tells the programs on it, and what follows for this one. Standard library only.

`read(os.environ, folder)` is None anywhere else. The folder's space.json was written by chat/deploy.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NOTE = "space.json"
LONGEST = 1024  # tokens of one answer where everybody waits for two processors, or pays with GPU time
LEASH_S = 30.0  # how long a lent GPU writes for a page that does not look any more


@dataclass(frozen=True)
class Space:
    """Where the app is. `host` is the name visitors see, behind a proxy."""

    host: str = ""
    port: int = 7860
    zero: bool = False  # GPUs are lent, answer by answer
    hardware: str = ""  # as deployed: zero-gpu, cpu-basic, gpu
    model: str | None = None

    @property
    def longest(self) -> int | None:
        return None if self.hardware == "gpu" else LONGEST

    @property
    def leash_s(self) -> float | None:
        return LEASH_S if self.zero else None

    def defaults(self) -> dict[str, object]:
        """For the command line's flags, by name. Keys and values of conversations are not kept on the disk."""
        said: dict[str, object] = {"mode": "space", "host": "0.0.0.0", "port": self.port, "browser": False, "snapshots": 0.0}
        if self.model:
            said["model"] = self.model
        if self.zero:
            said["backend"] = "zerogpu"
        return said


def read(environment: Mapping[str, str], folder: Path) -> Space | None:
    """None where this is not a Space."""
    if not environment.get("SPACE_ID") and environment.get("SYSTEM") != "spaces":
        return None
    note = noted(folder)
    port = environment.get("PORT", "")
    return Space(
        host=environment.get("SPACE_HOST", ""),
        port=int(port) if port.isdigit() else Space.port,
        zero=lends_gpus(environment),
        hardware=str(note.get("hardware", "")),
        model=environment.get("CHAT_MODEL") or note.get("model"),
    )


def lends_gpus(environment: Mapping[str, str]) -> bool:
    """As `spaces` itself decides it."""
    return environment.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def noted(folder: Path, name: str = NOTE) -> dict[str, object]:
    """What deploy (or bundle, under another name) wrote down in the folder; {} where it did not make it."""
    try:
        note = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) and "files" in note else {}
