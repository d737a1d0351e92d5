"""Optimizer: AdamW with a decay mask, schedules, clipping, accumulation, EMA and a step guard."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from aim_jax.parallel.sharding import joined, micro_batches
from aim_jax.training.state import TrainState

# Arrays with two or more dimensions in the unstacked model, except A_log, as in the Mamba authors'
# code.
DECAYED = ("kernel", "embedding", "table")


def decay_mask(params: Any) -> Any:
    """Return True for the leaves with weight decay: kernels, embeddings and tables."""

    def is_decayed(path: tuple, _: Any) -> bool:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return names[-1] in DECAYED  # a box of logical axes adds an entry of another type

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def learning_rate(config: ConfigDict, steps: int) -> optax.Schedule:
    """Return a schedule of linear warm-up, then constant, linear or cosine decay to end_lr.

    Args:
      config: `lr`, `end_lr`, `warmup_steps`, `schedule`.
      steps: Total number of steps.

    Raises:
      ValueError: The schedule is unknown, or the warm-up is longer than the run.
    """
    remaining = steps - config.warmup_steps
    if remaining < 0:
        raise ValueError(
            f"config.optimizer.warmup_steps={config.warmup_steps} exceeds the {steps} steps of the "
            f"run; pass --config.optimizer.warmup_steps={steps // 10}, or more --config.steps."
        )
    remaining = max(remaining, 1)
    schedules = {
        "constant": lambda: optax.constant_schedule(config.lr),
        "linear": lambda: optax.linear_schedule(config.lr, config.end_lr, remaining),
        "cosine": lambda: optax.cosine_decay_schedule(
            config.lr, remaining, config.end_lr / config.lr if config.lr else 0.0
        ),
    }
    if config.schedule not in schedules:
        raise ValueError(
            f"optimizer.schedule={config.schedule!r}; expected one of {sorted(schedules)}."
        )
    warmup = optax.linear_schedule(0.0, config.lr, max(config.warmup_steps, 1))
    schedule = schedules[config.schedule]()
    if config.warmup_steps:
        schedule = optax.join_schedules([warmup, schedule], [config.warmup_steps])
    # Optax would compute with a float64 fraction if JAX_ENABLE_X64 is set.
    return lambda count: jnp.asarray(schedule(jnp.asarray(count, jnp.float32)), jnp.float32)


def make_optimizer(
    config: ConfigDict, steps: int, frozen: tuple[str, ...] = ()
) -> optax.GradientTransformation:
    """Return AdamW (arXiv 1711.05101) after clipping by the global norm, skipping bad steps.

    Args:
      config: The optimizer section of a configuration.
      steps: Total number of steps.
      frozen: Top-level names of parameters that are not updated.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if frozen:
        is_frozen = lambda params: {name: name in frozen for name in params}  # noqa: E731
        adamw = optax.chain(adamw, optax.masked(optax.set_to_zero(), is_frozen))
    return skip_bad_steps(optax.chain(clip, adamw), config.spike_factor)


class GuardState(NamedTuple):
    """State of `skip_bad_steps`.

    Attributes:
      inner: State of the guarded optimizer.
      usual_norm: () running mean of the norms of the gradients that were used.
      used: () int32, steps used.
      skipped: () int32, steps skipped.
      in_a_row: () int32, steps skipped since the last used one.
    """

    inner: Any
    usual_norm: jax.Array
    used: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array


# Steps before the running mean of the norm is trusted, and its approximate length in steps.
GUARD_WARMUP = 100
GUARD_MEMORY = 100


