"""Monitoring of a training run: metrics, progress, profiling and stop signals."""

import contextlib
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import jax
import numpy as np
from clu import platform
from jax.experimental import multihost_utils

from aim_jax.parallel.processes import wait_for_all
from aim_jax.parallel.watch import start_is_over
from aim_jax.utils.files import replacing, writing
from aim_jax.utils.json_files import METRICS_LINE, read_json_lines
from aim_jax.utils.logging import QUIET_SECONDS, duration, say
from aim_jax.utils.signals import PATIENCE, end_interrupted, heard_at_once

AHEAD = 2  # steps that the host may dispatch before the first of them is done


def keep_until(file: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after a step, and those that cannot be read.

    A killed process may leave an incomplete line.
    """
    with replacing(file) as partial, partial.open("wb") as kept:
        for line in read_json_lines(file, METRICS_LINE, allow_nan=True):
            if line.problem:
                say(f"{line.name} is left out: {line.problem}")
            elif line.content["step"] <= step:
                kept.write(line.data.rstrip(b"\r\n") + b"\n")


class MetricsWriter:
    """Writer of scalars to `metrics.jsonl` and TensorBoard, on the first process only."""

    def __init__(self, workdir: Path, first_step: int = 0):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._path = Path(workdir) / "metrics.jsonl"
        # A resumed run repeats the steps after its checkpoint; drop their first records.
        if self._path.exists():
            keep_until(self._path, first_step)
        self._board = TensorBoardFile(Path(workdir) / "tensorboard", first_step + 1)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Record the scalars of a step."""
        if not self._active:
            return
        scalars = {name: float(value) for name, value in scalars.items()}
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._board.write(step, scalars)

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._active:
            self._board.close()


class TensorBoardFile:
    """File of TensorBoard's events, written by the calling thread, which gets the errors.

    Args:
      directory: Directory of the file.
      first_step: TensorBoard drops the records of earlier files from this step on.
    """

    FLUSH_SECONDS = 120.0

    def __init__(self, directory: Path, first_step: int):
        # Imports torch if installed, which takes seconds.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event = Event
        self._scalar = scalar
        self._directory = directory
        self._flushed = time.monotonic()
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(directory / "events"))
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(session_log=start, step=first_step, wall_time=time.time()))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Record the scalars of a step; the file has them `FLUSH_SECONDS` later at most."""
        with writing(self._directory):
            for name, value in scalars.items():
                summary = self._scalar(name, value)
                event = self._event(summary=summary, step=step, wall_time=time.time())
                self._writer.write_event(event)
            if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Write what is buffered, and close the file."""
        with writing(self._directory):
            self._writer.close()


class BadStepsError(RuntimeError):
    """Too many training steps in a row were skipped because of their gradients."""


def _means(fetched: list[dict]) -> dict[str, float]:
    """Return the means of metrics over the steps that were not skipped, and the skipped steps."""
    if not fetched:
        return {}
    used = [m for m in fetched if not m["skipped_in_a_row"]] or fetched[-1:]
    counts = {"skipped": float(fetched[-1]["skipped"])}
    names = [name for name in used[0] if name not in ("skipped", "skipped_in_a_row")]
    return {name: float(np.mean([m[name] for m in used])) for name in names} | counts


