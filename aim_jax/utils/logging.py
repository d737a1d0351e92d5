"""Messages and progress lines on stderr."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

import jax

from aim_jax.utils.names import printable

# Most seconds without a line from a run that works.
QUIET_SECONDS = 30.0


class Progress:
    """Progress line of a loop over a known number of items: count, rate and ETA.

    The first report gives the time of the first items, which includes compilation. Rate and ETA
    follow from the second report on, and leave that time out.

    Args:
      what: name of the activity, at the start of the line.
      unit: unit of the items.
      done: items completed by an earlier, interrupted run; the rate excludes them.
    """

    def __init__(self, what: str, unit: str = "images", done: int = 0):
        self._what = what
        self._unit = unit
        self._start = time.perf_counter()
        self._before = done
        self._first: tuple[int, float] | None = None  # items and time of the first report
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Report that `done` of `total` items are complete.

        Prints at most every 0.5 s on a terminal and every 10 s elsewhere, and always at the end.
        """
        now = time.perf_counter()
        is_terminal = sys.stderr.isatty()
        if done < total and (not done or now - self._last < (0.5 if is_terminal else 10)):
            if done and self._first is None:
                self._first = done, now
            return
        self._last = now
        line = f"{self._what}: {done}/{total} {self._unit}  {self._speed(done, total, now)}"
        end = "\n" if done >= total or not is_terminal else ""
        print(("\r\x1b[K" if is_terminal else "") + line, end=end, file=sys.stderr, flush=True)

    def _speed(self, done: int, total: int, now: float) -> str:
        """Return rate and ETA, or the time so far if this is the first report."""
        if self._first is None:
            self._first = done, now
            passed = duration(now - self._start)
            return f"in {passed}" if done >= total else f"first {done - self._before} in {passed}"
        items, since = self._first
        rate = (done - items) / max(now - since, 1e-9)
        if done >= total:
            return f"{rate:.1f}/s  in {duration(now - self._start)}"
        return f"{rate:.1f}/s  ETA {duration((total - done) / max(rate, 1e-9))}"


@contextlib.contextmanager
def reminding(what: str, seconds: float = QUIET_SECONDS) -> Iterator[None]:
    """Print `what` with the time so far every `seconds` during the block, on process 0 only."""
    start = time.perf_counter()
    ended = threading.Event()

    def remind() -> None:
        while not ended.wait(seconds):
            say(f"{what}: {duration(time.perf_counter() - start)} so far")

    thread = threading.Thread(target=remind, name="aim_jax reminder", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def say(message: str) -> None:
    """Print a line to stderr on process 0 only, without control characters."""
    if jax.process_index() == 0:
        print(printable(message), file=sys.stderr, flush=True)
