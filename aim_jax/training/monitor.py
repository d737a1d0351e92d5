"""What a running program shows and obeys: metrics, progress, signals."""

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

AHEAD = 2  # steps that the host may give to the device before the first of them is done


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
            with replacing(self._path) as partial:
                partial.write_text("".join(kept))
        from tensorboardX import SummaryWriter  # brings torch in where it is installed: seconds

        directory = str(Path(workdir) / "tensorboard")
        self._board = SummaryWriter(directory, purge_step=first_step + 1)

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


class BadStepsError(RuntimeError):
    """Too many training steps in a row had gradients that could not be used."""


class StepLog:
    """Collects the metrics of every step, the device at work all the time; reports their means.

    Args:
      writer: where reports go.
      steps, first_step: of the run, and where it starts now.
      examples_per_step: of all devices together.
      skip_limit: skipped steps in a row that end the run.
      mfu: model FLOPs utilisation at one step per second, or None where it is not known.
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
        self._writer, self._steps, self._examples = writer, steps, examples_per_step
        self._skip_limit, self._mfu = skip_limit, mfu
        self._pending: list[tuple[int, dict]] = []
        self._step, self._time, self._waited = first_step, time.perf_counter(), 0.0

    def add(self, step: int, metrics: dict) -> None:
        """Keeps the (device) metrics of one step; waits for those of `AHEAD` steps before.

        A host that runs further ahead gains nothing, and has to wait for all those steps when it is
        told to save and end.
        """
        self._pending.append((step, metrics))
        if len(self._pending) > AHEAD:
            jax.block_until_ready(self._pending[-1 - AHEAD][1])

    def check(self) -> dict[str, float]:
        """Means of the pending metrics over the steps that were not skipped; counts as they are.

        Raises:
          BadStepsError: `skip_limit` steps in a row were skipped.
        """
        fetched = [(step, jax.device_get(metrics)) for step, metrics in self._pending]
        for step, metrics in fetched:
            if metrics["skipped_in_a_row"] >= self._skip_limit:
                raise BadStepsError(
                    f"step {step} is the last of {self._skip_limit} in a row that were skipped "
                    "because their gradient is not finite or spikes (its loss is "
                    f"{metrics['loss']:.4g}, its gradient's norm {metrics['grad_norm']:.4g}). "
                    "Lower optimizer.lr or set optimizer.clip_norm, and continue from the last "
                    "checkpoint, or raise optimizer.skip_limit."
                )
        if not fetched:
            return {}
        used = [m for _, m in fetched if not m["skipped_in_a_row"]] or [fetched[-1][1]]
        counts = {"skipped": float(fetched[-1][1]["skipped"])}
        names = [name for name in used[0] if name not in ("skipped", "skipped_in_a_row")]
        return {name: float(np.mean([m[name] for m in used])) for name in names} | counts

    def report(self, step: int) -> dict[str, float]:
        """Writes the means since the last report, and prints a line with rate and time left.

        Returns:
          What it wrote.
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
        self._step, self._time, self._waited = step, now, 0.0
        scalars = means | speed
        self._writer.write(step, scalars)
        skipped = means.pop("skipped", 0.0)
        ordered = sorted(means, key=lambda name: name != "loss")
        shown = [f"{name} {means[name]:.4g}" for name in ordered]
        if skipped:
            shown.append(f"skipped {skipped:.0f}")
        shown.append(f"{speed['examples_per_second']:.0f} images/s")
        if self._mfu:
            shown.append(f"MFU {speed['mfu']:.1%}")
        left = (self._steps - step) / steps_per_second
        line = f"step {step}/{self._steps}  {'  '.join(shown)}  ETA {duration(left)}"
        say(line)
        if jax.process_index() == 0:
            platform.work_unit().set_notes(line)
        return scalars

    @contextlib.contextmanager
    def pause(self):
        """Leaves the time inside the block (evaluation, samples) out of the training rate."""
        start = time.perf_counter()
        yield
        self._time += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting(self):
        """Counts the time inside the block as waiting for input."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start


class Profiler:
    """Traces the steps that "FIRST:LAST" names, for TensorBoard or Perfetto; "" traces none.

    Raises:
      ValueError: the text is something else, or the steps are in the wrong order.
    """

    def __init__(self, steps: str, directory: Path):
        self._directory, self._active = directory, False
        self._first, self._last = 0, 0
        if steps:
            match = re.fullmatch(r"([1-9]\d*):(\d+)", steps)
            if not match or int(match[2]) < int(match[1]):
                raise ValueError(
                    f"config.profile={steps!r}: expected FIRST:LAST, the numbers of two steps from "
                    "1 on, as 10:15."
                )
            self._first, self._last = int(match[1]), int(match[2])

    def before(self, step: int, metrics: dict | None) -> None:
        """Starts the trace if this is its first step.

        Args:
          metrics: of the step before, which is waited for; None before the first one.
        """
        if step == self._first:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(str(self._directory))
            self._active = True

    def after(self, step: int, metrics: dict) -> None:
        """Ends the trace if this was its last step."""
        if step == self._last and self._active:
            jax.block_until_ready(metrics)
            self.close()
            say(f"trace of steps {self._first} to {self._last} in {self._directory}")

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._active:
            jax.profiler.stop_trace()
            self._active = False


class StopSignal:
    """Turns SIGTERM, and a first Ctrl-C of a single process, into an end between two steps.

    Several processes have to stop after the same step, whichever of them got the signal: JAX's
    preemption service takes SIGTERM there, and lets them agree.

    Args:
      step: from which the run goes on.
    """

    def __init__(self, step: int = 0):
        self.received: str | None = None
        caught = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._previous = {s: signal.signal(s, self._receive) for s in caught}
        # They agree on the step after the last that any of them has asked for: on 1 if the signal
        # came before the first was asked for, which a run that goes on would never come to.
        if step > 1:
            wait_for_all("the first step")
            self.reached(1)

    def _receive(self, number, frame):
        del frame
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def reached(self, step: int) -> bool:
        """Whether to stop now; to be asked before every step, on all processes."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.received = "SIGTERM"
        return self.received is not None

    def restore(self) -> None:
        """Puts the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