def skip_bad_steps(
    inner: optax.GradientTransformation, spike_factor: float
) -> optax.GradientTransformation:
    """Keep parameters and moments unchanged where the gradient is not finite or spikes.

    Schedules count the skipped steps too, so that they end with the run.

    Args:
      inner: The optimizer to guard.
      spike_factor: Multiple of its running mean from which the gradient norm is a spike; 0 skips
        only gradients that are not finite.
    """

    def init(params: Any) -> GuardState:
        zero = jnp.zeros((), jnp.int32)
        return GuardState(inner.init(params), jnp.zeros((), jnp.float32), zero, zero, zero)

    def update(grads: Any, state: GuardState, params: Any = None) -> tuple[Any, GuardState]:
        norm = optax.tree.norm(grads).astype(jnp.float32)
        good = jnp.isfinite(norm)
        if spike_factor:
            good &= (state.used < GUARD_WARMUP) | (norm <= spike_factor * state.usual_norm)

        def choose(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        def is_schedule(state: Any) -> bool:
            return isinstance(state, optax.ScaleByScheduleState)

        def choose_state(new: Any, old: Any) -> Any:
            return new if is_schedule(new) else choose(new, old)

        updates, new = inner.update(grads, state.inner, params)
        weight = 1 / jnp.minimum(state.used + 1, GUARD_MEMORY).astype(jnp.float32)
        usual = state.usual_norm + weight * (norm - state.usual_norm)
        state = GuardState(
            inner=jax.tree.map(choose_state, new, state.inner, is_leaf=is_schedule),
            usual_norm=choose(usual, state.usual_norm),
            used=state.used + good,
            skipped=state.skipped + ~good,
            in_a_row=jnp.where(good, 0, state.in_a_row + 1),
        )
        return choose(updates, jax.tree.map(jnp.zeros_like, updates)), state

    return optax.GradientTransformation(init, update)


def apply_gradients(
    state: TrainState, grads: Any, optimizer: optax.GradientTransformation, ema_decay: float
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Apply an optimizer step; return the new state and the scalars to report.

    Args:
      state: State before the step.
      grads: Gradients with respect to `state.params`.
      optimizer: From `make_optimizer`.
      ema_decay: Decay of the averaged parameters; see `update_ema`.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    used = opt_state.in_a_row == 0
    ema = update_ema(state.ema, params, ema_decay, state.step, used)
    report = {"grad_norm": optax.tree.norm(grads), "skipped": opt_state.skipped}
    report["skipped_in_a_row"] = opt_state.in_a_row
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), report


def accumulated_grads(
    grad_fn: Callable[[Any, dict, jax.Array], tuple[Any, tuple[dict, Any]]],
    params: Any,
    batch: dict,
    rng: jax.Array,
    parts: int,
) -> tuple[Any, dict, Any]:
    """Average the gradients `grad_fn(params, batch, rng)` over equal micro-batches of a batch.

    Args:
      grad_fn: Returns (gradients, (metrics, outputs)): means over the examples of its batch, and
        arrays with one row per example. `jax.grad(loss_fn, has_aux=True)` is such a function.
      params: Parameters to differentiate with respect to.
      batch: Arrays with a leading batch axis divisible by `parts`.
      rng: Random key, split among the micro-batches.
      parts: Number of micro-batches, which are differentiated one after the other.

    Returns:
      (grads, metrics, outputs): means over the micro-batches, and the outputs of all examples.
    """
    if parts == 1:
        grads, (metrics, outputs) = grad_fn(params, batch, rng)
        return grads, metrics, outputs

    def micro(total: Any, inputs: tuple[dict, jax.Array]) -> tuple[Any, Any]:
        part, key = inputs
        grads, (metrics, outputs) = grad_fn(params, part, key)
        return jax.tree.map(jnp.add, total, (grads, metrics)), outputs

    split = micro_batches(batch, parts)
    keys = jax.random.split(rng, parts)
    first = jax.tree.map(lambda x: x[0], split)
    shapes, (metrics, _) = jax.eval_shape(grad_fn, params, first, rng)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes, metrics))
    total, outputs = jax.lax.scan(micro, zeros, (split, keys))
    grads, metrics = jax.tree.map(lambda x: x / parts, total)
    return grads, metrics, joined(outputs)


def update_ema(
    ema: Any, params: Any, decay: float, step: jax.Array, used: jax.Array | bool = True
) -> Any:
    """Move the average by (1 - r) * (params - ema), where r = min(decay, (1 + step) / (10 + step)).

    r grows with the steps, so that the average forgets the random initialisation. Parameters equal
    to their average, and all after a step that was not used, keep it bit by bit. None stays None.
    """
    if ema is None:
        return None
    step = jnp.asarray(step, jnp.float32)
    rate = jnp.where(used, jnp.minimum(decay, (1 + step) / (10 + step)), 1)
    return jax.tree.map(lambda e, p: e + (1 - rate) * (p - e), ema, params)