class StepLog:
    """Collector of the metrics of every step, which reports their means.

    Metrics stay on the device until a report, so that the device stays busy. The first report of a
    process gives the time of its first step, which includes compilation. Speed and ETA follow from
    the second report on, and leave that time out. The ETA includes evaluation and samples, as far
    as the process has seen them.

    Args:
      writer: Destination of the reports.
      steps: Last step of the run.
      first_step: Step from which the run starts or resumes.
      examples_per_step: Examples per step on all devices together.
      skip_limit: Number of consecutive skipped steps that ends the run.
      mfu: Model FLOPs utilisation at one step per second, or None if unknown.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        steps: int,
        first_step: int,
        examples_per_step: int,
        skip_limit: int,
        mfu: float | None = None,
    ):
        self._writer = writer
        self._steps = steps
        self._examples = examples_per_step
        self._skip_limit = skip_limit
        self._mfu = mfu
        self._pending: list[tuple[int, dict]] = []
        self._step = first_step
        self._time = time.perf_counter()
        self._waited = 0.0
        self._began: tuple[int, float] | None = None  # step and time of the first report
        self._printed = self._time

    def add(self, step: int, metrics: dict) -> None:
        """Keep the (device) metrics of one step; wait for those of the step `AHEAD` steps earlier.

        A host that runs further ahead gains nothing, and would have to wait for all those steps
        before it can save and stop.
        """
        self._pending.append((step, metrics))
        if len(self._pending) > AHEAD:
            jax.block_until_ready(self._pending[-1 - AHEAD][1])

    def check(self) -> dict[str, float]:
        """Return the means of the pending metrics over the steps that were not skipped.

        The number of skipped steps is returned as it is.

        Raises:
          BadStepsError: `skip_limit` steps in a row were skipped.
        """
        fetched = [(step, jax.device_get(metrics)) for step, metrics in self._pending]
        for step, metrics in fetched:
            if metrics["skipped_in_a_row"] >= self._skip_limit:
                raise BadStepsError(
                    f"step {step} is the last of {self._skip_limit} consecutive steps that were "
                    "skipped because their gradient is not finite or spikes (loss "
                    f"{metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}). Lower "
                    "optimizer.lr or set optimizer.clip_norm, and resume from the last checkpoint, "
                    "or raise optimizer.skip_limit."
                )
        return _means([metrics for _, metrics in fetched])

    def report(self, step: int) -> dict[str, float]:
        """Write the means since the last report, and print a line with rate and time left.

        Returns:
          The scalars written.
        """
        means = self.check()
        self._pending.clear()
        now = time.perf_counter()
        speed = self._speed(step, now)
        scalars = means | speed
        self._writer.write(step, scalars)
        self._print(step, means, speed, now)
        self._restart(step, now)
        return scalars

    def due(self) -> bool:
        """Return whether to call `show`: after the first step, or after a while without a line."""
        if self._began is None:
            return True
        waited = time.perf_counter() - self._printed
        return jax.process_index() == 0 and waited >= QUIET_SECONDS

    def show(self, step: int) -> None:
        """Print a line between two reports; what is written does not depend on time."""
        means = _means([jax.device_get(metrics) for _, metrics in self._pending])
        now = time.perf_counter()
        first = self._began is None
        self._print(step, means, self._speed(step, now), now)
        if first:
            self._restart(step, now)

    def _speed(self, step: int, now: float) -> dict[str, float]:
        """Return the speed since the last report; none at the first one."""
        if self._began is None:
            return {}
        elapsed = max(now - self._time, 1e-9)
        steps_per_second = max(step - self._step, 1) / elapsed
        speed = {
            "examples_per_second": steps_per_second * self._examples,
            "input_wait": self._waited / elapsed,  # share of the time spent waiting for a batch
        }
        return speed | ({"mfu": steps_per_second * self._mfu} if self._mfu else {})

    def _restart(self, step: int, now: float) -> None:
        """Measure the speed from this step on."""
        self._began = self._began or (step, now)
        self._step = step
        self._time = now
        self._waited = 0.0

    def _print(
        self, step: int, means: dict[str, float], speed: dict[str, float], now: float
    ) -> None:
        means = dict(means)
        skipped = means.pop("skipped", 0.0)
        ordered = sorted(means, key=lambda name: name != "loss")
        parts = [f"{name} {means[name]:.4g}" for name in ordered]
        if skipped:
            parts.append(f"skipped {skipped:.0f}")
        if speed:
            parts.append(f"{speed['examples_per_second']:.0f} images/s")
        if "mfu" in speed:
            parts.append(f"MFU {speed['mfu']:.1%}")
        if self._began is None:
            parts.append(f"first step, with compilation: {duration(now - self._time)}")
        else:
            first, since = self._began
            remaining = (self._steps - step) * (now - since) / max(step - first, 1)
            parts.append(f"ETA {duration(remaining)}")
        line = f"step {step}/{self._steps}  {'  '.join(parts)}"
        self._printed = now
        say(line)
        if jax.process_index() == 0:
            platform.work_unit().set_notes(line)

    @contextlib.contextmanager
    def pause(self):
        """Exclude the time inside the block (evaluation, samples) from the training rate."""
        start = time.perf_counter()
        yield
        self._time += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting(self):
        """Count the time inside the block as waiting for input."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start


