"""From logits to tokens: classifier-free guidance, the filters, and the draw.

b images, v vocabulary. The order of operations is guidance, temperature, top-k, top-p, min-p, draw.
A new filter is a field of `aim_jax.sampling.config.SamplingConfig`, a case here, and one in the
kernels that sample.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from aim_jax.ops.implementation import implementation_of, kernels_of

# Guidance ramps, as functions of the fraction of tokens sampled so far.
SCHEDULES = {
    "constant": lambda r: jnp.ones_like(r),
    "linear": lambda r: r,
    "cosine": lambda r: (1 - jnp.cos(jnp.pi * r)) / 2,
}


def guidance_at(
    position: jax.Array,
    num_tokens: int,
    scale: jax.Array,
    schedule: str = "constant",
    interval: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] = (0.0, 1.0),
) -> jax.Array:
    """Guidance scale for one token of an image.

    1 + (scale - 1) ramp(r) with r = (position + 1) / num_tokens, so a growing schedule ends at
    `scale`; and 1, which is no guidance, outside the interval (arXiv 2404.07724).

    Args:
      position: () int, number of the token. scale: () or (b,).
      schedule: "constant", "linear" or "cosine".
      interval: from which fraction of the tokens on, and up to which, there is guidance.
    """
    ramp = SCHEDULES[schedule](jnp.asarray((position + 1) / num_tokens, jnp.float32))
    done = position / num_tokens
    inside = (done >= interval[0]) & (done < interval[1])
    return jnp.where(inside, 1 + (scale - 1) * ramp, 1.0)


def apply_cfg(cond: jax.Array, uncond: jax.Array, scale: jax.Array) -> jax.Array:
    """Classifier-free guidance of logits: uncond + (cond - uncond) * scale.

    Args:
      cond, uncond: (b, v). scale: () or (b,); 1 is the conditional model.
    """
    return uncond + (cond - uncond) * jnp.reshape(scale, (-1, 1))


def filter_top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """Sets logits below the k-th largest to -inf; ties at the k-th value are all kept.

    Args:
      logits: (b, v). k: int () or (b,); 0, or anything above v, keeps everything.
    """
    return _filter(logits, k, None)


def filter_top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Nucleus filter: drops the least likely tokens whose cumulative probability is <= 1 - p.

    The largest logit always stays, and so does any logit equal to the smallest that stays.

    Args:
      logits: (b, v), already filtered ones at -inf. p: () or (b,) in (0, 1]; 1 keeps everything.
    """
    return _filter(logits, None, p)


def filter_min_p(logits: jax.Array, min_p: jax.Array) -> jax.Array:
    """Drops tokens that are less than `min_p` times as likely as the most likely one.

    Args:
      logits: (b, v), already filtered ones at -inf.
      min_p: () or (b,) in [0, 1]; 0 keeps everything.
    """
    return jnp.where(_weights(logits) >= jnp.reshape(min_p, (-1, 1)), logits, -jnp.inf)


def filter_logits(
    logits: jax.Array, k: jax.Array, p: jax.Array, min_p: jax.Array | float = 0.0
) -> jax.Array:
    """`filter_top_k`, `filter_top_p` on what remains, renormalised, and `filter_min_p`."""
    return filter_min_p(_filter(logits, k, p), jnp.asarray(min_p, logits.dtype))


def _filter(logits: jax.Array, k: jax.Array | None, p: jax.Array | None) -> jax.Array:
    """Keeps the logits from a threshold on, which a search by halves finds without a sort.

    Both filters keep the tokens above some logit, and how many tokens, or how much probability, lie
    above a logit falls as it grows. Over the floats in their order (as integers) 32 halvings are
    exact, and much faster on CPU than a sort of the vocabulary.
    """
    order = _ordered_int(logits)
    lowest = threshold = jnp.min(order, axis=-1, keepdims=True)
    highest = jnp.max(order, axis=-1, keepdims=True)
    if k is not None:
        vocab = logits.shape[-1]
        k = jnp.reshape(jnp.where(k < 1, vocab, jnp.minimum(k, vocab)), (-1, 1))
        threshold = _largest(
            lambda t: jnp.sum(order >= t, axis=-1, keepdims=True) >= k, lowest, highest
        )
    if p is not None:
        p = jnp.reshape(jnp.asarray(p, logits.dtype), (-1, 1))
        weights = _weights(jnp.where(order >= threshold, logits, -jnp.inf))
        removed = (1 - p) * jnp.sum(weights, axis=-1, keepdims=True)

        def below_is_removed(t):
            below = jnp.sum(jnp.where(order < t, weights, 0), axis=-1, keepdims=True)
            return below <= removed

        nucleus = _largest(below_is_removed, threshold, highest)
        threshold = jnp.where(p < 1, nucleus, threshold)
    return jnp.where(order >= threshold, logits, -jnp.inf)


