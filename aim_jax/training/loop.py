"""The loop that both training programs run: restore, step, report, call what is due."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from clu import metrics
from jax.sharding import Mesh
from ml_collections import ConfigDict

from aim_jax.data.loader import Prefetched
from aim_jax.parallel.processes import wait_for_all
from aim_jax.parallel.sharding import shard_batch
from aim_jax.perf import accelerators
from aim_jax.training.checkpoint import RunCheckpoints
from aim_jax.training.monitor import MetricsWriter, Profiler, StepLog, StopSignal
from aim_jax.training.state import TrainState
from aim_jax.utils.logging import say
from aim_jax.weights.pretrained import EXPORT_DTYPES


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """What a callback sees.

    Attributes:
      step: optimizer steps done.
      last: whether this is the last step of the run.
      state: after this step. The next step consumes its arrays: copy what has to outlive the call.
      workdir: of the run.
      scalars: newest value of every scalar written since this callback was last called: means of
        the metrics since the last report, speed, evaluation results.
      write: takes more scalars of this step for metrics.jsonl and TensorBoard, and shows them to
        the other callbacks.
    """

    step: int
    last: bool
    state: TrainState
    workdir: Path
    scalars: dict[str, float]
    write: Callable[[dict[str, float]], None]


@dataclasses.dataclass(frozen=True)
class Every:
    """A callback, and how often the loop calls it.

    All processes call it, after the same steps. The training rate leaves out the time it takes.

    Attributes:
      steps: between two calls, counted from step 0 of the run, also when it resumes; 0: no calls.
      callback: its errors end the run.
      at_end: call it after the last step too, if that is not a multiple of `steps`.
    """

    steps: int
    callback: Callable[[StepInfo], None]
    at_end: bool = True

    def due(self, step: int, last: bool) -> bool:
        """Whether to call it after this step."""
        return self.steps != 0 and (step % self.steps == 0 or (last and self.at_end))


class Callbacks:
    """Calls the callbacks that are due, in their order.

    Args:
      pairs: of interval and callback.
      last_step: of the run.
      workdir: of the run.
      writer: where the scalars go that callbacks write.
    """

    def __init__(
        self, pairs: Sequence[Every], last_step: int, workdir: Path, writer: MetricsWriter
    ):
        self._pairs = pairs
        self._last_step = last_step
        self._workdir = workdir
        self._writer = writer
        self._unseen: list[dict[str, float]] = [{} for _ in pairs]

    def show(self, scalars: dict[str, float]) -> None:
        """Keeps scalars for the next call of every callback."""
        for unseen in self._unseen:
            unseen.update(scalars)

    def call(self, step: int, state: TrainState) -> None:
        """Calls what is due after this step."""

        def write(scalars):
            scalars = {name: float(value) for name, value in scalars.items()}
            self._writer.write(step, scalars)
            self.show(scalars)

        last = step == self._last_step
        for i, pair in enumerate(self._pairs):
            if pair.due(step, last):
                scalars, self._unseen[i] = self._unseen[i], {}
                pair.callback(StepInfo(step, last, state, self._workdir, scalars, write))


def run_callbacks(
    config: ConfigDict,
    evaluate: Callable[[TrainState], dict[str, float]],
    sample: Callable[[TrainState, Path], None],
    export: Callable[[TrainState], None],
) -> list[Every]:
    """The callbacks of both training programs, at the intervals of their configuration.

    Args:
      evaluate: state -> scalars on held-out data.
      sample: (state, path) writes an image.
      export: state writes the model directory.
    """

    def evaluate_and_write(info: StepInfo) -> None:
        scalars = evaluate(info.state)
        info.write(scalars)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        say(f"step {info.step}  {shown}")

    def export_between(info: StepInfo) -> None:
        if not info.last:  # the loop exports at the end, once the last checkpoint is whole
            export(info.state)

    def write_samples(info: StepInfo) -> None:
        sample(info.state, info.workdir / "samples" / f"step_{info.step:07d}.png")

    return [
        Every(config.eval_every, evaluate_and_write),
        Every(config.export_every, export_between, at_end=False),
        Every(config.sample_every, write_samples),
    ]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one training program gives to the loop.

    Attributes:
      train_step: (state, batch) -> (state, metrics: scalars, among them those of `apply_gradients`
        and "loss").
      batches: endless iterator of NumPy batches, which says where it is and goes there.
      callbacks: called in this order, after the checkpoint of the same step.
      export: state writes the model directory, at the end of the run.
      flops: of one example's forward and backward pass, or None.
    """

    train_step: Callable
    batches: Prefetched
    callbacks: Sequence[Every]
    export: Callable[[TrainState], None]
    flops: float | None = None


