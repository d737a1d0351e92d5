"""Optimizer: AdamW with an explicit decay mask, schedules, clipping, accumulation, EMA, a guard."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from aim_jax.parallel.sharding import joined, micro_batches

# Arrays with two or more dimensions in the unstacked model. A_log is left out as its authors do.
DECAYED = ("kernel", "embedding", "table")


def decay_mask(params):
    """True for the leaves that weight decay acts on: matrices, convolutions, embeddings, tables."""

    def is_decayed(path, _):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return names[-1] in DECAYED  # a box of logical axes adds an entry of another kind

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def learning_rate(config, steps: int) -> optax.Schedule:
    """Linear warm-up, then a constant, linear or cosine course to end_lr.

    Args:
      config: `lr`, `end_lr`, `warmup_steps`, `schedule`.
      steps: steps in all.

    Raises:
      ValueError: an unknown schedule, or a warm-up longer than the training.
    """
    rest = steps - config.warmup_steps
    if rest < 0:
        raise ValueError(
            f"optimizer.warmup_steps={config.warmup_steps} exceeds the {steps} steps of the run."
        )
    rest = max(rest, 1)
    courses = {
        "constant": lambda: optax.constant_schedule(config.lr),
        "linear": lambda: optax.linear_schedule(config.lr, config.end_lr, rest),
        "cosine": lambda: optax.cosine_decay_schedule(
            config.lr, rest, config.end_lr / config.lr if config.lr else 0.0
        ),
    }
    if config.schedule not in courses:
        raise ValueError(
            f"optimizer.schedule={config.schedule!r}; expected one of {sorted(courses)}."
        )
    warmup = optax.linear_schedule(0.0, config.lr, max(config.warmup_steps, 1))
    course = courses[config.schedule]()
    if not config.warmup_steps:
        return course
    return optax.join_schedules([warmup, course], [config.warmup_steps])


def make_optimizer(
    config, steps: int, frozen: tuple[str, ...] = ()
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) after clipping by the global norm, without bad steps.

    Args:
      frozen: top-level names of parameters that stay as they are.
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
        held = lambda params: {name: name in frozen for name in params}  # noqa: E731
        adamw = optax.chain(adamw, optax.masked(optax.set_to_zero(), held))
    return skip_bad_steps(optax.chain(clip, adamw), config.spike_factor)


class GuardState(NamedTuple):
    """State of `skip_bad_steps`.

    Attributes:
      inner: of the optimizer it guards.
      usual_norm: () running mean of the norms of the gradients that were used.
      used, skipped, in_a_row: () int32, steps used and skipped, and skipped since the last used.
    """

    inner: Any
    usual_norm: jax.Array
    used: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array


# Steps until the running mean of the norm is trusted, and over about how many it runs.
GUARD_WARMUP, GUARD_MEMORY = 100, 100


def skip_bad_steps(
    inner: optax.GradientTransformation, spike_factor: float
) -> optax.GradientTransformation:
    """Leaves parameters and moments alone where the gradient is not finite or suddenly large.

    Args:
      inner: the optimizer.
      spike_factor: norm, in multiples of its running mean, from which a gradient is skipped; 0
        skips only what is not finite.
    """

    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return GuardState(inner.init(params), jnp.zeros(()), zero, zero, zero)

    def update(grads, state, params=None):
        norm = optax.tree.norm(grads).astype(jnp.float32)
        good = jnp.isfinite(norm)
        if spike_factor:
            good &= (state.used < GUARD_WARMUP) | (norm <= spike_factor * state.usual_norm)

        def choose(new, old):
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        updates, new = inner.update(grads, state.inner, params)
        weight = 1 / jnp.minimum(state.used + 1, GUARD_MEMORY)
        usual = state.usual_norm + weight * (norm - state.usual_norm)
        state = GuardState(
            inner=choose(new, state.inner),
            usual_norm=choose(usual, state.usual_norm),
            used=state.used + good,
            skipped=state.skipped + ~good,
            in_a_row=jnp.where(good, 0, state.in_a_row + 1),
        )
        return choose(updates, jax.tree.map(jnp.zeros_like, updates)), state

    return optax.GradientTransformation(init, update)


def apply_gradients(state, grads, optimizer: optax.GradientTransformation, ema_decay: float):
    """The state after an optimizer step, and what to report of it.

    Args:
      state: `aim_jax.training.state.TrainState`.
      optimizer: from `make_optimizer`.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = update_ema(state.ema, params, ema_decay, state.step)
    report = {"grad_norm": optax.tree.norm(grads), "skipped": opt_state.skipped}
    report["skipped_in_a_row"] = opt_state.in_a_row
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), report


def accumulated_grads(grad_fn, params, batch: dict, rng: jax.Array, parts: int):
    """Mean of the gradients `grad_fn(params, batch, rng)` of a batch that is taken in `parts`.

    Args:
      grad_fn: returns (gradients, (metrics, outputs)): means over the examples it was given, and
        arrays with one row per example; `jax.grad(loss_fn, has_aux=True)` is one.
      batch: arrays with a leading batch axis divisible by `parts`.
      parts: number of equal micro-batches that are differentiated one after the other.

    Returns:
      (grads, metrics, outputs): means over the micro-batches, and the outputs of all examples.
    """
    if parts == 1:
        grads, (metrics, outputs) = grad_fn(params, batch, rng)
        return grads, metrics, outputs

    def micro(total, inputs):
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


def update_ema(ema, params, decay: float, step: jax.Array):
    """ema <- ema + (1 - r) * (params - ema) with r = min(decay, (1 + step) / (10 + step)).

    The rate grows with the steps, so that the average forgets the random start. What stands still
    stays as it is, bit by bit. None stays None.
    """
    if ema is None:
        return None
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
