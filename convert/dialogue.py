"""Chat-formatted text: conversations from convert/texts or a user's file, rendered by the model's own template."""

import json
import unicodedata
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

import numpy as np

from convert.errors import ConvertError

TEXTS = Path(__file__).parent / "texts"
EVALUATION, CALIBRATION = TEXTS / "evaluation.jsonl", TEXTS / "calibration.jsonl"

Conversation = list[dict[str, str]]


class Template:
    """A chat template, run as transformers runs it: sandboxed, blocks trimmed."""

    def __init__(self, text: str) -> None:
        """Raises ConvertError where the text is not a template."""
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._error = TemplateError
        try:
            self._compiled = environment.from_string(text)
        except TemplateError as error:
            raise ConvertError(f"The chat template is broken: {error}.") from error

    def render(self, messages: Conversation, *, ask: bool = False) -> str:
        """`ask` adds the beginning of the assistant's next turn."""
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=ask)
        except (self._error, TypeError, ValueError) as error:
            raise ConvertError(f"The chat template cannot render a plain conversation: {error}.") from error


def read_conversations(path: Path) -> list[Conversation]:
    """JSON lines of {"messages": [...]}, or any other text as paragraphs, each of them one answer to nothing much.

    Raises ConvertError where the file cannot be read or holds no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(f"{path} cannot be read as UTF-8 text: {error}.") from error
    if path.suffix == ".jsonl":
        try:
            found = [
                [{"role": turn["role"], "content": turn["content"]} for turn in json.loads(line)["messages"]]
                for line in text.splitlines()
                if line.strip()
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ConvertError(f'{path} is not JSON lines of {{"messages": [{{"role", "content"}}]}}: {error!r}.') from error
    else:
        pieces = [piece.strip() for piece in text.replace("\r\n", "\n").split("\n\n") if piece.strip()]
        found = [
            [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "\n\n".join(pieces[i : i + 8])}]
            for i in range(0, len(pieces), 8)
        ]
    if not found:
        raise ConvertError(f"{path} holds no text.")
    return found


def windows(
    encode: Callable[[str], list[int]], template: str, conversations: Iterable[Conversation], size: int, most: int
) -> list[np.ndarray]:
    """The conversations, rendered, encoded (control tokens recognised) and cut into at most `most` windows of `size` ids.

    Raises ConvertError where the text does not fill one window.
    """
    rendered, ids = Template(template), []
    for conversation in conversations:
        text = unicodedata.normalize("NFC", rendered.render(conversation))
        ids += encode(text)
        if len(ids) >= size * most:
            break
    count = min(most, len(ids) // size)
    if not count:
        raise ConvertError(f"The text has {len(ids)} tokens; measuring needs at least {size}.")
    return [np.array(ids[i * size : (i + 1) * size]) for i in range(count)]
