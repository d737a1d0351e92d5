"""Causal transformer of LlamaGen's shape (arXiv 2406.06525), for comparison with AiM.

It has RMSNorm before attention and SwiGLU, two-dimensional rotary positions, a class embedding as
the first input, and an untied output matrix. Inputs and outputs are those of `aim_jax.models.AiM`.

Shapes: b batch, l length, t tokens per image, d model, h heads, p head dimension, v vocabulary.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_jax import ops
from aim_jax.models.layers import LabelEmbedder
from aim_jax.sampling.config import SamplingConfig
from aim_jax.sampling.logits import sample

THETA = 10_000.0


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer.

    Attributes:
      vocab_size: size of the vocabulary.
      num_classes: number of classes, without the null class.
      num_tokens: tokens per image.
      d_model: width.
      n_layer: number of blocks.
      n_head: number of attention heads.
      hidden_multiple: the hidden width of SwiGLU, 8/3 d_model, is rounded up to a multiple of it.
      class_dropout: probability of the null class during training.
      dropout: dropout of inputs, attention output and SwiGLU output during training.
    """

    vocab_size: int
    num_classes: int
    num_tokens: int
    d_model: int
    n_layer: int
    n_head: int
    hidden_multiple: int = 32
    class_dropout: float = 0.1
    dropout: float = 0.0

    @property
    def hidden(self) -> int:
        """Hidden width of SwiGLU."""
        return -(-8 * self.d_model // 3 // self.hidden_multiple) * self.hidden_multiple

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        d = self.d_model
        tables = (2 * self.vocab_size + self.num_classes + 1) * d
        return tables + self.n_layer * (4 * d * d + 3 * d * self.hidden + 2 * d) + d


def rotary_angles(config: TransformerConfig) -> jax.Array:
    """Return the rotation angles (t, p / 2) of the inputs.

    Half of the pairs rotate with the row, half with the column. Input 0 is the class, which is not
    rotated; input i + 1 is token i.
    """
    p = config.d_model // config.n_head
    side = math.isqrt(config.num_tokens)
    speeds = THETA ** -(jnp.arange(0, p // 2, 2) / (p // 2))
    index = jnp.arange(config.num_tokens - 1)
    angles = [(position[:, None] * speeds) for position in (index // side, index % side)]
    return jnp.pad(jnp.concatenate(angles, axis=1), ((1, 0), (0, 0)))


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate the pairs of x (b, l, h, p) by angles (l, p / 2)."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = (f(angles)[:, None] for f in (jnp.cos, jnp.sin))
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Block(nn.Module):
    """Transformer block: x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x, cache, start, angles, train: bool):
        """Apply the block.

        Args:
          x: (b, l, d).
          cache: keys and values (b, t, h, p), or None.
          start: position of x[:, 0].
          angles: from `rotary_angles`.
          train: whether to apply dropout.

        Returns:
          x and the updated cache.
        """
        cfg = self.config
        b, l, d = x.shape
        dense = functools.partial(
            nn.Dense, use_bias=False, kernel_init=nn.initializers.normal(0.02)
        )
        drop = nn.Dropout(cfg.dropout, deterministic=not train)
        normed = nn.RMSNorm(epsilon=1e-5, name="attention_norm")(x)
        q, k, v = jnp.split(dense(3 * d, name="qkv")(normed), 3, axis=-1)
        q, k, v = (y.reshape(b, l, cfg.n_head, -1) for y in (q, k, v))
        local_angles = jax.lax.dynamic_slice_in_dim(angles, start, l)
        q = rotate(q, local_angles)
        k = rotate(k, local_angles)
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new, start, 1)
                for old, new in zip(cache, (k, v), strict=True)
            )
            cache = k, v
        mask = jnp.arange(k.shape[1])[None] <= start + jnp.arange(l)[:, None]
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])
        x = x + drop(dense(d, name="out")(mixed.reshape(b, l, d)))
        normed = nn.RMSNorm(epsilon=1e-5, name="mlp_norm")(x)
        gate, up = jnp.split(dense(2 * cfg.hidden, name="gate_up")(normed), 2, axis=-1)
        return x + drop(dense(d, name="down")(nn.silu(gate) * up)), cache


class Transformer(nn.Module):
    """Class-conditional transformer.

    It maps tokens (b, t) and labels (b,) to logits (b, t, v); row i predicts token i.
    """

    config: TransformerConfig

    def setup(self):
        """Create the submodules."""
        cfg = self.config
        self.token_embedding = nn.Embed(
            cfg.vocab_size, cfg.d_model, embedding_init=nn.initializers.normal(0.02)
        )
        self.class_embedding = LabelEmbedder(cfg.num_classes, cfg.d_model, cfg.class_dropout)
        self.blocks = [Block(cfg, name=f"block_{i}") for i in range(cfg.n_layer)]
        self.norm = nn.RMSNorm(epsilon=1e-5)
        self.output = nn.Dense(
            cfg.vocab_size, use_bias=False, kernel_init=nn.initializers.normal(0.02)
        )
        self.dropout = nn.Dropout(cfg.dropout)

    def __call__(self, codes, labels, *, train: bool = False):
        """Return logits (b, t, v) for tokens (b, t) and labels (b,)."""
        x = self.token_embedding(codes[:, :-1])
        x = jnp.concatenate([self.class_embedding(labels, train)[:, None], x], axis=1)
        return self.forward(self.dropout(x, deterministic=not train), None, 0, train)[0]

    def cross_entropy(self, codes, labels, *, train: bool = False):
        """Return the loss (b, t) of every token in nats."""
        return ops.cross_entropy(self(codes, labels, train=train), codes)

    def forward(self, x, caches, start, train: bool = False):
        """Return logits (b, l, v) and updated caches for inputs (b, l, d) from `start` on."""
        angles = rotary_angles(self.config)
        updated = []
        for i, block in enumerate(self.blocks):
            x, cache = block(x, caches and caches[i], start, angles, train)
            updated.append(cache)
        return self.output(self.norm(x)), caches and updated

    def first(self, labels):
        """Return the first input (b, 1, d) for labels (b,)."""
        return self.class_embedding(labels)[:, None]

    def embed(self, tokens):
        """Return the next input (b, 1, d) after tokens (b,)."""
        return self.token_embedding(tokens)[:, None]


def generate_tokens(
    params, labels, seed, index, sampling: SamplingConfig, *, config: TransformerConfig
) -> jax.Array:
    """Sample tokens (b, t) with guidance and a key-value cache; see `aim_jax.sampling.generate`."""
    settings = {name: jnp.asarray(x) for name, x in sampling.arrays(len(labels)).items()}
    return _generate(params, labels, seed, index, settings, config=config)


@functools.partial(jax.jit, static_argnames="config")
def _generate(params, labels, seed, index, settings, *, config) -> jax.Array:
    b = len(labels)
    p = config.d_model // config.n_head

    def apply(name, *args):
        return Transformer(config).apply({"params": params}, *args, method=name)

    x = apply("first", jnp.concatenate([labels, jnp.full_like(labels, config.num_classes)]))
    empty = jnp.zeros((2 * b, config.num_tokens, config.n_head, p), x.dtype)
    caches = [(empty, empty)] * config.n_layer
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(index)

    def step(carry, position):
        x, caches = carry
        logits, caches = apply("forward", x, caches, position)
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, position)))(keys)
        token = sample(logits[:, 0], uniform, **settings)
        return (apply("embed", jnp.concatenate([token, token])), caches), token

    _, tokens = jax.lax.scan(step, (x, caches), jnp.arange(config.num_tokens))
    return tokens.T


def init_params(config: TransformerConfig, key: jax.Array) -> dict:
    """Return random float32 parameters."""
    tokens = jnp.zeros((1, config.num_tokens), jnp.int32)
    return nn.unbox(Transformer(config).init(key, tokens, jnp.zeros((1,), jnp.int32))["params"])
