"""The same question in other words: another frame ("how do i ..." -> "what's the way to ..."), other words of like meaning.

The lists are in words/rephrase.yaml. They are rough on purpose: people write like that, and answers are never touched.
"""

import random
from collections.abc import Mapping


def rephrase(text: str, rng: random.Random, lists: Mapping, keep: frozenset[str] = frozenset()) -> str:
    """The question with another frame (half of the time, where one fits) and a few words exchanged; `keep` stays."""
    frames, words = lists["frames"], lists["words"]
    mark = text[-1:] if text.endswith(("?", "!", ".")) else ""
    body = text.removesuffix(mark) if mark else text
    if rng.random() < 0.5:
        begin = next((one for one in frames if body.lower().startswith(one)), None)
        if begin is not None and len(body) > len(begin) + 1:
            body = rng.choice(frames[begin]).replace("{x}", body[len(begin) :])
    parts = body.split(" ")
    for i, word in enumerate(parts):
        if word.lower() in words and word not in keep and rng.random() < 0.25:
            parts[i] = rng.choice(words[word.lower()])
    if len(parts) > 5 and rng.random() < 0.06:
        gone = rng.randrange(1, len(parts) - 1)
        if parts[gone] not in keep:
            del parts[gone]
    return " ".join(parts) + mark