def check_reports(config: ConfigDict) -> None:
    """Raises ValueError for what a run would otherwise stumble over when it samples or exports."""
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"config.seed={config.seed}: expected 0 to 2**31 - 1.")
    if config.export_dtype not in EXPORT_DTYPES:
        raise ValueError(
            f"config.export_dtype={config.export_dtype!r}; expected one of "
            f"{', '.join(EXPORT_DTYPES)}."
        )
    if config.log_every < 1:
        raise ValueError(
            f"config.log_every={config.log_every}; expected 1 or more: until a report the metrics "
            "of every step are kept."
        )
    if config.keep < 1:
        raise ValueError(f"config.keep={config.keep}; expected 1 checkpoint or more.")
    for name, count in config.sample.items():
        if name in ("images", "classes", "per_class") and count < 1:
            raise ValueError(f"config.sample.{name}={count}; expected 1 or more.")


def run(
    config: ConfigDict, workdir: Path, mesh: Mesh, state: TrainState, stage: Stage
) -> TrainState:
    """Trains to `config.steps`, from the newest whole checkpoint in `workdir` if there is one.

    Stops early, after saving, on SIGTERM (sent to any of the processes) or Ctrl-C: the state that
    is returned then has fewer steps. A run that resumes repeats an uninterrupted one bit for bit.

    Raises:
      ValueError: config.profile cannot be read, or every checkpoint is damaged.
      BadStepsError: too many steps in a row had to be skipped.
      SaveError: a checkpoint could not be written.
    """
    workdir = Path(workdir)
    profiler = Profiler(config.profile, workdir / "profile")
    checkpoints = RunCheckpoints(workdir, config.keep)
    step, state = checkpoints.restore_newest(state, stage.batches)
    writer = MetricsWriter(workdir, step)
    peak = accelerators.peak_flops(mesh.devices.flat)
    mfu = stage.flops and peak and config.batch_size * stage.flops / peak
    log = StepLog(writer, config.steps, step, config.batch_size, config.optimizer.skip_limit, mfu)

    def save(step: int, state: TrainState) -> None:
        log.check()
        checkpoints.save(step, state, stage.batches)

    # First: no failure of another callback loses the checkpoint.
    saving = Every(config.save_every, lambda info: save(info.step, info.state))
    callbacks = Callbacks([saving, *stage.callbacks], config.steps, workdir, writer)
    stop, reported = StopSignal(step), None
    try:
        while step < config.steps and not stop.reached(step):
            with log.waiting():
                batch = shard_batch(next(stage.batches), mesh)
            profiler.before(step + 1, reported)
            state, reported = stage.train_step(state, batch)
            step += 1
            log.add(step, reported)
            profiler.after(step, reported)
            if step in (1, config.steps) or step % config.log_every == 0:
                callbacks.show(log.report(step))
            with log.pause():
                callbacks.call(step, state)
        if stop.received:
            save(step, state)
        checkpoints.wait()
        if stop.received:
            say(f"{stop.received}: saved step {step}; the same command resumes from there.")
        if step == config.steps or stop.received == "SIGINT":
            stage.export(state)
        # Process 0 alone writes models and lists of files; JAX aborts it when the others have left.
        wait_for_all("the end of the run")
    finally:
        stop.restore()
        profiler.close()
        checkpoints.close()
        writer.close()
    return state


def pad_batch(batch: dict, size: int) -> dict:
    """A batch filled up with zeros to `size` examples; `weights` is 1 for real ones, else 0."""
    count = len(batch["labels"])
    padded = {k: np.pad(v, [(0, size - count)] + [(0, 0)] * (v.ndim - 1)) for k, v in batch.items()}
    return padded | {"weights": (np.arange(size) < count).astype(np.float32)}


def weighted_means(eval_step: Callable, batches: Iterable[dict], size: int, mesh: Mesh) -> dict:
    """Means over all examples of one pass over a data set.

    Args:
      eval_step: padded batch -> `clu.metrics.Collection` of its real examples.
      batches: one pass over this process's share; shorter last batch allowed.
      size: examples per batch on this process.
    """

    def measure(batch: dict) -> metrics.Collection:
        found = eval_step(shard_batch(pad_batch(batch, size), mesh))
        # Merged on the host, in float64: float32 loses digits over the batches of a large set.
        # Fetched one by one, so that nothing is under way when the next batch is encoded; see
        # `EncodedImages.encode`.
        return jax.tree.map(lambda x: np.asarray(x, np.float64), found)

    return functools.reduce(
        lambda total, found: total.merge(found), map(measure, batches)
    ).compute()
