"""Models of the Hugging Face hub that are on this disk already: `cached("owner/name")`. Never asks the network.

A `.gguf` in a repository is written `owner/name:file.gguf`.
"""

import json
import os
from pathlib import Path


def cached(hub_id: str) -> Path | None:
    """The snapshot of a hub model in the Hugging Face cache, if it is whole. Looks at the disk only."""
    folder = _snapshot(hub_id)
    if folder is None or not (folder / "config.json").is_file():
        return None
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError):
            return None
    else:
        files = {"model.safetensors"}
    whole = all((folder / file).is_file() for file in files) and (folder / "tokenizer.json").is_file()
    return folder if whole else None


def cached_file(typed: str) -> Path | None:
    """The file `owner/name:file.gguf` in the cache."""
    hub_id, _, file = typed.partition(":")
    folder = _snapshot(hub_id)
    return folder / file if folder and (folder / file).is_file() else None


def _snapshot(hub_id: str) -> Path | None:
    name, _, revision = hub_id.partition("@")
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    repo = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}"
    try:
        commit = (repo / "refs" / (revision or "main")).read_text(encoding="ascii").strip()
    except OSError:
        commit = revision
    return repo / "snapshots" / commit if commit else None
