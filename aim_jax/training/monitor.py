"""Monitoring of a training run: metrics, progress, profiling and stop signals."""

import contextlib
import json
import math
import re
import signal
import time
from pathlib import Path

import jax
import numpy as np
from clu import platform
from jax.experimental import multihost_utils

from aim_jax.parallel.processes import wait_for_all
from aim_jax.utils.files import replacing
from aim_jax.utils.logging import duration, say

AHEAD = 2  # steps that the host may dispatch before the first of them is done


class MetricsWriter:
    """Writer of scalars to `metrics.jsonl` and TensorBoard, on the first process only."""

    def __init__(self, workdir: Path, first_step: int = 0):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._path = Path(workdir) / "metrics.jsonl"
        # A resumed run repeats the steps after its checkpoint; drop their first records.
        if self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= first_step]
            with replacing(self._path) as partial:
                partial.write_text("".join(kept))
        from tensorboardX import SummaryWriter  # imports torch if installed, which takes seconds

        directory = str(Path(workdir) / "tensorboard")
        self._board = SummaryWriter(directory, purge_step=first_step + 1)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Record the scalars of a step."""
        if not self._active:
            return
        scalars = {name: float(value) for name, value in scalars.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._active:
            self._board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # a line truncated when the process was killed


class BadStepsError(RuntimeError):
    """Too many training steps in a row were skipped because of their gradients."""


class StepLog:
    """Collector of the metrics of every step, which reports their means.

    Metrics stay on the device until a report, so that the device stays busy.

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
        if not fetched:
            return {}
        used = [m for _, m in fetched if not m["skipped_in_a_row"]] or [fetched[-1][1]]
        counts = {"skipped": float(fetched[-1][1]["skipped"])}
        names = [name for name in used[0] if name not in ("skipped", "skipped_in_a_row")]
        return {name: float(np.mean([m[name] for m in used])) for name in names} | counts

    def report(self, step: int) -> dict[str, float]:
        """Write the means since the last report, and print a line with rate and time left.

        Returns:
          The scalars written.
        """
        means = self.check()
        self._pending.clear()
        now = time.perf_counter()
        elapsed = now - self._time
        steps_per_second = max(step - self._step, 1) / elapsed
        speed = {
            "examples_per_second": steps_per_second * self._examples,
            "input_wait": self._waited / elapsed,  # share of the time spent waiting for a batch
        }
        if self._mfu:
            speed["mfu"] = steps_per_second * self._mfu
        self._step = step
        self._time = now
        self._waited = 0.0
        scalars = means | speed
        self._writer.write(step, scalars)
        skipped = means.pop("skipped", 0.0)
        ordered = sorted(means, key=lambda name: name != "loss")
        parts = [f"{name} {means[name]:.4g}" for name in ordered]
        if skipped:
            parts.append(f"skipped {skipped:.0f}")
        parts.append(f"{speed['examples_per_second']:.0f} images/s")
        if self._mfu:
            parts.append(f"MFU {speed['mfu']:.1%}")
        remaining = (self._steps - step) / steps_per_second
        line = f"step {step}/{self._steps}  {'  '.join(parts)}  ETA {duration(remaining)}"
        say(line)
        if jax.process_index() == 0:
            platform.work_unit().set_notes(line)
        return scalars

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


class StopSignal:
    """Handler that turns SIGTERM, and a single process's first Ctrl-C, into a stop between steps.

    Several processes have to stop after the same step, whichever of them got the signal. There,
    JAX's preemption service handles SIGTERM and lets the processes agree.

    Args:
      step: Step from which the run starts or resumes.
    """

    def __init__(self, step: int = 0):
        self.received: str | None = None
        caught = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._previous = {s: signal.signal(s, self._receive) for s in caught}
        # The processes agree on the step after the last one that any of them has asked about. If
        # the signal came before the first question, that is step 1, which a resumed run never
        # reaches. So ask about step 1 first.
        if step > 1:
            wait_for_all("the first step")
            self.reached(1)

    def _receive(self, number, frame):
        del frame
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def reached(self, step: int) -> bool:
        """Return whether to stop now; call it before every step, on all processes."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.received = "SIGTERM"
        return self.received is not None

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
