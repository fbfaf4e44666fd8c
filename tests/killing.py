"""The whole program, killed with -9 while it writes, again and again: `python tests/killing.py [--times 200]`.

Each time six conversations are being answered by the scripted engine. What the page was told is finished must be in the
file afterwards, to the letter, and the file must open. The program is forked from a process that has imported Gradio
already, which saves seconds a time; what runs and dies is `app.main` with its own threads, sockets and files.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

CHATS = 6
LANGUAGE = {"language": "en"}


@dataclass
class Tally:
    """What became of the answers: `finished` are those the page was told of."""

    kills: int = 0
    finished: int = 0
    lost: int = 0
    partial: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def program(data_dir: str, log: str) -> None:
    """The child: `python app.py --backend scripted`, telling its address to a file."""
    sys.stdout = sys.stderr = Path(log).open("w", buffering=1, encoding="utf-8")  # noqa: SIM115 until it is killed
    import app

    os._exit(app.main(["--backend", "scripted", "--no-browser", "--port", "0", "--data-dir", data_dir]))


class Page:
    """Asks as the page does."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, path: str, **body) -> dict:
        request = urllib.request.Request(
            f"{self._url}/chat/{path}", json.dumps(LANGUAGE | body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)

    def turns(self, chat: str) -> list[list]:
        return self.ask("tail", chat=chat, have={}, query="", node=0, text=0, thought=None)["turns"]

    def finished(self, chat: str) -> dict[int, str]:
        """Answers that are said to be whole, with their text."""
        whole = [node for node, key in self.turns(chat) if ".whole." in key]
        return {
            int(node): one["text"] for node, one in self.ask("turns", chat=chat, ids=whole).items() if ".whole." in one["key"]
        }


def started(context, folder: Path):
    """(process, Page) of a program that serves."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    process = context.Process(target=program, args=(str(folder), str(log)), daemon=True)
    process.start()
    end = time.monotonic() + 120
    while time.monotonic() < end:
        told = log.read_text(encoding="utf-8") if log.exists() else ""
        if found := re.search(r"Chat: (http\S+)", told):
            return process, Page(found[1])
        if not process.is_alive():
            break
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"the program did not start: {told}")


def kill(times: int, folder: Path, seed: int = 0) -> Tally:
    from chat.store import Store

    os.environ.update({"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"})
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    context.set_forkserver_preload(["app", "chat.ui.page"])
    rng, tally, begun, told = random.Random(seed), Tally(), time.monotonic(), {}
    questions = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": " ".join(f"word{number}" for number in range(8 + 14 * chat))},
                    {"role": "assistant", "content": "once"},
                ]
            }
        )
        for chat in range(CHATS)
    ]
    chats: list[str] = []
    for _ in range(times):
        process, page = started(context, folder)
        if not chats:
            page.ask("import", text="\n".join(questions))
            chats = re.findall(
                r'data-chat="(\w+)"', page.ask("tail", chat="", have={}, query="", node=0, text=0, thought=None)["list"]
            )
            assert len(chats) == CHATS
        for chat in chats:
            page.ask("act", do="regenerate", chat=chat, node=page.turns(chat)[-1][0])
        time.sleep(rng.random() * 2.5)
        for chat in chats:
            told |= {(chat, node): text for node, text in page.finished(chat).items()}
        process.kill()
        process.join()
        tally.kills += 1
        store = Store(folder / "chats.sqlite3")
        kept = {(chat, node.id): node for chat in chats for node in store.tree(chat)}
        tally.partial = sum(node.state == "partial" for node in kept.values())
        tally.wrong += [f"{node.id} is {node.state}" for node in kept.values() if node.state not in ("whole", "partial")]
        for place, text in told.items():
            if place not in kept or kept[place].state != "whole" or kept[place].content != text:
                tally.lost += 1
                tally.wrong.append(f"{place} is lost")
        store.close()
    tally.finished, tally.seconds = len(told), time.monotonic() - begun
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = kill(options.times, Path(folder))
    print(
        f"{tally.kills} x kill -9 of the whole program while it wrote {CHATS} answers: {tally.finished} messages were told to "
        f"be finished, {tally.lost} lost; {tally.partial} kept as partial; the file opened each time ({tally.seconds:.0f} s)"
    )
    assert not tally.wrong, tally.wrong


if __name__ == "__main__":
    main()
