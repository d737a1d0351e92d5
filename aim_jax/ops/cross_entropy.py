"""Cross entropy of codes, for a vocabulary that may be sharded and logits that may not fit."""

import jax
import jax.numpy as jnp

from aim_jax.ops.implementation import implementation_of
from aim_jax.ops.reference import split_length


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """-log softmax(logits)[labels], by reductions over the vocabulary alone.

    A label's logit is summed out of a masked row instead of looked up, so that where the vocabulary
    is sharded only sums and maxima travel between devices, never logits.

    Args:
      logits: (..., v).
      labels: int (...), in [0, v).
      implementation: "xla", the only one.

    Returns:
      Nats (...), of the dtype of the logits.
    """
    implementation_of("cross_entropy", implementation, ("xla",))
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    is_label = labels[..., None] == jnp.arange(logits.shape[-1])
    label_logit = jnp.sum(jnp.where(is_label, shifted, 0), axis=-1)
    return jnp.log(jnp.sum(jnp.exp(shifted), axis=-1)) - label_logit


def linear_cross_entropy(
    x: jax.Array,
    table: jax.Array,
    labels: jax.Array,
    chunk_size: int = 0,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """`cross_entropy` of logits x table^T, of which a part is in memory at a time.

    The logits of a chunk are computed again for its gradient, which is one product of four more.

    Args:
      x: features (b, l, d).
      table: one row per code (v, d).
      labels: int (b, l).
      chunk_size: positions per chunk; 0 takes all of them at once and keeps their logits.
      implementation: "xla", the only one.

    Returns:
      Nats (b, l), float32 at least.
    """

    implementation_of("linear_cross_entropy", implementation, ("xla",))

    def nats(x, labels):
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        rows = x.reshape(-1, x.shape[-1])  # one axis of positions, as in `models.layers.Dense`
        logits = jnp.einsum("md,vd->mv", rows, table, preferred_element_type=dtype)
        return cross_entropy(logits, labels.reshape(-1)).reshape(labels.shape)

    b, l, d = x.shape
    if not 0 < chunk_size < l:
        return nats(x, labels)
    c, q = split_length(l, chunk_size)
    pad = [(0, 0), (0, c * q - l)]
    # Chunks of positions, not of images: every device then works on its own images all the time.
    x = jnp.pad(x, [*pad, (0, 0)]).reshape(b, c, q, d).swapaxes(0, 1)
    chunked = jnp.pad(labels, pad).reshape(b, c, q).swapaxes(0, 1)
    out = jax.lax.map(lambda part: jax.checkpoint(nats)(*part), (x, chunked))
    return out.swapaxes(0, 1).reshape(b, c * q)[:, :l]
