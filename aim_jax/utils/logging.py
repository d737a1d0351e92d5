"""Messages and progress lines on stderr."""

import sys
import time

import jax


class Progress:
    """Progress line of a loop over a known number of items: count, rate and ETA.

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
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Report that `done` of `total` items are complete.

        Prints at most every 0.5 s on a terminal and every 10 s elsewhere, and always at the end.
        """
        now = time.perf_counter()
        is_terminal = sys.stderr.isatty()
        if done < total and (not done or now - self._last < (0.5 if is_terminal else 10)):
            return
        self._last = now
        rate = (done - self._before) / max(now - self._start, 1e-9)
        line = (
            f"{self._what}: {done}/{total} {self._unit}  {rate:.1f}/s  "
            f"ETA {duration((total - done) / max(rate, 1e-9))}"
        )
        end = "\n" if done >= total or not is_terminal else ""
        print(("\r\x1b[K" if is_terminal else "") + line, end=end, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def say(message: str) -> None:
    """Print a line to stderr on process 0 only."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)
