"""The texts of the page: every language is complete, and nothing is asked for that is not there."""

import ast
import re
from pathlib import Path
from string import Formatter

import pytest

from chat.engine import BadRequest, ContextOverflow
from chat.ui import errors
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
    for path in UI.glob("*.js"):
        asked |= set(re.findall(r"\bsay\.(\w+)", path.read_text("utf-8")))
    assert asked <= EN.keys() | {"mode"}, asked - EN.keys()


def test_an_unknown_language_is_answered_in_english():
    assert words("xx-YY") is EN and words("") is EN and words("de-CH") is LANGUAGES["de"]


def raised():
    """Every text that this program raises as an error of its own, as it stands at the raise."""
    texts = set()
    for path in [*(UI.parent).glob("*.py"), *UI.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                texts |= {part.value for one in node.args for part in ast.walk(one) if isinstance(part, ast.Constant)}
    return texts


@pytest.mark.parametrize("language", errors.LANGUAGES)
def test_every_translated_error_is_one_that_is_raised_with_the_same_places(language):
    known, table = raised(), errors.LANGUAGES[language]
    assert table.keys() <= known, table.keys() - known
    for text, translated in table.items():
        assert translated.strip() and places(text) == places(translated), text


def test_an_error_is_told_in_the_browsers_language_or_in_english():
    error = ContextOverflow(5000, 4096)
    assert errors.told(error, "de-AT,de;q=0.9").startswith("Das Gespräch braucht 5,000 Tokens")
    assert errors.told(error, "fr") == str(error) == errors.told(error, None)
    assert errors.told(BadRequest("no {such} sentence"), "de") == "no {such} sentence"
