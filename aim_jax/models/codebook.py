"""The codebook of the tokenizer: vector quantization, codebook usage, dead-code reset.

Axes: b batch, t tokens (row-major), v codebook entries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_jax.models.config import VQConfig


class Quantized(NamedTuple):
    """Output of the quantizer.

    Attributes:
      quant: (b, h, w, embed_dim) codebook vectors, with straight-through gradients.
      indices: (b, t) int32 tokens, row-major.
      vq_loss: scalar that pulls codebook entries towards the encoder's vectors.
      commit_loss: scalar, beta times the pull of the encoder's vectors towards the codebook.
      entropy_loss: scalar, entropy_loss_ratio times (sample entropy - entropy of the mean).
    """

    quant: jax.Array
    indices: jax.Array
    vq_loss: jax.Array
    commit_loss: jax.Array
    entropy_loss: jax.Array


def unit(x: jax.Array) -> jax.Array:
    """Scale x to unit length along the last axis."""
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    return x / jnp.maximum(norm, 1e-12)


def entropy_loss(distances: jax.Array, temperature: float = 0.01) -> jax.Array:
    """Compute the mean entropy of the token distributions minus the entropy of their mean.

    Args:
      distances: (n, v) squared distances between vectors and codebook entries.
      temperature: divides the distances before the softmax.
    """
    affinity = -distances / temperature
    probs = jax.nn.softmax(affinity, axis=-1)
    log_probs = jax.nn.log_softmax(affinity + 1e-5, axis=-1)
    mean = probs.mean(axis=0)
    sample_entropy = -jnp.mean(jnp.sum(probs * log_probs, axis=-1))
    return sample_entropy + jnp.sum(mean * jnp.log(mean + 1e-5))


def init_codebook(key: jax.Array, shape: tuple[int, ...], config: VQConfig) -> jax.Array:
    """Draw uniform codebook entries (v, embed_dim), scaled to unit length if `l2_norm` is set."""
    codebook = jax.random.uniform(key, shape, jnp.float32, -1 / config.n_embed, 1 / config.n_embed)
    return unit(codebook) if config.l2_norm else codebook


class VectorQuantizer(nn.Module):
    """Nearest-neighbour quantizer with straight-through gradients (arXiv 1711.00937)."""

    config: VQConfig

    def setup(self) -> None:
        """Create the codebook."""
        cfg = self.config
        shape = (cfg.n_embed, cfg.embed_dim)
        self.embedding = self.param("embedding", init_codebook, shape, cfg)

    @property
    def codebook(self) -> jax.Array:
        """Codebook entries (v, embed_dim), of unit length if `l2_norm` is set."""
        return unit(self.embedding) if self.config.l2_norm else self.embedding

    def __call__(self, z: jax.Array) -> Quantized:
        """Quantize vectors z (b, h, w, embed_dim)."""
        cfg = self.config
        codebook = self.codebook
        z = z.astype(jnp.promote_types(z.dtype, codebook.dtype))
        z = unit(z) if cfg.l2_norm else z
        flat = z.reshape(-1, cfg.embed_dim)
        # A single bfloat16 pass, the default on TPUs, would sometimes choose another entry.
        products = jnp.matmul(flat, codebook.T, precision="highest")
        distances = (
            jnp.sum(jnp.square(flat), axis=1, keepdims=True)
            + jnp.sum(jnp.square(codebook), axis=1)[None]
            - 2 * products
        )
        indices = jnp.argmin(distances, axis=1)
        quant = codebook[indices].reshape(z.shape)
        entropy = jnp.zeros((), z.dtype)
        if cfg.entropy_loss_ratio:
            entropy = cfg.entropy_loss_ratio * entropy_loss(distances)
        return Quantized(
            quant=z + jax.lax.stop_gradient(quant - z),
            indices=indices.reshape(z.shape[0], -1).astype(jnp.int32),
            vq_loss=jnp.mean(jnp.square(quant - jax.lax.stop_gradient(z))),
            commit_loss=cfg.beta * jnp.mean(jnp.square(jax.lax.stop_gradient(quant) - z)),
            entropy_loss=entropy,
        )

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Return the codebook vectors (..., embed_dim) of indices (...)."""
        return self.codebook[indices]


HISTORY_LENGTH = 65536


def update_history(history: jax.Array, indices: jax.Array) -> jax.Array:
    """Shift the newest indices into the history (65536,) int32 of recent ones."""
    new = indices.reshape(-1)[-history.shape[0] :].astype(history.dtype)
    return jnp.concatenate([history[new.shape[0] :], new])


def codebook_usage(history: jax.Array, n_embed: int) -> jax.Array:
    """Return the fraction of codebook entries that occur in the history."""
    return jnp.mean(jnp.zeros(n_embed, jnp.float32).at[history].set(1.0))


def restart_dead_codes(
    codebook: jax.Array, history: jax.Array, vectors: jax.Array, key: jax.Array
) -> jax.Array:
    """Reset codebook entries that do not occur in the history to random encoder vectors.

    An entry that is nearest to no vector gets no gradient, so it would stay dead (arXiv 2005.00341,
    section 3.1).

    Args:
      codebook: (v, embed_dim).
      history: indices used recently, see `update_history`.
      vectors: (n, embed_dim) vectors as the quantizer compares them.
      key: random key. Vectors are chosen without repetition while they last.
    """
    seen = jnp.zeros(len(codebook), bool).at[history].set(True)
    shuffled = jax.random.permutation(key, vectors)
    replacement = shuffled[(jnp.cumsum(~seen) - 1) % len(shuffled)]
    return jnp.where(seen[:, None], codebook, replacement.astype(codebook.dtype))
