"""What is said while a command runs: through logging, and by itself nowhere."""

from __future__ import annotations

import io
import logging
import time

import pytest
from rich.console import Console

from layercut import progress
from layercut.progress import bar, duration, enter_stage, leave_stage, say, shown, warn, whole_run


@pytest.fixture
def stderr(monkeypatch):
    """Not a terminal, and a line about progress every 20 ms."""
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream))
    monkeypatch.setattr(progress, "EVERY", 0.02)
    monkeypatch.setattr(progress, "MEASURE_EVERY", 0.01)
    return stream


def test_a_library_says_nothing_and_its_messages_are_log_records(capfd, caplog, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.01)
    warn("search", "words")
    with bar("searching", 2) as advance:
        time.sleep(0.03)
        advance(1)
    assert capfd.readouterr() == ("", "")
    caplog.set_level(logging.INFO, logger="layercut")
    caplog.clear()
    say("search", "100 % of it")
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage(), record.stage) == (
        "layercut", "INFO", "100 % of it", "search",
    )  # fmt: skip


def test_a_message_is_one_line_with_its_time_whatever_is_in_it(stderr):
    words = "[bold]x[/bold] " + "long " * 60
    with shown():
        say("search", f"{words}\nfile \x1b[31mred\x07\r")
    (line,) = stderr.getvalue().splitlines()
    assert line[20:] == f"   search  {words}\\x0afile \\x1b[31mred\\x07\\x0d"
    time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")


@pytest.mark.parametrize(("quiet", "seen"), [(False, ["said", "warned"]), (True, ["warned"])])
def test_how_much_is_seen(quiet, seen, stderr):
    with shown(quiet=quiet):
        say("stage", "said")
        warn("stage", "warned")
    say("stage", "afterwards")
    assert [line.split()[-1] for line in stderr.getvalue().splitlines()] == seen


@pytest.mark.parametrize(
    ("total", "measure", "line"),
    [
        (5, None, "searching: 40% (2 of 5), 0 s so far, about 0 s left, loss 1.5\n"),
        (4000, lambda: 3000, "searching: 75% (3,000 of 4,000)"),
        (None, None, "searching: 0 s so far, loss 1.5\n"),
    ],
)
def test_long_work_says_how_far_it_is(total, measure, line, stderr):
    with shown(), bar("searching", total, measure) as advance:
        advance(2, "loss 1.5")
        time.sleep(0.1)
    assert f"progress  {line}" in stderr.getvalue()


def test_durations():
    found = [duration(seconds) for seconds in (0.4, 59.6, 80, 3599, 7325)]
    assert found == ["0 s", "1 min 0 s", "1 min 20 s", "59 min 59 s", "2 h 2 min"]


def test_a_terminal_gets_a_bar_and_no_lines_about_it(stderr, monkeypatch):
    monkeypatch.setattr(progress, "console", Console(file=stderr, force_terminal=True, width=100))
    with shown(), bar("searching", 4) as advance:
        advance(1, "loss [2]")
        say("search", "a line above")
        time.sleep(0.1)
    assert all(words in stderr.getvalue() for words in ("searching", "a line above", "25%"))
    assert "so far" not in stderr.getvalue()


def test_a_notebook_gets_a_bar_of_tqdm_or_the_callback(capfd, monkeypatch):
    monkeypatch.setattr(progress, "console", Console(force_jupyter=True))
    with bar("searching", 4) as advance:
        time.sleep(0.11)  # what tqdm waits between two drawings
        advance(3, "loss 1.5")
    seen = capfd.readouterr().err
    assert "searching" in seen
    assert "3/4" in seen
    taken = []
    with progress.progress_to(lambda *what: taken.append(what)), bar("searching", 4) as advance:
        advance(4)
    assert len(taken) == 2
    assert capfd.readouterr().err == ""


def test_progress_tells_how_far_the_whole_run_is(stderr, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    made = []

    def plan():
        made.append("once")
        return {"search": 3.0, "heal": 6.0, "eval": 1.0}

    with whole_run(plan):
        leave_stage("text")  # which was found: no plan is made before a stage runs
        assert not made
        enter_stage("search")
        assert progress._whole.words == "stage 1 of 3"
        now[0] += 30
        leave_stage("search")
        enter_stage("cut")  # which is not planned
        assert progress._whole.words == ""
        leave_stage("cut")
        enter_stage("heal")
        now[0] += 30
        # ten seconds for each that is planned: 30 of 60 are left, and 10 of the last stage
        assert progress._whole.words == "stage 2 of 3, 60% of the run, about 40 s left of it"
        assert made == ["once"]
    with whole_run(plan):
        enter_stage("search")
        now[0] += 30
        leave_stage("search")
        leave_stage("heal")  # it was there
        enter_stage("eval")
        assert progress._whole.words == "stage 3 of 3, 75% of the run, about 10 s left of it"
