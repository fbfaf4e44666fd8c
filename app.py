"""Chat in the browser: `python app.py`, then `python app.py --help` for the rest.

The composition root, on a desktop and on a Space alike: flags and environment -> Settings -> engine -> page -> launch.
"""

import os
import signal
import sys
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from chat.engine import BadRequest, ChatError
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


def run(settings: Settings, choice: Choice) -> None:
    """Serve until Ctrl-C. Raises ChatError for what can be known before the page opens."""
    from chat.shelf import Shelf
    from chat.source import locate
    from chat.ui.environment import quiet

    quiet(choice.data_dir, offline=choice.offline)
    if choice.backend != "scripted":
        locate(choice)  # a wrong path is said at once, in the terminal, not on a page that opens for nothing
    shelf = Shelf(choice, lambda line: print(line, flush=True))
    shelf.start()

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
    chats = Chats(Store(choice.data_dir / "chats.sqlite3"), lambda: ModelState(*shelf.state()))
    shelf.watch(chats.busy)
    try:
        serve(
            build(chats, mode="desktop" if settings.host in ("127.0.0.1", "localhost", "::1") else "shared", models=shelf),
            host=settings.host,
            port=settings.port,
            browser=settings.browser,
            auth=auth,
            open_to_all=settings.open_to_all,
            on_start=lambda url: print(f"Chat: {url}   (Ctrl-C ends it)", flush=True),
        )
    finally:
        chats.close()
        shelf.close()


def main(argv: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager ends it as Ctrl-C does, nothing is lost
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
