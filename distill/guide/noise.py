"""What fingers do to a question: capitals lost, marks left out, letters swapped. Answers are never touched."""

import random

NEIGHBOURS = dict(zip("abcdefghijklmnopqrstuvwxyz", "svxswdfguhjknbioetryibeztx", strict=True))
OPENINGS = (
    "hi, ",
    "hello, ",
    "hey, ",
    "ok, ",
    "okay, ",
    "so, ",
    "sorry, ",
    "um, ",
    "well, ",
    "and ",
    "please tell me, ",
    "quick question: ",
)
CLOSINGS = (
    " please",
    " thanks",
    ", please",
    " pls",
    ", thank you",
    " :)",
    " exactly",
    " then",
    " in this app",
    " here",
    " by the way",
    ", do you know",
    " for me",
    ", my friend",
    " now",
    " at all",
)


def typo(word: str, rng: random.Random) -> str:
    """One slip in a word of at least four letters: two swapped, one lost, one doubled, or the key beside it."""
    at = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(4)
    if kind == 0:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if kind == 1:
        return word[:at] + word[at + 1 :]
    if kind == 2:
        return word[:at] + word[at] + word[at:]
    return word[:at] + NEIGHBOURS.get(word[at], word[at]) + word[at + 1 :]


def as_typed(text: str, rng: random.Random, *, keep: frozenset[str] = frozenset()) -> str:
    """The question as somebody might type it. Words in `keep` (names, numbers, commands) stay as they are."""

    def kept(word: str) -> bool:
        return word in keep or word.strip(".,!?") in keep

    if rng.random() < 0.08 and len(text) < 80:
        text = rng.choice(OPENINGS) + text
    if rng.random() < 0.08 and not text.endswith((".", "!")):
        text = text.removesuffix("?") + rng.choice(CLOSINGS) + ("?" if text.endswith("?") else "")
    if rng.random() < 0.14:
        words = text.split(" ")
        able = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha() and not kept(word)]
        if able:
            i = rng.choice(able)
            words[i] = typo(words[i], rng)
        text = " ".join(words)
    style = rng.random()
    if style < 0.5:
        text = text[:1].upper() + text[1:]
    elif style < 0.53:
        text = " ".join(word if kept(word) else word.upper() for word in text.split(" "))
    if not text.endswith(("?", ".", "!", ":)")) and rng.random() < 0.2:
        text += rng.choice((".", "!", "...", " ?"))
    elif text.endswith("?") and rng.random() < 0.35:
        text = text.removesuffix("?")
    return text
