"""Ending a program: one line at once and a status that says so, whatever it is doing."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from aim_jax.utils import signals
from aim_jax.utils.signals import EXIT_INTERRUPTED, ctrl_c_in_one_line, heard_at_once

# A call that lets other threads run, but no handler of the main thread, like a compilation.
LONG_CALL = """
import hashlib, sys
from aim_jax.utils.signals import ctrl_c_in_one_line
with ctrl_c_in_one_line():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)
"""


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)  # the handler runs here


def test_ending_is_one_line_and_a_status(capsys):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended, ctrl_c_in_one_line():
        press_ctrl_c()
    assert ended.value.code == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"
    assert signal.getsignal(signal.SIGINT) is handler


def test_ending_hides_what_libraries_make_of_it(capsys):
    """An extension that is interrupted while it is imported fails in its own ways."""
    with pytest.raises(SystemExit) as ended, ctrl_c_in_one_line():
        try:
            press_ctrl_c()
        except KeyboardInterrupt:
            raise ImportError("cannot load an extension") from None
    assert ended.value.code == EXIT_INTERRUPTED
    ignored = contextlib.suppress(KeyboardInterrupt)
    with pytest.raises(SystemExit) as ended, ctrl_c_in_one_line(), ignored:
        press_ctrl_c()
    assert ended.value.code == EXIT_INTERRUPTED
    assert capsys.readouterr().err == 2 * "stopped by Ctrl-C\n"


def test_ending_twice_in_nested_blocks_says_so_once(capsys):
    with pytest.raises(SystemExit) as ended, ctrl_c_in_one_line(), ctrl_c_in_one_line():
        press_ctrl_c()
    assert ended.value.code == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


def test_other_errors_pass_as_they_are():
    with pytest.raises(ImportError, match="no module"), ctrl_c_in_one_line():
        raise ImportError("no module")


@pytest.mark.parametrize("presses", [1, 2])
def test_ending_of_a_long_call_of_compiled_code(presses):
    """The main thread cannot answer. The line comes at once, the end after a few seconds."""
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_CALL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "stopped by Ctrl-C\n"
    if presses == 2:
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED and said == ""


def test_signals_are_heard_by_the_innermost_block():
    heard = []
    handler = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with heard_at_once(lambda number: heard.append(("outer", number))):
            with heard_at_once(lambda number: heard.append(("inner", number))):
                os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert heard == [("inner", signal.SIGUSR1), ("outer", signal.SIGUSR1)]
    assert signals.signal.set_wakeup_fd(-1) == -1
