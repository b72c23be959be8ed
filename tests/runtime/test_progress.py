"""utils.runtime.progress: what a bar writes on a terminal, and into a file."""

from __future__ import annotations

import io
import re

import pytest

from utils.runtime.progress import about, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [60, 200])
def test_a_bar_fits_the_terminal_and_eighty_columns(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    bar = progress_bar(range(10_000), "epoch 100/100", unit="batch", mininterval=0)
    for _ in bar:
        bar.set_postfix_str("loss 0.4321, run 12:31:10 left", refresh=False)
        if bar.n > 50:
            break
    bar.close()
    shown = stderr.getvalue().strip().split("\r")
    assert any("epoch 100/100" in text for text in shown)
    assert max(map(len, shown)) <= min(80, columns - 1)


def test_a_file_gets_seldom_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for _ in progress_bar(range(100), "encoding", unit="image", miniters=1):
        now[0] += 1
    lines = stderr.getvalue().splitlines()
    assert 3 <= len(lines) <= 4 and all(re.match(r"encoding +\d+% \d+/100 \[", line) for line in lines)
    assert "\r" not in stderr.getvalue()


def test_short_work_writes_nothing_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    for _ in progress_bar(range(100), "encoding", unit="image"):
        pass
    assert stderr.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "less than a minute"),
        (59, "less than a minute"),
        (60, "about 1 min"),
        (3570, "about 1 h"),
        (7800, "about 2 h 10 min"),
        (86460, "about 24 h"),
    ],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert about(seconds) == words
