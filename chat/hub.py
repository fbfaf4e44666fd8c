"""Models of the Hugging Face hub that are on this disk already: `cached("owner/name")`. Never asks the network."""

import json
import os
from pathlib import Path


def cached(hub_id: str) -> Path | None:
    """The snapshot of a hub model in the Hugging Face cache, if it is whole. Looks at the disk only."""
    name, _, revision = hub_id.partition("@")
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    repo = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}"
    try:
        commit = (repo / "refs" / (revision or "main")).read_text(encoding="ascii").strip()
    except OSError:
        commit = revision
    folder = repo / "snapshots" / commit
    if not commit or not (folder / "config.json").is_file():
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
