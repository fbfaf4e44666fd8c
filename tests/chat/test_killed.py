"""Killed in the middle of writing, the program loses nothing that it called finished. 200 times: `python tests/killing.py`."""

from pathlib import Path

from tests.killing import CHATS, kill


def test_ten_kills_of_the_whole_program_lose_no_finished_message(tmp_path: Path) -> None:
    tally = kill(10, tmp_path)
    assert tally.kills == 10 and not tally.wrong, tally.wrong
    assert tally.finished > 2 * CHATS and tally.partial > 0, "some had ended, and some were in the middle"
