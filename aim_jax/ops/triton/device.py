"""Device functions: activations, and one position of the causal convolution."""

import triton
import triton.language as tl


@triton.jit
def silu(x):
    """Compute x * sigmoid(x)."""
    return x / (1 + tl.exp(-x))


@triton.jit
def softplus(x):
    """Compute log(1 + exp(x)) as max(x, 0) + log1p(exp(-|x|)), accurate also for small results."""
    # log(1 + u) would lose the digits of a small u, and step sizes are usually small. With s = u /
    # (2 + u) <= 1/3, log1p(u) = 2 artanh(s), whose series needs seven terms for float32.
    u = tl.exp(-tl.abs(x))
    s = u / (2 + u)
    q = s * s
    series = 1 / 11 + q * (1 / 13)
    series = 1 / 7 + q * (1 / 9 + q * series)
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * series))
    return tl.maximum(x, 0.0) + 2 * s * series


@triton.jit
def convolve(inputs, ring, weight, bias, position, channel, mask, c: tl.constexpr, w: tl.constexpr):
    """Compute silu(bias + sum_k weight_k input_{t - (w - 1) + k}) at t = position.

    Args:
      inputs: this position's inputs (c,).
      ring: ring buffer of the last w inputs (w, c).
      weight: filters (w, c).
      bias: (c,).
      position: position t.
      channel: indices of the channels to compute.
      mask: False for indices that are not channels.
      c, w: number of channels, convolution width.

    Returns:
      The inputs of this position, and the result, both float32.
    """
    now = tl.load(inputs + channel, mask=mask, other=0).to(tl.float32)
    y = tl.load(bias + channel, mask=mask, other=0).to(tl.float32)
    for k in tl.static_range(w - 1):
        slot = (position + 1 + k) % w  # slot of position - (w - 1) + k
        tap = tl.load(weight + k * c + channel, mask=mask, other=0).to(tl.float32)
        y += tap * tl.load(ring + slot * c + channel, mask=mask, other=0).to(tl.float32)
    y += tl.load(weight + (w - 1) * c + channel, mask=mask, other=0).to(tl.float32) * now
    return now, silu(y)
