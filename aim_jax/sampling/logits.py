"""Sampling of tokens from logits: classifier-free guidance, filters and the categorical draw.

Shapes: b images, v vocabulary entries. The order of operations is guidance, temperature, top-k,
top-p, min-p, draw. To add a filter, add a field to `SamplingConfig`, a case here, and one in each
of the sampling kernels.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from aim_jax.models.sampling_config import SCHEDULES
from aim_jax.ops.implementation import implementation_of, kernels_of
from aim_jax.utils.checks import check_arguments

# Guidance ramps by schedule, as functions of the fraction of tokens sampled so far.
RAMPS = {
    "constant": lambda r: jnp.ones_like(r),
    "linear": lambda r: r,
    "cosine": lambda r: (1 - jnp.cos(jnp.pi * r)) / 2,
}
assert tuple(RAMPS) == SCHEDULES


def guidance_at(
    position: jax.Array,
    num_tokens: int,
    scale: jax.Array,
    schedule: str | jax.Array = "constant",
    interval: tuple[float, float] | jax.Array = (0.0, 1.0),
) -> jax.Array:
    """Return the guidance scale for one token of an image.

    The scale is 1 + (scale - 1) ramp(r) with r = (position + 1) / num_tokens, so a growing schedule
    ends at `scale`. Outside the interval it is 1, which disables guidance (arXiv 2404.07724).

    Args:
      position: () int, index of the token.
      num_tokens: tokens per image.
      scale: () or (b,), the full guidance scale.
      schedule: "constant", "linear" or "cosine"; or () int32, its index in `SCHEDULES`.
      interval: guidance applies while the fraction position / num_tokens is in [start, end).
    """
    progress = jnp.asarray(position + 1, jnp.float32) / num_tokens
    if isinstance(schedule, str):
        ramp = RAMPS[schedule](progress)
    else:
        ramp = jax.lax.select_n(schedule, *(ramp(progress) for ramp in RAMPS.values()))
    fraction = jnp.asarray(position, jnp.float32) / num_tokens
    inside = (fraction >= interval[0]) & (fraction < interval[1])
    return jnp.where(inside, 1 + (scale - 1) * ramp, 1.0)


def apply_cfg(cond: jax.Array, uncond: jax.Array, scale: jax.Array) -> jax.Array:
    """Apply classifier-free guidance to logits: uncond + (cond - uncond) * scale.

    Args:
      cond: (b, v), logits of the class.
      uncond: (b, v), logits of the null class.
      scale: () or (b,); 1 returns the conditional logits.
    """
    return uncond + (cond - uncond) * jnp.reshape(scale, (-1, 1))


def filter_top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """Set logits below the k-th largest to -inf; ties at the k-th value are all kept.

    Args:
      logits: (b, v).
      k: int () or (b,); 0, or any value above v, keeps everything.
    """
    return _filter(logits, k, None)


def filter_top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Set logits outside the nucleus to -inf (top-p filter).

    Drops the least likely tokens whose cumulative probability is <= 1 - p. The largest logit is
    always kept, and so is every logit that ties with the smallest kept one.

    Args:
      logits: (b, v), with previously filtered ones at -inf.
      p: () or (b,) in (0, 1]; 1 keeps everything.
    """
    return _filter(logits, None, p)


def filter_min_p(logits: jax.Array, min_p: jax.Array) -> jax.Array:
    """Set logits of tokens less than `min_p` times as likely as the most likely one to -inf.

    Args:
      logits: (b, v), with previously filtered ones at -inf.
      min_p: () or (b,) in [0, 1]; 0 keeps everything.
    """
    return jnp.where(_weights(logits) >= jnp.reshape(min_p, (-1, 1)), logits, -jnp.inf)


def filter_logits(
    logits: jax.Array, k: jax.Array, p: jax.Array, min_p: jax.Array | float = 0.0
) -> jax.Array:
    """Apply `filter_top_k`, then `filter_top_p` to the renormalised rest, then `filter_min_p`."""
    return filter_min_p(_filter(logits, k, p), jnp.asarray(min_p, logits.dtype))


def _filter(logits: jax.Array, k: jax.Array | None, p: jax.Array | None) -> jax.Array:
    """Set logits below a threshold, found by a search without a sort, to -inf.

    Both filters keep the tokens from some logit upwards. The number of tokens above a logit, and
    their total probability, fall as the logit grows. A search over the floats, ordered as integers,
    is exact once all bits are known, and much faster on CPU than sorting the vocabulary.

    A CPU finds one bit per pass over the vocabulary, with the least arithmetic. GPUs and TPUs find
    four, because there each pass is a launch.
    """
    return jax.lax.platform_dependent(
        logits, k, p,
        cpu=functools.partial(_filter_by_search, bits=1),
        default=functools.partial(_filter_by_search, bits=4),
    )  # fmt: skip


