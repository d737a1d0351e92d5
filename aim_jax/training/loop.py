"""The loop that both training programs run: restore, step, report, evaluate, sample, save."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
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
class Stage:
    """What one training program gives to the loop.

    Attributes:
      train_step: (state, batch) -> (state, metrics: scalars, among them those of `apply_gradients`
        and "loss").
      batches: endless iterator of NumPy batches, which says where it is and goes there.
      evaluate: state -> scalars on held-out data.
      sample: (state, path) writes a picture.
      export: state writes the model directory.
      flops: of one example's forward and backward pass, or None.
    """

    train_step: Callable
    batches: Prefetched
    evaluate: Callable[[TrainState], dict]
    sample: Callable[[TrainState, Path], None]
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


def run(config: ConfigDict, workdir: Path, mesh, state: TrainState, stage: Stage) -> TrainState:
    """Trains to `config.steps`, from the newest whole checkpoint in `workdir` if there is one.

    Stops early, after saving, on SIGTERM (sent to any of the processes) or Ctrl-C: the state that
    is returned then has fewer steps. A run that continues repeats an uninterrupted one bit for bit.

    Raises:
      ValueError: config.profile cannot be read, or every checkpoint is damaged.
      BadStepsError: too many steps in a row had to be skipped.
      SaveError: a checkpoint could not be written.
    """
    profiler = Profiler(config.profile, Path(workdir) / "profile")
    checkpoints = RunCheckpoints(workdir, config.keep)
    step, state = checkpoints.restore_newest(state, stage.batches)
    writer = MetricsWriter(workdir, step)
    peak = accelerators.peak_flops(mesh.devices.flat)
    mfu = stage.flops and peak and config.batch_size * stage.flops / peak
    log = StepLog(writer, config.steps, step, config.batch_size, config.optimizer.skip_limit, mfu)
    stop, metrics = StopSignal(step), None

    def due(every: int) -> bool:
        return bool(every) and (step % every == 0 or step == config.steps)

    try:
        while step < config.steps and not stop.reached(step):
            with log.waiting():
                batch = shard_batch(next(stage.batches), mesh)
            profiler.before(step + 1, metrics)
            state, metrics = stage.train_step(state, batch)
            step += 1
            log.add(step, metrics)
            profiler.after(step, metrics)
            if step == 1 or due(config.log_every):
                log.report(step)
            with log.pause():
                if due(config.save_every):
                    log.check()
                    checkpoints.save(step, state, stage.batches)
                if due(config.eval_every):
                    scalars = stage.evaluate(state)
                    writer.write(step, scalars)
                    say(f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in scalars.items()))
                if due(config.export_every) and step < config.steps:
                    stage.export(state)
                if due(config.sample_every):
                    stage.sample(state, Path(workdir) / "samples" / f"step_{step:07d}.png")
        if stop.received:
            log.check()
            checkpoints.save(step, state, stage.batches)
        checkpoints.wait()
        if stop.received:
            say(f"{stop.received}: saved step {step}; the same command continues from there.")
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


def weighted_means(eval_step: Callable, batches, size: int, mesh) -> dict:
    """Means over all examples of what `eval_step` sums over the examples of a batch.

    Args:
      eval_step: padded batch -> dict of sums over its real examples, including "count".
      batches: one pass over this process's share; shorter last batch allowed.
      size: examples per batch on this process.
    """
    # Fetched one by one, so that nothing is under way when the next batch is encoded; see `codes`.
    fetch = lambda sums: jax.tree.map(lambda x: np.asarray(x, np.float64), sums)  # noqa: E731
    sums = [fetch(eval_step(shard_batch(pad_batch(batch, size), mesh))) for batch in batches]
    total = jax.tree.map(lambda *x: np.sum(x, axis=0), *sums)
    count = total.pop("count")
    return {name: value / count for name, value in total.items()}
