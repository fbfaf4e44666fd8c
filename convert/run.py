"""From weights to verified files, as one public function: `convert(source, out, quant=("Q4_K_M",), progress=show)`.

`progress` is called with a Progress about five times a second, in the calling thread. To cancel, raise from it: what is
done so far stays beside the result as OUT.part and OUT.journal, and the next call goes on from there (partial.discard
deletes both).
"""

import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from convert.errors import ConvertError
from convert.progress import Progress, finish
from convert.request import Request, Result


def convert(
    source: str | Path,
    out: str | Path,
    *,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> list[Result]:
    """Write `out` and return what was made, one Result per type. The options are the fields of Request.

    Raises ConvertError with a sentence for the user; nothing half made is ever seen under a final name.
    """
    return finish(converting(Request(source, out, **options)), progress)


def fetch(name: str, only: str | None = None, *, progress: Callable[[Progress], None] | None = None) -> Path:
    """The directory of owner/name[@revision]: downloaded where it is not in the cache, weights checked by their sha256.

    With `only`, the path of that one file.

    Raises ConvertError. For a program that runs a model's own files.
    """
    try:
        from convert.preflight import check_out
    except ImportError as error:
        raise ConvertError(f"Downloading needs the package {error.name}: pip install -r requirements-cpu.txt.") from error
    directory = finish(check_out(name, only), progress).directory
    return directory / only if only else directory


def converting(request: Request) -> Generator[Progress, None, list[Result]]:
    """`convert` as a generator: yields Progress, returns the results, may be closed at any time."""
    began = time.monotonic()
    try:
        from convert.preflight import prepare
        from convert.production import produce
    except ImportError as error:
        raise ConvertError(f"Converting needs the package {error.name}: pip install -r requirements-cpu.txt.") from error
    try:
        job = yield from prepare(request)
        return (yield from produce(job, began))
    except OSError as error:
        place, reason = error.filename or request.out, error.strerror or error
        raise ConvertError(f"{place}: {reason}. What is done is kept; the same command goes on from there.") from error
