"""Models on the Hugging Face hub: download with progress, checked against the sha256 the hub states; upload.

The only door to huggingface_hub. HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_CACHE and HF_TOKEN are honoured as there.
"""

import hashlib
import re
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from threading import Event
from typing import Any

from convert.errors import ConvertError

ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
WANTED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
)
PIECE = 4 << 20


class Stopped(Exception):
    """Raised inside a download that nobody wants any more."""


@dataclass(frozen=True)
class Checkout:
    """A model's files on this disk."""

    directory: Path
    repo: str = ""
    revision: str = ""  # the commit
    hashes: dict[str, dict[str, Any]] = field(default_factory=dict)  # file -> size, sha256, where already known


def is_id(text: str) -> bool:
    """owner/name, with @revision if wanted; a path that exists is never one."""
    return bool(ID.fullmatch(text)) and not Path(text).exists()


@contextmanager
def our_errors(repo: str) -> Iterator[None]:
    """huggingface_hub's errors as sentences, most specific first."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ConvertError(f"{repo} is gated: accept its conditions on the hub, then `hf auth login`.") from error
    except errors.RevisionNotFoundError as error:
        raise ConvertError(f"{repo} exists, but not that revision of it.") from error
    except errors.RepositoryNotFoundError as error:
        raise ConvertError(f"The hub knows no model {repo} (or it is private: `hf auth login`).") from error
    except errors.RemoteEntryNotFoundError as error:
        raise ConvertError(f"{repo} lost a file while it was downloaded; start again.") from error
    except errors.HFValidationError as error:
        raise ConvertError(f"{repo} is not a valid name on the hub.") from error
    except errors.HfHubHTTPError as error:
        raise ConvertError(
            f"The hub answered with an error for {repo}: {str(error).splitlines()[0]} Try again later."
        ) from error
    except (httpx2.HTTPError, ConnectionError, TimeoutError) as error:
        raise ConvertError(f"The connection to the hub broke while {repo} was transferred ({error}); run it again.") from error
    except OSError as error:
        if error.errno is not None:  # the disk's trouble, not the network's
            raise
        said = str(error).splitlines()[0]
        raise ConvertError(
            f"A file of {repo} arrived with another size than the hub states ({said}); run it again."
        ) from error


def sha256(path: Path, stop: Event) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            if stop.is_set():
                raise Stopped
            digest.update(piece)
    return digest.hexdigest()


def wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WANTED) and (name.count("/") == 0 or "additional" in name)


def cached(repo: str, revision: str | None) -> Checkout:
    """From the cache alone. Raises ConvertError with the name of what is missing."""
    import json

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def find(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repo, name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None

    config = find("config.json") or find("adapter_config.json")
    if config is None:
        raise ConvertError(f"{repo} is not in the cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set).")
    needed = ["tokenizer.json"]
    if config.name == "adapter_config.json":
        needed = ["adapter_model.safetensors"]
    elif index := find("model.safetensors.index.json"):
        needed += sorted(set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()))
    else:
        needed.append("model.safetensors")
    missing = [name for name in needed if find(name) is None]
    if missing:
        raise ConvertError(
            f"{repo} is only partly in the cache: {', '.join(missing)} missing. Run it once with a connection to the hub."
        )
    return Checkout(config.parent, repo, config.parent.name)


def cached_file(repo: str, revision: str | None, name: str) -> Checkout:
    """One file, from the cache alone. Raises ConvertError where it is not there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(hf_hub_download(repo, name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise ConvertError(
            f"{name} of {repo} is not in the cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set)."
        ) from error
    return Checkout(path.parent, repo)


def check_out(name: str, only: str | None = None) -> Generator[tuple[int, int], None, Checkout]:
    """Download what is missing of owner/name[@revision]; yields (bytes done, bytes in all), returns the Checkout.

    With `only` that one file of it, of whatever kind; the Checkout's directory is the one it lies in.

    Weights, cached ones too, are compared with the sha256 that the hub states; a wrong one is removed from the cache.
    Raises ConvertError.
    """
    import httpx2
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    repo, _, revision = name.partition("@")

    def at_hand() -> Checkout:
        return cached_file(repo, revision or None, only) if only else cached(repo, revision or None)

    if constants.HF_HUB_OFFLINE:
        return at_hand()
    try:
        with our_errors(repo):
            try:
                info = HfApi().model_info(repo, revision=revision or None, files_metadata=True)
            except (httpx2.TransportError, OfflineModeIsEnabled):
                return at_hand()
    except OfflineModeIsEnabled as error:
        raise ConvertError(f"{repo} cannot be downloaded offline.") from error
    files = [file for file in info.siblings or [] if (file.rfilename == only if only else wanted(file.rfilename))]
    if only and not files:
        raise ConvertError(f"{repo} has no file {only}: look at its page for what it holds.")
    if not only and not any(file.rfilename.endswith(".safetensors") for file in files):
        raise ConvertError(f"{repo} holds no safetensors; pickled weights are not read.")
    total = sum(file.size or 0 for file in files)
    stop, got = Event(), [0]
    with ThreadPoolExecutor(1, thread_name_prefix="download") as pool:
        running = pool.submit(download, repo, info.sha, files, got, stop)
        try:
            while not running.done():
                yield min(got[0], total), total
                stop.wait(0.1)
        finally:
            stop.set()
    hashes = running.result()
    remember(hashes[""], revision or "main")
    yield total, total
    return Checkout(hashes.pop(""), repo, info.sha, hashes)


def remember(snapshot: Path, revision: str) -> None:
    """Note in the cache which commit a name stood for, so that it is found offline. Files were fetched by commit, lest a
    branch that moves meanwhile mixes two models."""
    if revision != snapshot.name:
        reference = snapshot.parents[1] / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(snapshot.name)


def download(repo: str, commit: str, files: list[Any], got: list[int], stop: Event) -> dict[str, Any]:
    """File name -> size and sha256 of those the hub states one for; under "" the directory. Runs in a thread of its own."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm

    class Counter(tqdm):
        """Counts bytes, shows nothing, and stops the transfer when asked to."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **(options | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise Stopped
            got[0] += int(n or 0)
            return None

    known: dict[str, Any] = {}
    done = 0
    for file in sorted(files, key=lambda file: (file.size or 0, file.rfilename)):
        with our_errors(repo):
            path = Path(hf_hub_download(repo, file.rfilename, revision=commit, tqdm_class=Counter))
        done += file.size or 0
        got[0] = done
        if file.rfilename == "config.json" or (file.rfilename == "adapter_config.json" and "" not in known) or len(files) == 1:
            known[""] = path.parent
        if file.lfs:
            found = sha256(path, stop)
            if found != file.lfs.sha256:
                blob = path.resolve()
                path.unlink()
                blob.unlink(missing_ok=True)
                raise ConvertError(
                    f"{file.rfilename} of {repo} arrived damaged: sha256 {found[:12]}..., the hub states "
                    f"{file.lfs.sha256[:12]}.... It was removed from the cache; run it again."
                )
            known[file.rfilename] = {"size": path.stat().st_size, "sha256": found}
    if "" not in known:
        raise ConvertError(f"{repo} has neither config.json nor adapter_config.json.")
    return known


def check_push(repo: str) -> None:
    """Raises ConvertError where a later `push` cannot work: offline, a bad name, no token that the hub knows."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import LocalTokenNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise ConvertError("--push needs the hub, and HF_HUB_OFFLINE is set.")
    if not ID.fullmatch(repo) or "@" in repo:
        raise ConvertError(f"--push {repo!r} is not a name on the hub; write owner/name.")
    with our_errors(repo):
        try:
            HfApi().whoami()
        except LocalTokenNotFoundError as error:
            raise ConvertError("--push needs a token with write access: `hf auth login`, or HF_TOKEN.") from error


def push(repo: str, files: dict[str, Path | bytes], message: str, private: bool = False) -> str:
    """Upload files (path in the repository -> file or content) in one commit; returns its address. Raises ConvertError."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with our_errors(repo):
        api.create_repo(repo, exist_ok=True, private=private)
        operations = [
            CommitOperationAdd(name, str(content) if isinstance(content, Path) else content) for name, content in files.items()
        ]
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)
