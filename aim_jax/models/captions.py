"""Captions as the condition of a model: their embedding, and the mask of their padding.

Axes: b batch, l length of captions with padding, f features, d model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from aim_jax.models.config import AiMConfig
from aim_jax.models.layers import Dense, embedding


class CaptionFeatures(NamedTuple):
    """Captions as the features of an external encoder, with padding on the left.

    Attributes:
      values: float (b, l, f); those of the padding are ignored.
      lengths: int (b,), features of each caption; the null caption has none.
    """

    values: jax.Array | np.ndarray
    lengths: jax.Array | np.ndarray


# int (b, l) tokens, with -1 on the left of shorter captions; the null caption is all -1.
Captions = jax.Array | np.ndarray | CaptionFeatures
# What a model generates for: int labels (b,), or captions.
Condition = jax.Array | np.ndarray | CaptionFeatures


class CaptionInputs(NamedTuple):
    """Embedded captions.

    Attributes:
      x: (b, l, d), the inputs of the stack.
      mask: bool (b, l), False at the padding.
      pooled: (b, d), a vector per caption.
      reader: (1, d), the vector that conditions the layers while they read any caption.
    """

    x: jax.Array
    mask: jax.Array
    pooled: jax.Array
    reader: jax.Array


def caption_mask(captions: Captions) -> jax.Array:
    """Return bool (b, l), False at the padding of captions."""
    if isinstance(captions, CaptionFeatures):
        length = captions.values.shape[1]
        return jnp.arange(length)[None] >= length - captions.lengths[:, None]
    return jnp.asarray(captions) >= 0


class CaptionEmbedder(nn.Module):
    """Embedding of captions, with a null caption that replaces them at random while training.

    The pooled vector is a linear map of the mean over the caption's tokens. That of the null
    caption, which has no tokens, is learned.

    Attributes:
      config: configuration of the model.
    """

    config: AiMConfig

    def setup(self) -> None:
        """Create the table or the map of the features, and the learned vectors."""
        cfg = self.config
        d = cfg.d_model
        if cfg.caption_features:
            self.projection = Dense(d, ("caption_feature", "embed"), cfg.compute_dtype)
        else:
            self.table = embedding(cfg.caption_vocab, d, "caption_vocab")
        self.pool = Dense(d, ("embed", "modulation"), "float32")
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed",))
        self.null = self.param("null", init, (d,), jnp.float32)
        self.reader = self.param("reader", init, (d,), jnp.float32)

    def __call__(self, captions: Captions, train: bool = False) -> CaptionInputs:
        """Embed captions; training with dropout needs the "dropout" rng."""
        mask = caption_mask(captions)
        rate = self.config.class_dropout
        if train and rate:
            drop = jax.random.bernoulli(self.make_rng("dropout"), jnp.float32(rate), mask.shape[:1])
            mask = mask & ~drop[:, None]
        if isinstance(captions, CaptionFeatures):
            values = jnp.where(mask[..., None], captions.values, 0)
            x = self.projection(values).astype(jnp.float32)
        else:
            x = self.table(jnp.maximum(captions, 0))
        count = jnp.sum(mask, axis=1, keepdims=True)
        mean = jnp.sum(jnp.where(mask[..., None], x, 0), axis=1) / jnp.maximum(count, 1)
        pooled = jnp.where(count > 0, self.pool(mean[:, None])[:, 0], self.null[None])
        return CaptionInputs(x, mask, pooled, self.reader[None])


def rows_of(condition: Condition) -> int:
    """Return the number of rows of a condition."""
    return jax.tree.leaves(condition)[0].shape[0]


def padded(captions: Captions, length: int) -> Captions:
    """Pad captions of at most `length` tokens or features on the left to that length."""

    def pad(x: jax.Array | np.ndarray, value: int) -> jax.Array:
        more = [(0, 0), (length - x.shape[1], 0), *[(0, 0)] * (x.ndim - 2)]
        return jnp.pad(x, more, constant_values=value)

    if isinstance(captions, CaptionFeatures):
        return captions._replace(values=pad(captions.values, 0))
    return pad(captions, -1)


def condition_of(batch: dict) -> Condition:
    """Return the condition of a batch for training: its `captions` or its `labels`.

    Captions are int (b, l), or float (b, l, f) with `caption_lengths` int (b,).
    """
    if "caption_lengths" in batch:
        return CaptionFeatures(batch["captions"], batch["caption_lengths"])
    return batch["captions"] if "captions" in batch else batch["labels"]


def null_condition(config: AiMConfig, condition: Condition) -> Condition:
    """Return the null class or the null caption as often as there are rows in a condition."""
    if isinstance(condition, CaptionFeatures):
        return condition._replace(lengths=jnp.zeros_like(condition.lengths))
    return jnp.full_like(condition, -1 if config.is_text else config.num_classes)


def condition_shapes(config: AiMConfig, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes and dtypes of the condition in a batch of so many rows, by name."""
    ints = jax.ShapeDtypeStruct((rows,), jnp.int32)
    if not config.is_text:
        return {"labels": ints}
    shape = (rows, config.max_caption)
    if not config.caption_features:
        return {"captions": jax.ShapeDtypeStruct(shape, jnp.int32)}
    values = jax.ShapeDtypeStruct((*shape, config.caption_features), jnp.float32)
    return {"captions": values, "caption_lengths": ints}
