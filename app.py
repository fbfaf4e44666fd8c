"""Chat in the browser: `python app.py`, then `python app.py --help` for the rest.

The composition root, on a desktop and on a Space alike: flags and environment -> Settings -> engine -> page -> launch.
"""

import os
import sys
import threading
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from chat.engine import BadRequest, ChatError, Engine
from chat.flags import add_model_flags, choose
from chat.source import Choice


@dataclass(frozen=True)
class Settings:
    """Where the page is served. Which model, on what, is Choice's."""

    host: str = "127.0.0.1"
    port: int = 7860
    browser: bool = True
    auth: str | None = None  # "name:password"
    open_to_all: bool = False


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> tuple[Settings, Choice]:
    """Flags over environment (CHAT_MODEL, HF_HUB_OFFLINE) over defaults. An unknown flag exits with 2, as argparse does."""
    parser = ArgumentParser(
        prog="python app.py",
        description="Chat with a GKD-distilled Qwen3 model in the browser, on this machine.",
        epilog="Without --model: CHAT_MODEL if set, else the flagship model if it is on disk, else the bundled tiny guide.",
        argument_default=SUPPRESS,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add_model_flags(parser)
    page = parser.add_argument_group("page")
    page.add_argument("--host", help=f"address to listen on; default: {Settings.host}")
    page.add_argument("--port", type=int, help=f"default: {Settings.port}")
    page.add_argument("--no-browser", dest="browser", action="store_false", help="do not open a browser")
    page.add_argument("--auth", metavar="NAME:PASSWORD", help="ask visitors for this; needed for a --host beyond loopback")
    page.add_argument("--no-auth", dest="open_to_all", action="store_true", help="let anybody in who reaches --host")
    given = vars(parser.parse_args(argv))
    settings = Settings(**{f.name: given.pop(f.name) for f in fields(Settings) if f.name in given})
    return settings, choose(given, environment)


class Opening:
    """Opens the engine in a thread while the page is already there."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._state: tuple[str, Engine | None, str | None] = ("Looking for the model", None, None)
        self._shown = ""
        self._thread = threading.Thread(target=self._open, name="opening", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def state(self) -> tuple[str, Engine | None, str | None]:
        """(status line, engine if it is there, error if it will never be)."""
        return self._state

    def close(self) -> None:
        engine = self._state[1]
        if engine:
            engine.close()

    def _report(self, text: str, fraction: float | None) -> None:
        shown = text if fraction is None else f"{text}, {fraction:.0%}"
        self._state = (shown, None, None)
        stage = text.split(",")[0]
        if fraction is not None and sys.stdout.isatty():
            print(f"\r{shown:<78}", end="" if fraction < 1 else "\n", flush=True)
        elif stage != self._shown:
            print(shown, flush=True)
        self._shown = stage

    def _open(self) -> None:
        from chat.source import explain, open_engine

        try:
            engine = open_engine(self._choice, self._report)
        except Exception as exc:  # noqa: BLE001 the edge: the page must say what happened instead of waiting
            self._state = ("", None, explain(exc))
            print(f"\n{explain(exc)}", file=sys.stderr, flush=True)
        else:
            self._state = ("", engine, None)
            print(f"Ready: {engine.about.model} on {engine.about.backend} ({engine.about.detail})", flush=True)


def run(settings: Settings, choice: Choice) -> None:
    """Serve until Ctrl-C. Raises ChatError for what can be known before the page opens."""
    from chat.source import locate
    from chat.ui.environment import quiet

    quiet(choice.data_dir, offline=choice.offline)
    if choice.backend != "scripted":
        locate(choice)  # a wrong path is said at once, in the terminal, not on a page that opens for nothing
    opening = Opening(choice)
    opening.start()

    from chat.answer import ModelState
    from chat.chats import Chats
    from chat.store import Store
    from chat.ui.page import build, serve

    auth = None
    if settings.auth:
        name, colon, password = settings.auth.partition(":")
        if not (name and colon and password):
            raise BadRequest("--auth must read NAME:PASSWORD.")
        auth = [(name, password)]
    choice.data_dir.mkdir(parents=True, exist_ok=True)
    chats = Chats(Store(choice.data_dir / "chats.sqlite3"), lambda: ModelState(*opening.state()))
    try:
        serve(
            build(chats, mode="desktop" if settings.host in ("127.0.0.1", "localhost", "::1") else "shared"),
            host=settings.host,
            port=settings.port,
            browser=settings.browser,
            auth=auth,
            open_to_all=settings.open_to_all,
            on_start=lambda url: print(f"Chat: {url}   (Ctrl-C ends it)", flush=True),
        )
    finally:
        chats.close()
        opening.close()


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(*parse(sys.argv[1:] if argv is None else argv, os.environ))
    except ChatError as exc:
        print(exc, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
