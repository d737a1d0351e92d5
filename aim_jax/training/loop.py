"""Training loop of AiM and the tokenizer: restore, step, report, and call what is due."""

import contextlib
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
from aim_jax.parallel.ownership import NO_CLAIM, Claim
from aim_jax.parallel.processes import wait_for_all
from aim_jax.parallel.sharding import shard_batch
from aim_jax.perf import accelerators
from aim_jax.training.checkpoint import RunCheckpoints, SaveTimer, naming_newest_checkpoint
from aim_jax.training.monitor import MetricsWriter, Profiler, StepLog, StopSignal
from aim_jax.training.settings import check_settings
from aim_jax.training.state import TrainState
from aim_jax.utils.checks import check_fields, check_integer
from aim_jax.utils.endings import closing_all, patient_event_loops
from aim_jax.utils.logging import reminding, say
from aim_jax.weights.directories import EXPORT_DTYPES


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """Arguments of a callback.

    Attributes:
      step: Optimizer steps done.
      last: Whether this is the last step of the run.
      state: State after this step. The next step donates its arrays: copy what has to outlive the
        call.
      workdir: Directory of the run.
      scalars: Newest value of every scalar written since the last call of this callback: means of
        the metrics since the last report, speed, evaluation results.
      write: Writes more scalars of this step to metrics.jsonl and TensorBoard, and passes them to
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
    """A callback and its interval in steps.

    All processes call it, after the same steps. The training rate excludes the time it takes.

    Attributes:
      steps: Steps between two calls, counted from step 0 of the run even if it resumes; 0 disables
        the callback.
      callback: Function to call. An exception it raises ends the run.
      at_end: Also call it after the last step if that is not a multiple of `steps`.
    """

    steps: int
    callback: Callable[[StepInfo], None]
    at_end: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_integer("Every: steps", self.steps)

    def due(self, step: int, last: bool) -> bool:
        """Return whether to call the callback after this step."""
        return self.steps != 0 and (step % self.steps == 0 or (last and self.at_end))


class Callbacks:
    """Caller of the callbacks that are due, in their order.

    Args:
      pairs: Callbacks with their intervals.
      last_step: Last step of the run.
      workdir: Directory of the run.
      writer: Destination of the scalars that callbacks write.
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
        """Keep scalars for the next call of every callback."""
        for unseen in self._unseen:
            unseen.update(scalars)

    def call(self, step: int, state: TrainState) -> None:
        """Call the callbacks that are due after this step."""

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
    """Return the callbacks of both training programs, with the intervals of the configuration.

    Args:
      evaluate: Maps the state to scalars on held-out data.
      sample: Given (state, path), writes an image.
      export: Given the state, writes the model directory.
    """

    def evaluate_and_write(info: StepInfo) -> None:
        with reminding(f"step {info.step}: evaluating"):
            scalars = evaluate(info.state)
        info.write(scalars)
        listed = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        say(f"step {info.step}  {listed}")

    def export_between(info: StepInfo) -> None:
        if not info.last:  # the loop exports at the end, once the last checkpoint is complete
            with reminding(f"step {info.step}: writing the model"):
                export(info.state)

    def write_samples(info: StepInfo) -> None:
        with reminding(f"step {info.step}: sampling"):
            sample(info.state, info.workdir / "samples" / f"step_{info.step:07d}.png")

    return [
        Every(config.eval_every, evaluate_and_write),
        Every(config.export_every, export_between, at_end=False),
        Every(config.sample_every, write_samples),
    ]


@dataclasses.dataclass(frozen=True)
class Stage:
    """The parts of the loop that one training program supplies.

    Attributes:
      train_step: (state, batch) -> (state, metrics). The metrics are scalars, which include "loss"
        and those of `apply_gradients`.
      batches: Endless iterator of NumPy batches, which can save and restore its position.
      callbacks: Called in this order, after the checkpoint of the same step.
      export: Given the state, writes the model directory at the end of the run.
      flops: FLOPs of one example's forward and backward pass, or None.
    """

    train_step: Callable
    batches: Prefetched
    callbacks: Sequence[Every]
    export: Callable[[TrainState], None]
    flops: float | None = None


def check_reports(config: ConfigDict) -> None:
    """Raise ValueError for settings that would fail only later, in a report, sample or export."""
    check_settings(config)
    if config.export_dtype not in EXPORT_DTYPES:
        raise ValueError(
            f"config.export_dtype={config.export_dtype!r}; expected one of "
            f"{', '.join(EXPORT_DTYPES)}."
        )


