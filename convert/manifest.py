"""What stands beside a finished file, as OUT.gguf.json: sources, versions, command, hashes, and how good it turned out."""

import hashlib
import json
import math
import os
import platform
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

from convert.errors import ConvertError

FORMAT = 1
PIECE = 4 << 20


def manifest_path(gguf: Path) -> Path:
    return gguf.with_name(gguf.name + ".json")


def hash_files(files: dict[str, Path], stop: Event | None = None) -> dict[str, dict[str, Any]]:
    """Name -> size and sha256 (hex). Ends early, with what it has, when `stop` is set."""
    found = {}
    buffer = memoryview(bytearray(PIECE))
    for name, path in files.items():
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                if stop and stop.is_set():
                    return found
                digest.update(buffer[:got])
        found[name] = {"size": path.stat().st_size, "sha256": digest.hexdigest()}
    return found


def versions() -> dict[str, str]:
    packages = ("llama-cpp-python", "gguf", "numpy", "tokenizers")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def plain(value: Any) -> Any:
    """NaN is not JSON: None instead."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def write_manifest(gguf: Path, content: dict[str, Any]) -> Path:
    """Whole or not at all."""
    path = manifest_path(gguf)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="\n") as file:
        json.dump(plain({"format": FORMAT} | content), file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    return path


def read_manifest(gguf: Path) -> dict[str, Any] | None:
    """None where there is none. Raises ConvertError where it cannot be read."""
    path = manifest_path(gguf)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ConvertError(f"{path} is of format {content['format']}; this program reads {FORMAT}.")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConvertError(f"{path} is not a readable manifest; move it away and verify {gguf.name} again.") from error
    return content