def _ordered_int(x: jax.Array) -> jax.Array:
    """Integers in the order of the floats x."""
    size = x.dtype.itemsize * 8
    bits = jax.lax.bitcast_convert_type(x, f"int{size}")
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def _largest(holds: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """The largest integer in [low, high] for which `holds`, which does up to it and at low."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up, without overflow
        ok = holds(middle)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    bits = low.dtype.itemsize * 8
    return jax.lax.fori_loop(0, bits, halve, tuple(jnp.broadcast_arrays(low, high)))[0]


def _weights(logits: jax.Array) -> jax.Array:
    """Probabilities up to a factor per row."""
    return jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))


def draw(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """One token per row from softmax(logits), by inverting the distribution function.

    One random number per row, where the Gumbel-max rule takes one per token of the vocabulary. The
    sum is taken in two levels, blocks and then within one.

    Args:
      logits: (b, v). uniform: (b,), uniform in [0, 1).

    Returns:
      int32 (b,); never a token whose logit is -inf.
    """
    b, vocab = logits.shape
    block = math.isqrt(vocab)
    weights = jnp.pad(_weights(logits), ((0, 0), (0, -vocab % block))).reshape(b, -1, block)
    sums = jnp.sum(weights, axis=-1)
    chosen, rest = _invert(sums, uniform * jnp.sum(sums, axis=-1))
    inside, _ = _invert(jnp.take_along_axis(weights, chosen[:, None, None], axis=1)[:, 0], rest)
    return (chosen * block + inside).astype(jnp.int32)


def _invert(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First index (b,) where the running sum of weights (b, n) exceeds target, and what is left.

    Rounding may put the target below zero, at or above the whole sum, and makes running sums uneven
    where weights are zero; an index of positive weight is found all the same.
    """
    ends = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), -jnp.inf)
    below_all = jnp.nextafter(jnp.max(ends, axis=-1), jnp.zeros((), ends.dtype))
    index = jnp.argmax(ends > jnp.minimum(target, below_all)[:, None], axis=-1)
    at = lambda x: jnp.take_along_axis(x, index[:, None], axis=-1)[:, 0]  # noqa: E731
    return index, target - (at(ends) - at(weights))


def sample(
    logits: jax.Array,
    uniform: jax.Array,
    cfg_scale: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Samples one token per image: guidance, temperature, filters and draw.

    Args:
      logits: (2 b, v), all conditional rows before all null-class rows; or (b, v), which leaves
        guidance out.
      uniform: (b,), uniform in [0, 1): the randomness of this token of every image. It is an
        argument so that its maker sees to it that an image's randomness is a function of its seed,
        index and position alone.
      cfg_scale, temperature, top_k (int), top_p, min_p: (b,); see `apply_cfg` and the filters.
      implementation: "xla", or one kernel: "native" (CPU), "triton" (NVIDIA GPU); None is "xla".
        See `aim_jax.ops.implementation`.

    Returns:
      int32 (b,).

    Raises:
      ValueError: the shapes do not fit together, or there is no such implementation.
    """
    settings = (cfg_scale, temperature, top_k, top_p, min_p)
    chosen = implementation_of("sample", implementation, ("xla", "native", "triton"))
    if chosen != "xla":
        return kernels_of(chosen).sample(logits, uniform, *settings)
    b = uniform.shape[0]
    if logits.shape[0] != b:
        logits = apply_cfg(logits[:b], logits[b:], cfg_scale)
    filtered = filter_logits(logits / temperature[:, None], top_k, top_p, min_p)
    return draw(filtered, uniform)
