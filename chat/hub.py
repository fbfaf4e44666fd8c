"""Models of the Hugging Face hub: what is cached here, and fetching what is not. Asks the net only when told.

`cached("owner/name")` looks at the disk only; `fetch("owner/name", offline=False, report=print)` downloads.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from chat.engine import ModelUnusable

WANTED = ("*.json", "*.jinja", "*.safetensors")  # what a model is made of; never pickles
Report = Callable[[str, float | None], None]  # what is being done, and how far it is from 0 to 1 if that is known


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


def fetch(hub_id: str, offline: bool, report: Report) -> Path:
    """Download a model's safetensors, tokenizer and settings into the Hugging Face cache; goes on where it was cut."""
    name, _, revision = hub_id.partition("@")
    if offline or os.environ.get("HF_HUB_OFFLINE") == "1":
        raise ModelUnusable(
            f"{hub_id} is not on this disk and the app is offline: start once without --offline (and HF_HUB_OFFLINE), "
            "or copy the model's folder here and give its path."
        )
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the library is imported
    import huggingface_hub as hub
    from huggingface_hub import errors

    report(f"Asking the hub for {name}", None)
    try:
        info = hub.HfApi().model_info(name, revision=revision or None, files_metadata=True)
        files = [file for file in info.siblings or [] if any(Path(file.rfilename).match(form) for form in WANTED)]
        total = sum(file.size or 0 for file in files)
        if not any(file.rfilename.endswith(".safetensors") for file in files):
            raise ModelUnusable(
                f"{name} holds no safetensors: a model's own weights are needed, not a GGUF or pickle repository."
            )
        folder = Path(hub.constants.HF_HUB_CACHE)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if total > free:
            raise ModelUnusable(
                f"{name} takes {total / 1e9:.1f} GB and {free / 1e9:.1f} GB of disk are free: make room first."
            )
        done = _Bytes(f"Downloading {name}", total, report)
        path = hub.snapshot_download(name, revision=info.sha, allow_patterns=list(WANTED), tqdm_class=done.bar())
    except errors.GatedRepoError as exc:
        raise ModelUnusable(
            f"{name} is gated: accept its terms on the hub and set HF_TOKEN (the hub answered 401 or 403)."
        ) from exc
    except errors.RepositoryNotFoundError as exc:
        raise ModelUnusable(f"The hub has no model {name} (404), or it is private: check the name, or set HF_TOKEN.") from exc
    except errors.RevisionNotFoundError as exc:
        raise ModelUnusable(f"{name} has no revision {revision} on the hub: check it, or leave it out.") from exc
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as exc:
        reason = (
            "the disk is full" if getattr(exc, "errno", None) == 28 else f"{type(exc).__name__}: {str(exc).splitlines()[0]}"
        )
        raise ModelUnusable(f"Downloading {name} failed ({reason}): try again, what is here already is kept.") from exc
    except Exception as exc:
        # httpx's own errors (no route, time-out) come through untranslated, and its module name differs by version.
        if "httpx" not in type(exc).__module__ and "httpcore" not in type(exc).__module__:
            raise
        raise ModelUnusable(
            f"The hub does not answer ({type(exc).__name__}): check the network, or use a model on disk."
        ) from exc
    return Path(path)


class _Bytes:
    """Sums what all progress bars of a download add up to."""

    def __init__(self, text: str, total: int, report: Report) -> None:
        self._text, self._total, self._report, self._done = text, max(total, 1), report, 0

    def bar(self) -> type:
        from tqdm.auto import tqdm

        whole = self

        class Silent(tqdm):
            def __init__(self, *args: object, **kwargs: object) -> None:
                kwargs.pop("name", None)
                super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[arg-type]
                self._counts = kwargs.get("unit") == "B"

            def update(self, n: float | None = 1) -> None:
                if self._counts:
                    whole.add(int(n or 0))

        return Silent

    def add(self, count: int) -> None:
        self._done = min(self._done + count, self._total)
        self._report(f"{self._text}, {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB", self._done / self._total)
