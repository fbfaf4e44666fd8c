"""How fast a model was here is remembered by its file's bytes, and a damaged memory costs nothing but itself."""

from pathlib import Path

import pytest

from chat.engine import Stats
from chat.models import Speed
from chat.speeds import Speeds


def stats(*, prompt=100, reused=0, completion=50, read=40.0, write=14.0) -> Stats:
    return Stats(prompt, reused, completion, 0.5, read, write, seed=1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.gguf"
    path.write_bytes(bytes(range(256)) * 1000)
    return path


def test_the_median_of_real_answers_is_remembered_over_a_restart(file: Path, tmp_path: Path) -> None:
    speeds = Speeds(tmp_path / "speeds.json")
    assert speeds.of(file, "llama.cpp") == Speed()
    for write in (14.0, 2.0, 15.0):
        speeds.learn(file, "llama.cpp", stats(write=write))
    assert Speeds(tmp_path / "speeds.json").of(file, "llama.cpp") == Speed(40.0, 14.0)
    assert speeds.of(file, "cpu") == Speed(), "another engine has its own speed"


def test_short_reads_and_answers_say_nothing(file: Path, tmp_path: Path) -> None:
    speeds = Speeds(tmp_path / "speeds.json")
    speeds.learn(file, "llama.cpp", stats(reused=90, completion=3))
    assert speeds.of(file, "llama.cpp") == Speed() and not (tmp_path / "speeds.json").exists()
    speeds.learn(file, "llama.cpp", stats(reused=90))
    assert speeds.of(file, "llama.cpp") == Speed(None, 14.0)


def test_a_file_is_known_by_its_bytes(file: Path, tmp_path: Path) -> None:
    speeds = Speeds(tmp_path / "speeds.json")
    speeds.learn(file, "llama.cpp", stats())
    moved = file.rename(tmp_path / "b.gguf")
    assert speeds.of(moved, "llama.cpp") == Speed(40.0, 14.0)
    moved.write_bytes(moved.read_bytes()[::-1])
    assert speeds.of(moved, "llama.cpp") == Speed()


@pytest.mark.parametrize("text", ["", "[]", '{"x": 1}', '{"x": {"read": ["fast"], "write": []}}'])
def test_a_damaged_memory_begins_anew(file: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "speeds.json").write_text(text, encoding="utf-8")
    speeds = Speeds(tmp_path / "speeds.json")
    speeds.learn(file, "llama.cpp", stats())
    assert speeds.of(file, "llama.cpp") == Speed(40.0, 14.0)


def test_a_folder_that_cannot_be_written_costs_only_the_memory(file: Path, tmp_path: Path) -> None:
    speeds = Speeds(tmp_path / "missing" / "speeds.json")
    speeds.learn(file, "llama.cpp", stats())
    assert speeds.of(file, "llama.cpp") == Speed(40.0, 14.0)
