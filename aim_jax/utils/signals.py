"""Signals that are answered at once, even while compiled code runs."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

# 128 + SIGINT, the convention of shells.
EXIT_INTERRUPTED = 130
# EX_TEMPFAIL of sysexits.h: stopped by SIGTERM; the same command resumes.
EXIT_STOPPED = 75
# EX_UNAVAILABLE: another process was lost; the same command resumes from the last checkpoint.
EXIT_LOST = 69
# Seconds for a program to remove its temporary files after Ctrl-C.
PATIENCE = 3.0
# What to do after such an end.
RESUMES = "the same command resumes."

_ending = threading.Lock()  # taken by the thread that ends the process


@contextlib.contextmanager
def heard_at_once(listener: Callable[[int], None]) -> Iterator[None]:
    """Call `listener(number)` in a thread as soon as a signal arrives, during the block.

    Python's own handlers run in the main thread, which cannot run them during a compilation or
    another long call. They are called as well, once it can. Only signals with such a handler are
    heard. Inside a nested block, only the innermost listener is called. Outside the main thread
    nothing is heard, because only that thread may change how signals are handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def listen() -> None:
        while numbers := reader.recv(64):
            for number in numbers:
                listener(number)

    thread = threading.Thread(target=listen, name="aim_jax signals", daemon=True)
    thread.start()
    outer = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(outer)
        writer.close()  # ends the thread
        thread.join()
        reader.close()


def end_at_once(status: int) -> NoReturn:
    """End the process and its worker processes with an exit status, at once.

    The interpreter's clean-up would wait for running computations, and may crash beside them.
    """
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(status)


def end_with_line(line: str, status: int, linger: float = 0.0) -> NoReturn:
    """Print a line to stderr and call `end_at_once`; the first of several threads does.

    Args:
      line: The line.
      status: Exit status.
      linger: Seconds between the line and the end, less than `PATIENCE`.
    """
    if _ending.acquire(timeout=PATIENCE):
        print(line, file=sys.stderr, flush=True)
        time.sleep(linger)
    end_at_once(status)


def end_interrupted() -> NoReturn:
    """End the process and its worker processes with `EXIT_INTERRUPTED`, at once."""
    end_at_once(EXIT_INTERRUPTED)


def end_stopped(number: int, frame: FrameType | None = None) -> NoReturn:
    """Answer a signal to a program that has nothing to save: one line and `EXIT_STOPPED`."""
    del frame
    name = signal.Signals(number).name
    end_with_line(f"{name}: stopped; {RESUMES}", EXIT_STOPPED)


@contextlib.contextmanager
def sigterm_in_one_line() -> Iterator[None]:
    """Answer SIGTERM with `end_stopped` during the block, where no other handler replaces it.

    Inside `ctrl_c_in_one_line` it is answered even while compiled code runs.
    """
    before = signal.signal(signal.SIGTERM, end_stopped)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def ctrl_c_in_one_line() -> Iterator[None]:
    """End the block with one line and `SystemExit(EXIT_INTERRUPTED)` after Ctrl-C.

    The line is printed at once. If the block does not end within `PATIENCE` seconds, or after
    another Ctrl-C, the process ends without it. Errors that follow from the interruption, such as
    those of libraries that are being imported, are not shown.
    """
    timers: list[threading.Timer] = []  # one, after the first Ctrl-C

    def hear(number: int) -> None:
        if number == signal.SIGTERM and signal.getsignal(number) is end_stopped:
            end_stopped(number)
        if number != signal.SIGINT:
            return
        if timers:
            end_interrupted()
        timers.append(threading.Timer(PATIENCE, end_interrupted))
        timers[0].daemon = True
        timers[0].start()
        _say_stopped()

    try:
        with heard_at_once(hear):
            yield
    except BaseException as error:
        if not timers and not isinstance(error, KeyboardInterrupt):
            raise
        if not timers:
            _say_stopped()
        raise SystemExit(EXIT_INTERRUPTED) from None
    finally:
        for timer in timers:
            timer.cancel()
    if timers:
        raise SystemExit(EXIT_INTERRUPTED)


def _say_stopped() -> None:
    start = "\r\x1b[K" if sys.stderr.isatty() else ""  # a progress line may be unfinished
    print(f"{start}stopped by Ctrl-C", file=sys.stderr, flush=True)
