"""The colours of page.css can be read by everybody (WCAG AA). `pytest tests/chat/test_page_look.py`"""

import re
from pathlib import Path

import pytest

CSS = (Path(__file__).parents[2] / "chat" / "ui" / "page.css").read_text("utf-8")
GROUNDS = ("ground", "raised", "sunk", "code", "mine")
INKS = ("ink", "soft", "accent", "warn", "bad", "k", "s", "c", "n", "f")


def colours(selector):
    block = re.search(rf"^{re.escape(selector)} \{{(.*?)^\}}", CSS, re.M | re.S)[1]
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("selector", [":root", ".dark"])
def test_text_stands_out_from_every_ground(selector):
    found = colours(selector)
    low = {
        (ink, ground): round(contrast(found[ink], found[ground]), 2)
        for ink in INKS
        for ground in GROUNDS
        if contrast(found[ink], found[ground]) < 4.5
    }
    assert not low
    assert contrast(found["accent-ink"], found["accent"]) >= 4.5
    assert contrast(found["ink"], found["mark"]) >= 4.5


def test_light_and_dark_name_the_same_colours():
    assert colours(":root").keys() == colours(".dark").keys()


def test_nothing_in_the_style_is_fetched():
    assert not re.search(r"url\((?!\"data:)", CSS) and "@import" not in CSS and "@font-face" not in CSS
