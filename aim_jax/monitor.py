"""What a running program shows and obeys: metrics, progress, signals."""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np


class MetricsWriter:
    """Writes scalars to `metrics.jsonl` and TensorBoard, on the first process only."""

    def __init__(self, workdir: Path, first_step: int = 0):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._path = Path(workdir) / "metrics.jsonl"
        # A resumed run repeats the steps after its checkpoint; their first record is dropped.
        if self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= first_step]
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(kept))
            os.replace(partial, self._path)
        from tensorboardX import SummaryWriter  # brings torch in where it is installed: seconds

        self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=first_step)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Records the scalars of a step."""
        if not self._active:
            return
        scalars = {name: float(value) for name, value in scalars.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes TensorBoard's file."""
        if self._active:
            self._board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # a line cut short by a kill


class NonFiniteLossError(RuntimeError):
    """The loss of a step is NaN or infinite."""


class StepLog:
    """Collects the metrics of every step without waiting for the device; reports their means."""

    def __init__(self, writer: MetricsWriter, steps: int, first_step: int, examples_per_step: int):
        self._writer, self._steps, self._examples = writer, steps, examples_per_step
        self._pending: list[tuple[int, dict]] = []
        self._step, self._time = first_step, time.perf_counter()

    def add(self, step: int, metrics: dict) -> None:
        """Keeps the (device) metrics of one step."""
        self._pending.append((step, metrics))

    def check(self) -> dict[str, float]:
        """Means of the pending metrics.

        Raises:
          NonFiniteLossError: naming the first step whose loss is not finite.
        """
        fetched = [(step, jax.device_get(metrics)) for step, metrics in self._pending]
        for step, metrics in fetched:
            if not np.isfinite(metrics["loss"]):
                raise NonFiniteLossError(
                    f"the loss of step {step} is {metrics['loss']}; nothing was saved after the "
                    "last checkpoint. Lower optimizer.lr, or set optimizer.clip_norm, and resume."
                )
        names = fetched[0][1] if fetched else ()
        return {name: float(np.mean([metrics[name] for _, metrics in fetched])) for name in names}

    def report(self, step: int) -> None:
        """Writes the means since the last report, and prints a line with rate and time left."""
        means = self.check()
        self._pending.clear()
        now = time.perf_counter()
        steps_per_second = max(step - self._step, 1) / (now - self._time)
        self._step, self._time = step, now
        means["examples_per_second"] = steps_per_second * self._examples
        self._writer.write(step, means)
        shown = "  ".join(
            f"{name} {value:.4g}" for name, value in means.items() if name != "examples_per_second"
        )
        left = (self._steps - step) / steps_per_second
        say(
            f"step {step}/{self._steps}  {shown}  {means['examples_per_second']:.0f} images/s  "
            f"ETA {duration(left)}"
        )

    def pause(self) -> "_Pause":
        """Leaves the time inside the block (evaluation, samples) out of the training rate."""
        return _Pause(self)


class _Pause:
    def __init__(self, log: StepLog):
        self._log = log

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_):
        self._log._time += time.perf_counter() - self._start


class Progress:
    """One line that follows a loop over a known number of items: share, rate, time left."""

    def __init__(self, what: str, unit: str = "images"):
        self._what, self._unit, self._start = what, unit, time.perf_counter()
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Shows that `done` of `total` are finished, at most twice a second on a terminal."""
        now = time.perf_counter()
        terminal = sys.stderr.isatty()
        if done < total and now - self._last < (0.5 if terminal else 10):
            return
        self._last = now
        rate = done / max(now - self._start, 1e-9)
        line = (
            f"{self._what}: {done}/{total} {self._unit}  {rate:.1f}/s  "
            f"ETA {duration((total - done) / max(rate, 1e-9))}"
        )
        end = "\n" if done >= total or not terminal else ""
        print(("\r\x1b[K" if terminal else "") + line, end=end, file=sys.stderr, flush=True)


class StopSignal:
    """Turns SIGTERM (and a first Ctrl-C) into a flag that a loop reads between steps."""

    def __init__(self):
        self.received: str | None = None
        self._previous = {
            s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)
        }

    def _receive(self, number, frame):
        del frame
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def restore(self) -> None:
        """Puts the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def say(message: str) -> None:
    """Prints a line on the first process."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)
