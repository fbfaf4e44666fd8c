"""The texts of the page: every language is complete, and nothing is asked for that is not there."""

import re
from pathlib import Path
from string import Formatter

import pytest

from chat.ui.words import EN, LANGUAGES, words

UI = Path(__file__).parents[2] / "chat" / "ui"


def places(text):
    return {name for _, name, _, _ in Formatter().parse(text) if name}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_has_every_text_with_the_same_places(language):
    assert LANGUAGES[language].keys() == EN.keys()
    for name, text in LANGUAGES[language].items():
        assert text.strip() and places(text) == places(EN[name]), name


def test_every_text_that_is_asked_for_is_there():
    asked = set()
    for path in UI.glob("*.py"):
        asked |= set(re.findall(r'(?:words|say)(?:\["|\(")(\w+)"', path.read_text("utf-8")))
    asked |= set(re.findall(r"\bsay\.(\w+)", (UI / "page.js").read_text("utf-8")))
    assert asked <= EN.keys() | {"mode"}, asked - EN.keys()


def test_an_unknown_language_is_answered_in_english():
    assert words("xx-YY") is EN and words("") is EN and words("de-CH") is LANGUAGES["de"]