def run(
    config: ConfigDict,
    workdir: Path,
    mesh: Mesh,
    state: TrainState,
    stage: Stage,
    claim: Claim = NO_CLAIM,
) -> TrainState:
    """Train to `config.steps`, from the newest intact checkpoint in `workdir` if there is one.

    Training stops early, after a save, on SIGTERM (sent to any of the processes) or Ctrl-C; the
    returned state then has fewer steps. A single process then writes the model directory too; with
    several, little time is left after SIGTERM. A resumed run repeats an uninterrupted one bit for
    bit.

    Raises:
      ValueError: config.profile is malformed, or every checkpoint is damaged.
      BadStepsError: Too many steps in a row were skipped.
      SaveError: A checkpoint could not be written, or the disk is full.
      OwnershipError: `claim`, the ownership of the workdir, was lost.
      KeyboardInterrupt: Ctrl-C was pressed twice. A save that had begun is complete.
    """
    workdir = Path(workdir)
    profiler = Profiler(config.profile, workdir / "profile")
    checkpoints = RunCheckpoints(workdir, config.keep)
    with (
        patient_event_loops(),
        closing_all() as at_last,
        naming_newest_checkpoint(workdir, checkpoints.wait),
        closing_all() as at_end,
    ):
        at_last(checkpoints.close)
        at_end(profiler.close)
        step, state = checkpoints.restore_newest(state, stage.batches)
        writer = MetricsWriter(workdir, step)
        at_end(writer.close)
        peak = accelerators.peak_flops(mesh.devices.flat)
        mfu = stage.flops and peak and config.batch_size * stage.flops / peak
        log = StepLog(
            writer, config.steps, step, config.batch_size, config.optimizer.skip_limit, mfu
        )

        stop = StopSignal(step, checkpoints.wait)
        at_end(stop.restore)
        by_time = SaveTimer(config.save_minutes, step)

        def save(step: int, state: TrainState) -> None:
            log.check()
            claim.check()
            with stop.saving():
                checkpoints.save(step, state, stage.batches)
            by_time.saved()

        # Saving comes first, so that the failure of another callback does not lose the checkpoint.
        saving = Every(config.save_every, lambda info: save(info.step, info.state))
        callbacks = Callbacks([saving, *stage.callbacks], config.steps, workdir, writer)
        first = step
        metrics_of_step = None
        while step < config.steps and not stop.reached(step):
            with _reminding_once(step == first):
                with log.waiting():
                    batch = shard_batch(next(stage.batches), mesh)
                profiler.before(step + 1, metrics_of_step)
                state, metrics_of_step = stage.train_step(state, batch)
                step += 1
                log.add(step, metrics_of_step)
            profiler.after(step, metrics_of_step)
            claim.check()
            if step in (1, config.steps) or step % config.log_every == 0:
                callbacks.show(log.report(step))
            elif log.due():
                log.show(step)
            with log.pause():
                if by_time.due(step) and not saving.due(step, step == config.steps):
                    save(step, state)
                callbacks.call(step, state)
        if stop.received:
            with stop.saving():
                save(step, state)
                checkpoints.wait()
                say(f"{stop.received}: saved step {step}; the same command resumes from there.")
        checkpoints.wait()
        if step == config.steps or (stop.received and jax.process_count() == 1):
            claim.check()
            with reminding("writing the model"):
                stage.export(state)
        # Only process 0 writes models and file lists; JAX aborts it once the others have exited.
        wait_for_all("the end of the run")
    return state


def _reminding_once(first: bool) -> contextlib.AbstractContextManager[None]:
    """Return a context that prints lines during the first step, whose compilation takes long."""
    return reminding("first step, with compilation") if first else contextlib.nullcontext()


def pad_batch(batch: dict, size: int) -> dict:
    """Pad a batch with zeros to `size` examples; `weights` is 1 for real examples and 0 else."""
    count = len(batch["labels"])
    padded = {k: np.pad(v, [(0, size - count)] + [(0, 0)] * (v.ndim - 1)) for k, v in batch.items()}
    return padded | {"weights": (np.arange(size) < count).astype(np.float32)}


def weighted_means(eval_step: Callable, batches: Iterable[dict], size: int, mesh: Mesh) -> dict:
    """Return the means of metrics over all examples of one pass over a dataset.

    Args:
      eval_step: Maps a padded batch to the `clu.metrics.Collection` of its real examples.
      batches: One pass over this process's share; the last batch may be shorter.
      size: Examples per batch on this process.
    """

    def measure(batch: dict) -> metrics.Collection:
        collection = eval_step(shard_batch(pad_batch(batch, size), mesh))
        # Merged on the host in float64, because float32 loses digits over many batches. Fetched one
        # by one, so that no computation is running when the next batch is encoded; see
        # `EncodedImages.encode`.
        return jax.tree.map(lambda x: np.asarray(x, np.float64), collection)

    return functools.reduce(
        lambda total, collection: total.merge(collection), map(measure, batches)
    ).compute()