class Profiler:
    """Profiler of the steps "FIRST:LAST", for TensorBoard or Perfetto; "" traces none.

    Raises:
      ValueError: The text is malformed, or the last step is before the first.
    """

    def __init__(self, steps: str, directory: Path):
        self._directory = directory
        self._active = False
        self._first = 0
        self._last = 0
        if steps:
            match = re.fullmatch(r"([1-9]\d*):(\d+)", steps)
            if not match or int(match[2]) < int(match[1]):
                raise ValueError(
                    f"config.profile={steps!r}: expected FIRST:LAST, two step numbers from 1 on, "
                    "such as 10:15."
                )
            self._first = int(match[1])
            self._last = int(match[2])

    def before(self, step: int, metrics: dict | None) -> None:
        """Start the trace if this is its first step.

        Args:
          step: The step about to run.
          metrics: Metrics of the previous step, which is waited for; None before the first step.
        """
        if step == self._first:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(str(self._directory))
            self._active = True

    def after(self, step: int, metrics: dict) -> None:
        """Stop the trace if this was its last step."""
        if step == self._last and self._active:
            jax.block_until_ready(metrics)
            self.close()
            say(f"trace of steps {self._first} to {self._last} written to {self._directory}")

    def close(self) -> None:
        """Stop a running trace."""
        if self._active:
            jax.profiler.stop_trace()
            self._active = False


# The signal that the last run of this process received, which may have come after its last step.
_last_stop: list[str] = []


def last_stop() -> str | None:
    """Return the name of the signal that the last run of this process received, or None."""
    return _last_stop[0] if _last_stop else None


class StopSignal:
    """Handler that turns SIGTERM, and a single process's first Ctrl-C, into a stop between steps.

    A line says so at once. A second Ctrl-C raises KeyboardInterrupt, after a save if one has begun.

    Several processes have to stop after the same step, whichever of them got the signal. There,
    JAX's preemption service handles SIGTERM and lets the processes agree.

    Args:
      step: Step from which the run starts or resumes.
      finish: Waits for work in the background, such as a save. Called if a second Ctrl-C ends the
        process during a compilation or another long call.

    Attributes:
      received: Name of the signal, or None.
    """

    def __init__(self, step: int = 0, finish: Callable[[], None] = lambda: None):
        self.received: str | None = None
        self._finish = finish
        self._heard = 0
        self._again = False
        self._saves = 0  # blocks of `saving` that are running
        self._interrupted = False
        self._timers: list[threading.Timer] = []
        self._caught = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._hearing = contextlib.ExitStack()
        if self._caught:
            self._hearing.enter_context(heard_at_once(self._hear))
        self._previous = {s: signal.signal(s, self._receive) for s in self._caught}
        # The processes agree on the step after the last one that any of them has asked about. If
        # the signal came before the first question, that is step 1, which a resumed run never
        # reaches. So ask about step 1 first.
        if step > 1:
            wait_for_all("the first step")
            self.reached(1)
        start_is_over()

    def _hear(self, number: int) -> None:
        """Say what a signal leads to; called in another thread, before `_receive`."""
        if number not in self._caught:
            return
        self._heard += 1
        if self._heard == 1:
            again = " (Ctrl-C again: at once)" if number == signal.SIGINT else ""
            say(f"{signal.Signals(number).name}: stopping after this step, which is saved{again}")
        elif number == signal.SIGINT:
            say("stopping now; complete checkpoints are kept")
            self._timers.append(threading.Timer(PATIENCE, self._end))
            self._timers[-1].daemon = True
            self._timers[-1].start()

    def _end(self) -> None:
        """End the process if the main thread could not react to the second Ctrl-C."""
        if not self._saves and not self._interrupted:
            with contextlib.suppress(Exception):
                self._finish()
            end_interrupted()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self.received:
            self.received = signal.Signals(number).name
        elif number == signal.SIGINT:
            self._again = True
            self._interrupt()

    def _interrupt(self) -> None:
        if self._again and not self._saves:
            self._interrupted = True
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Delay a second Ctrl-C to the end of the block."""
        self._saves += 1
        try:
            yield
        finally:
            self._saves -= 1
        self._interrupt()

    def reached(self, step: int) -> bool:
        """Return whether to stop now; call it before every step, on all processes."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.received = "SIGTERM"
        return self.received is not None

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        _last_stop[:] = [self.received] if self.received else []
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._hearing.close()
        for timer in self._timers:
            timer.cancel()
