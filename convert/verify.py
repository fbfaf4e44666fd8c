"""Is the file right? Its tokenizer against the model's own, its predictions against the weights it was made from."""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from convert.dialogue import EVALUATION, read_conversations, windows
from convert.divergence import Divergence, compare
from convert.errors import ConvertError, Refused
from convert.llama import Model
from convert.parity import Parity, check_parity
from convert.reference import Reference
from convert.source import Source
from convert.vocabulary import Vocabulary


@dataclass(frozen=True)
class Level:
    strings: int  # random ones, beside the hard ones
    window: int  # tokens
    windows: int


LEVELS = {"quick": Level(2_000, 256, 8), "full": Level(20_000, 512, 56)}
# Mean KLD above which a file is not merely coarse but wrong: the types that keep nearly everything have no excuse.
WRONG = {"F32": 0.01, "F16": 0.01, "BF16": 0.01, "Q8_0": 0.1, "Q6_K": 0.5}


@dataclass(frozen=True)
class Verification:
    level: str
    text: str  # name of the file that was measured on
    base: str  # what was compared with
    parity: Parity | None
    divergence: Divergence

    def measured(self) -> dict[str, int | float]:
        """In short, for the file's own metadata; three digits, which the last bit of a sum cannot change."""
        found = self.divergence
        return {
            "convert.kld.tokens": found.tokens,
            "convert.kld.mean": float(f"{found.kld_mean:.3g}"),
            "convert.kld.p999": float(f"{found.kld_p999:.3g}"),
            "convert.same_top": float(f"{found.same_top:.4f}"),
        }

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_level(name: str) -> Level | None:
    """None for "none"."""
    if name == "none":
        return None
    try:
        return LEVELS[name]
    except KeyError:
        raise ConvertError(f"--verify {name} is unknown; choose none, {' or '.join(LEVELS)}.") from None


def judge(quant: str, found: Divergence, most: float | None) -> None:
    """Raises Refused for a file that cannot be right, or is worse than the user allows."""
    if not isfinite(found.kld_mean):
        raise Refused(f"The {quant} file predicts no numbers (KLD {found.kld_mean}); it was not given its name.")
    limit = most if most is not None else WRONG.get(quant)
    if limit is not None and found.kld_mean > limit:
        raise Refused(
            f"The {quant} file is too far from its source: mean KLD {found.kld_mean:.4f}, at most {limit:g} is allowed. "
            "It was not given its name; choose a type with more bits, or raise --max-kld."
        )


def examine(
    files: dict[str, Path],
    source: Source,
    vocabulary: Vocabulary,
    tokenizer: Path,
    *,
    level: str,
    threads: int,
    text: Path | None = None,
    most: float | None = None,
    base: Path | None = None,
) -> Generator[float, None, list[Verification]]:
    """Check files made from one source; yields 0 to 1, returns one Verification per file, in order.

    `files`: type -> path. `base`: compare with this GGUF instead of the source's weights. Raises Refused for a file that
    is wrong.
    """
    wanted = LEVELS[level]
    size = min(wanted.window, source.shape.positions)
    parities, opened = [], []
    text = text or EVALUATION
    with ExitStack() as stack:
        for path in files.values():
            with Model(path, vocabulary_only=True) as model:
                parities.append(check_parity(model, tokenizer, vocabulary, wanted.strings))
                cut = windows(recognising(model), vocabulary.template, read_conversations(text), size, wanted.windows)
        for path in files.values():
            opened.append(stack.enter_context(Model(path, context=size, threads=threads)))
        truth: Reference | Model = Reference(source)
        if base:
            truth = stack.enter_context(Model(base, context=size, threads=threads))
        found: Sequence[Divergence] = yield from compare(truth, opened, cut)
    for quant, divergence in zip(files, found, strict=True):
        judge(quant, divergence, most)
    against = base.name if base else "the source's weights in float32"
    return [
        Verification(level, text.name, against, parity, divergence) for parity, divergence in zip(parities, found, strict=True)
    ]


def recognising(model: Model) -> Callable[[str], list[int]]:
    return lambda text: model.tokenize(text, special=True)
