"""The optional corpora: questions of other people for our topics. Without a folder there are none, and the rest still works.

Only questions are taken; every answer is the project's own. Held-out parts (`test`, `oos_test`) and rows that name another
device ("olly") are left out.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

USED = ("ms_chitchat", "clinc150", "nlu_evaluation_data")
HELD_OUT = ("test", "oos_test")


def rows(folder: Path, source: str) -> Iterator[dict]:
    with gzip.open(folder / source / f"{source}.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def questions(folder: Path | None) -> tuple[Mapping[int, list[str]], Mapping[str, list[str]], Mapping[str, list[str]]]:
    """Questions by chit-chat group, by CLINC150 intent and by NLU intent, without repeats, in the files' order."""
    found: tuple[dict, dict, dict] = (defaultdict(dict), defaultdict(dict), defaultdict(dict))
    if folder is not None:
        for row in rows(folder, "ms_chitchat"):
            found[0][row["group"]][row["turns"][0]["content"]] = None
        for row in rows(folder, "clinc150"):
            if row["split"] not in HELD_OUT:
                found[1][row["intent"]][row["turns"][0]["content"]] = None
        for row in rows(folder, "nlu_evaluation_data"):
            text = row["turns"][0]["content"]
            if "olly" not in text.lower():
                found[2][row["intent"]][text] = None
    chitchat, clinc, nlu = ({key: list(texts) for key, texts in part.items()} for part in found)
    return chitchat, clinc, nlu
