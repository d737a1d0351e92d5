"""Lines for people: messages, progress with rate and time left."""

import sys
import time

import jax


class Progress:
    """One line that follows a loop over a known number of items: share, rate, time left.

    Args:
      what: is going on. unit: of what is counted. done: items of an earlier, interrupted run.
    """

    def __init__(self, what: str, unit: str = "images", done: int = 0):
        self._what, self._unit, self._start = what, unit, time.perf_counter()
        self._before = done
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Shows that `done` of `total` are finished, at most twice a second on a terminal."""
        now = time.perf_counter()
        terminal = sys.stderr.isatty()
        if done < total and (not done or now - self._last < (0.5 if terminal else 10)):
            return
        self._last = now
        rate = (done - self._before) / max(now - self._start, 1e-9)
        line = (
            f"{self._what}: {done}/{total} {self._unit}  {rate:.1f}/s  "
            f"ETA {duration((total - done) / max(rate, 1e-9))}"
        )
        end = "\n" if done >= total or not terminal else ""
        print(("\r\x1b[K" if terminal else "") + line, end=end, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def say(message: str) -> None:
    """Prints a line on the first process."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)
