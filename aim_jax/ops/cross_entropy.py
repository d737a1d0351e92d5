"""Cross entropy of tokens, for sharded vocabularies and for logits too large for memory."""

import jax
import jax.numpy as jnp

from aim_jax.ops.implementation import implementation_of
from aim_jax.ops.products import product
from aim_jax.ops.reference import split_length, with_rank
from aim_jax.utils.checks import check_arguments


@check_arguments
def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Compute -log softmax(logits)[labels] with reductions over the vocabulary only.

    A label's logit is summed out of a masked row instead of looked up. With a sharded vocabulary,
    devices therefore exchange only sums and maxima, never logits.

    Args:
      logits: (..., v).
      labels: int (...), in [0, v).
      implementation: None or "xla".

    Returns:
      Nats (...), in the dtype of the logits.
    """
    implementation_of("cross_entropy", implementation, ("xla",))
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    values = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    is_label = labels[..., None] == with_rank(values, logits.ndim)
    label_logit = jnp.sum(jnp.where(is_label, shifted, 0), axis=-1)
    return jnp.log(jnp.sum(jnp.exp(shifted), axis=-1)) - label_logit


@check_arguments
def linear_cross_entropy(
    x: jax.Array,
    table: jax.Array,
    labels: jax.Array,
    chunk_size: int = 0,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Compute `cross_entropy` of the logits x table^T, with only a chunk of them in memory.

    The backward pass recomputes the logits of a chunk: four matrix products instead of three.

    Args:
      x: features (b, l, d).
      table: one row per token value (v, d).
      labels: int (b, l).
      chunk_size: positions per chunk; 0 computes all positions at once and keeps their logits.
      implementation: None or "xla".

    Returns:
      Nats (b, l), in at least float32.
    """
    implementation_of("linear_cross_entropy", implementation, ("xla",))

    def nats(x, labels):
        rows = x.reshape(-1, x.shape[-1])  # one axis of positions, as in `models.layers.Dense`
        return cross_entropy(product("md,vd->mv", rows, table), labels.reshape(-1)).reshape(
            labels.shape
        )

    b, l, d = x.shape
    if not 0 < chunk_size < l:
        return nats(x, labels)
    c, q = split_length(l, chunk_size)
    pad = [(0, 0), (0, c * q - l)]
    # Chunks of positions, not of images: then every device works on its own images in every chunk.
    x = jnp.pad(x, [*pad, (0, 0)]).reshape(b, c, q, d).swapaxes(0, 1)
    chunked = jnp.pad(labels, pad).reshape(b, c, q).swapaxes(0, 1)
    out = jax.lax.map(lambda part: jax.checkpoint(nats)(*part), (x, chunked))
    return out.swapaxes(0, 1).reshape(b, c * q)[:, :l]
