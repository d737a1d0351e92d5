"""Lines of a run: rate and ETA leave compilation out, and something is said every half minute."""

import re
import time

import jax
import pytest

from aim_jax.utils import logging
from aim_jax.utils.logging import Progress, reminding


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(logging.time, "perf_counter", lambda: now[0])
    return now


def test_a_run_tells_its_rate_without_compilation(clock, capsys):
    progress = Progress("sampling")
    for done, passed in ((10, 60), (20, 11), (30, 11), (40, 11)):
        clock[0] += passed  # the first ten include a minute of compilation
        progress(done, 40)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "sampling: 10/40 images  first 10 in 1:00",
        "sampling: 20/40 images  0.9/s  ETA 0:22",
        "sampling: 30/40 images  0.9/s  ETA 0:11",
        "sampling: 40/40 images  0.9/s  in 1:33",
    ]


def test_a_run_tells_its_time_if_there_is_one_report_only(clock, capsys):
    progress = Progress("sampling")
    clock[0] += 61
    progress(8, 8)
    assert capsys.readouterr().err == "sampling: 8/8 images  in 1:01\n"


def test_a_resumed_run_tells_the_rate_of_its_own_items(clock, capsys):
    progress = Progress("encoding", done=90)
    for done in (95, 97):
        clock[0] += 20
        progress(done, 100)
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("95/100 images  first 5 in 0:20")
    assert second.endswith("97/100 images  0.1/s  ETA 0:30")


def test_a_run_tells_that_a_long_call_is_under_way(capsys):
    jax.process_index()  # starts JAX, which takes a while
    with reminding("writing", seconds=0.05):
        time.sleep(0.5)
    said = capsys.readouterr().err.splitlines()
    assert len(said) >= 2
    assert all(re.fullmatch(r"writing: 0:0\d so far", line) for line in said), said
    with reminding("writing", seconds=30):
        pass
    assert capsys.readouterr().err == ""
