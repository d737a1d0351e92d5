"""Sampling of one token per image: guidance, temperature, filters and choice in one kernel."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from aim_jax.ops.reference import bind_axes, require
from aim_jax.ops.triton.launch import launch, warps_for


@triton.jit
def flip(bits):
    """Map the bits of floats to integers in the same order; the function is its own inverse."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def key_of(x):
    """Map floats to integer keys in the same order."""
    return flip(x.to(tl.int32, bitcast=True))


@triton.jit
def float_of(key):
    """Map keys of `key_of` back to floats."""
    return flip(key).to(tl.float32, bitcast=True)


@triton.jit
def between(low, high):
    """Compute the mean of two integers, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def sample_kernel(
    logits, uniform, cfg_scale, temperature, top_k, top_p, min_p, token,
    v: tl.constexpr, GUIDED: tl.constexpr, BLOCK: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """Sample a token; a program handles one image."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < v
    x = tl.load(logits + row * v + i, mask=inside, other=float("-inf")).to(tl.float32)
    if GUIDED:
        null = logits + (tl.num_programs(0) + row) * v
        uncond = tl.load(null + i, mask=inside, other=0).to(tl.float32)
        x = uncond + (x - uncond) * tl.load(cfg_scale + row)
    x = tl.div_rn(x, tl.full([BLOCK], 1.0, tl.float32) * tl.load(temperature + row))
    x = tl.where(inside, x, float("-inf"))
    largest = tl.max(x, axis=0)

    # Top-k: the largest threshold that at least k logits reach. 32 bisections of the integer keys
    # find any float exactly. Invariant: at least k logits reach `low`, fewer reach `high`.
    k = tl.load(top_k + row)
    k = tl.where(k < 1, v, k)
    low = key_of(tl.min(tl.where(inside, x, float("inf")), axis=0))
    high = key_of(largest) + 1
    for _ in range(tl.where(k < v, 32, 0)):
        middle = between(low, high)
        reached = tl.sum((x >= float_of(middle)).to(tl.int32), axis=0) >= k
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    threshold = float_of(low)

    # Top-p: the smallest threshold such that logits up to and including it hold more than 1 - p of
    # the remaining probability. Invariant: this is true of `high` (or `high` is the largest logit)
    # and false of `low`.
    p = tl.load(top_p + row)
    weight = tl.where(x >= threshold, tl.exp(x - largest), 0.0)
    excess = (1 - p) * tl.sum(weight, axis=0)
    low, high = low - 1, key_of(largest)
    for _ in range(tl.where(p < 1, 32, 0)):
        middle = between(low, high)
        reached = tl.sum(tl.where(x <= float_of(middle), weight, 0.0), axis=0) > excess
        low = tl.where(reached, low, middle)
        high = tl.where(reached, middle, high)
    threshold = tl.where(p < 1, float_of(high), threshold)
    # Min-p: the filters keep the largest logit, so the weight of the most likely token is 1.
    weight = tl.where((x >= threshold) & (weight >= tl.load(min_p + row)), weight, 0.0)

    # Choose the first token whose running sum of weights exceeds the target. Every running sum is
    # taken over the whole row in the same order, with later weights set to zero. The sums therefore
    # never decrease with the token, and a token of weight zero is never chosen, because it does not
    # change the sum. Invariant: the sum up to `high` exceeds the target, the sum up to `low` does
    # not.
    total = tl.sum(weight, axis=0)
    target = tl.minimum(tl.load(uniform + row) * total, float_of(key_of(total) - 1))
    low, high = -1, v - 1
    for _ in range(HALVINGS):
        middle = between(low, high)
        reached = tl.sum(tl.where(i <= middle, weight, 0.0), axis=0) > target
        low = tl.where(reached, low, middle)
        high = tl.where(reached, middle, high)
    tl.store(token + row, high)


def sample(
    logits, uniform, cfg_scale, temperature, top_k, top_p, min_p, *, compute_capability=None
):
    """Sample one token per image, like `aim_jax.sampling.logits.sample`.

        x     = uncond + (cond - uncond) cfg_scale
        x     = filter_logits(x / temperature, top_k, top_p, min_p)
        token = the first i with sum_{j <= i} exp(x_j) > uniform sum_j exp(x_j)

    The kernel needs neither a sort nor a cumulative sum: it finds thresholds and token by
    bisection, with the row in registers. Ties at a threshold are kept. A token whose probability
    tail equals 1 - p to float32 rounding may fall on either side, as with any order of summation,
    and so may the token where the running sum equals the target. A token that the filters remove is
    never sampled.

    Args:
      logits: (2 b, v), all conditional rows before all null-class rows, or (b, v) without guidance.
      uniform: (b,) float32, uniform in [0, 1): the randomness of this token of every image. The
        caller derives it from the image's seed and index and the position only.
      cfg_scale: () or (b,), guidance scale.
      temperature: () or (b,).
      top_k: int () or (b,); 0 keeps all tokens.
      top_p: () or (b,), in (0, 1]; 1 keeps all tokens.
      min_p: () or (b,), in [0, 1]; 0 keeps all tokens.
      compute_capability: see `aim_jax.ops.triton`.

    Returns:
      Tokens, int32 (b,).

    Raises:
      ValueError: the shapes do not match.
    """
    sizes = bind_axes("sample", uniform=(uniform, "b"), logits=(logits, "rv"))
    b, r, v = (sizes[axis] for axis in "brv")
    require(r in (b, 2 * b), f"sample: {r} rows of logits for {b} images, expected {b} or {2 * b}")
    settings = []
    for name, value, dtype in (
        ("cfg_scale", cfg_scale, jnp.float32),
        ("temperature", temperature, jnp.float32),
        ("top_k", top_k, jnp.int32),
        ("top_p", top_p, jnp.float32),
        ("min_p", min_p, jnp.float32),
    ):
        value = jnp.asarray(value, dtype)
        require(
            value.shape in ((), (b,)),
            f"sample: {name} has shape {value.shape}, expected () or {(b,)}",
        )
        settings.append(jnp.broadcast_to(value, (b,)))
    block = triton.next_power_of_2(v)
    (token,) = launch(
        sample_kernel,
        logits, uniform, *settings,
        outputs=[jax.ShapeDtypeStruct((b,), jnp.int32)],
        grid=(b,),
        num_warps=warps_for(block),
        # A fused multiply-add would round guidance once instead of twice.
        enable_fp_fusion=False,
        compute_capability=compute_capability,
        v=v, GUIDED=r == 2 * b, BLOCK=block, HALVINGS=block.bit_length() - 1,
    )  # fmt: skip
    return token