def _filter_by_search(
    logits: jax.Array, k: jax.Array | None, p: jax.Array | None, *, bits: int
) -> jax.Array:
    """Apply `_filter` with a search that finds `bits` bits at a time."""
    order = _ordered_int(logits)
    lowest = threshold = jnp.min(order, axis=-1, keepdims=True)
    highest = jnp.max(order, axis=-1, keepdims=True)
    if k is not None:
        vocab = logits.shape[-1]
        k = jnp.reshape(jnp.where(k < 1, vocab, jnp.minimum(k, vocab)), (-1, 1))

        def are_enough(t: jax.Array) -> jax.Array:
            return jnp.sum(order[:, None] >= t[..., None], axis=-1) >= k

        threshold = _largest(are_enough, lowest, highest, bits)
    if p is not None:
        p = jnp.reshape(jnp.asarray(p, logits.dtype), (-1, 1))
        weights = _weights(jnp.where(order >= threshold, logits, -jnp.inf))
        removed = (1 - p) * jnp.sum(weights, axis=-1, keepdims=True)

        def below_are_removed(t: jax.Array) -> jax.Array:
            below = jnp.where(order[:, None] < t[..., None], weights[:, None], 0)
            return jnp.sum(below, axis=-1) <= removed

        nucleus = _largest(below_are_removed, threshold, highest, bits)
        threshold = jnp.where(p < 1, nucleus, threshold)
    return jnp.where(order >= threshold, logits, -jnp.inf)


def _ordered_int(x: jax.Array) -> jax.Array:
    """Map floats to integers in the same order."""
    size = x.dtype.itemsize * 8
    bits = jax.lax.bitcast_convert_type(x, f"int{size}")
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def _largest(
    holds: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array, bits: int
) -> jax.Array:
    """Return the largest integer in [low, high] for which `holds` is true.

    Args:
      holds: maps integers (b, n) to bools (b, n). It must be true at `low`, and false everywhere
        above the result.
      low, high: int (b, 1).
      bits: number of bits of the result that a round finds.
    """
    size = low.dtype.itemsize * 8
    unsigned = jnp.dtype(f"uint{size}")
    digits = jnp.arange(1, 2**bits, dtype=unsigned)[None]
    first_bit = jnp.asarray(np.uint64(1) << np.uint64(size - 1), unsigned)

    def find_digit(i: jax.Array, found: jax.Array) -> jax.Array:
        shift = jnp.asarray(size - bits * (i + 1), unsigned)
        candidates = found | (digits << shift)
        # The order of unsigned integers is that of signed ones with the other first bit.
        signed = jax.lax.bitcast_convert_type(candidates ^ first_bit, low.dtype)
        is_true = holds(signed) & (signed <= high) | (signed <= low)
        digit = jnp.sum(is_true, axis=-1, keepdims=True, dtype=unsigned)
        return found | (digit << shift)

    nothing = jnp.zeros(jnp.broadcast_shapes(low.shape, high.shape), unsigned)
    rounds = size // bits
    found = jax.lax.fori_loop(0, rounds, find_digit, nothing, unroll=rounds if bits > 1 else 1)
    return jax.lax.bitcast_convert_type(found ^ first_bit, low.dtype)


def _weights(logits: jax.Array) -> jax.Array:
    """Return probabilities up to a factor per row."""
    return jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))


def draw(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """Sample one token per row from softmax(logits) by inverting the distribution function.

    This needs one random number per row, whereas the Gumbel-max trick needs one per vocabulary
    entry. The cumulative sum has two levels: over blocks, then within the chosen block.

    Args:
      logits: (b, v).
      uniform: (b,), uniform in [0, 1).

    Returns:
      int32 (b,); never a token whose logit is -inf.
    """
    b, vocab = logits.shape
    block = math.isqrt(vocab)
    weights = jnp.pad(_weights(logits), ((0, 0), (0, -vocab % block))).reshape(b, -1, block)
    sums = jnp.sum(weights, axis=-1)
    chosen, remaining = _invert(sums, uniform * jnp.sum(sums, axis=-1))
    block_weights = jnp.take_along_axis(weights, chosen[:, None, None], axis=1)[:, 0]
    offset, _ = _invert(block_weights, remaining)
    return (chosen * block + offset).astype(jnp.int32)


def _invert(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the first index (b,) where the cumulative weights (b, n) exceed the target.

    Also returns the remainder of the target within that index. Rounding may put the target below
    zero, or at or above the total, and makes cumulative sums uneven where weights are zero. The
    returned index has positive weight in all these cases.
    """
    ends = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), -jnp.inf)
    below_all = jnp.nextafter(jnp.max(ends, axis=-1), jnp.zeros((), ends.dtype))
    index = jnp.argmax(ends > jnp.minimum(target, below_all)[:, None], axis=-1)
    take = lambda x: jnp.take_along_axis(x, index[:, None], axis=-1)[:, 0]  # noqa: E731
    return index, target - (take(ends) - take(weights))


@check_arguments
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
    """Sample one token per image: guidance, temperature, filters and draw.

    Args:
      logits: (2 b, v), all conditional rows before all null-class rows; or (b, v), which skips
        guidance.
      uniform: (b,), uniform in [0, 1): the randomness of this token of each image. The caller must
        derive it from the image's seed and index and the position alone.
      cfg_scale: (b,); see `apply_cfg`.
      temperature: (b,), divisor of the logits.
      top_k: int (b,); see `filter_top_k`.
      top_p: (b,); see `filter_top_p`.
      min_p: (b,); see `filter_min_p`.
      implementation: "xla", or a single fused kernel: "native" (CPU) or "triton" (NVIDIA GPU); None
        is "xla". See `aim_jax.ops.implementation`.

    Returns:
      int32 (b,).

    Raises:
      ValueError: if the shapes are inconsistent or the implementation is unknown.
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
