"""AiM: autoregressive image generation with Mamba from a class (arXiv 2408.12245) or a caption.

A start token, the embedding of the condition, and t - 1 token embeddings enter a stack of Mamba
blocks modulated by adaLN. Output i predicts token i. The tokens of a caption come before the start
token, so the state has read them.

Axes: b batch, l length, t tokens of an image, s tokens of a caption, d model, v vocabulary.
"""

import enum
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_jax import ops
from aim_jax.models.captions import (
    CaptionEmbedder,
    CaptionFeatures,
    Condition,
    condition_of,
    condition_shapes,
)
from aim_jax.models.config import AiMConfig
from aim_jax.models.layers import (
    PROJECTION,
    AdaLN,
    FinalLayer,
    GatedMLP,
    LabelEmbedder,
    RMSNorm,
    embedding,
    gathered,
    modulate,
)
from aim_jax.models.mamba1 import Mamba1, Mamba1Cache, init_mamba1_cache
from aim_jax.models.mamba2 import (
    Mamba2,
    Mamba2Cache,
    init_mamba2_cache,
    init_mamba2_dual_cache,
)
from aim_jax.ops.products import product
from aim_jax.parallel.sharding import constrain
from aim_jax.utils.checks import check_arguments

MODULES: dict[str, tuple] = {
    "mamba1": (Mamba1, init_mamba1_cache),
    "mamba2": (Mamba2, init_mamba2_cache),
}
POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PROJECTION),
}
Cache = Mamba1Cache | Mamba2Cache


class Segment(enum.IntEnum):
    """Kind of an input of the stack."""

    PADDING = 0  # of a caption
    CAPTION = 1
    IMAGE = 2  # start token and tokens


class Reading(NamedTuple):
    """Contribution of captions to the positions where they are read, the first s inputs.

    It depends on no caption but for the mask, so that the model predicts the words of a caption
    from those before them.

    Attributes:
      layers: (n_layer, 1, parts, d), see `Modulation.layers`.
      final: (1, 1, 2, d), see `Modulation.final`.
      mask: bool (b, s), False at the padding.
    """

    layers: jax.Array
    final: jax.Array
    mask: jax.Array


class Modulation(NamedTuple):
    """Contribution of the condition to a forward pass, constant over the tokens of an image.

    Attributes:
      layers: (n_layer, b, parts, d): shift, scale and gate of every layer. With an MLP the parts
        are shift_mixer, shift_mlp, scale_mixer, scale_mlp, gate_mixer and gate_mlp.
      final: (1, b, 2, d): shift and scale of the final layer.
      reading: for inputs that begin with a caption; None otherwise.
    """

    layers: jax.Array
    final: jax.Array
    reading: Reading | None = None

    def after_caption(self) -> "Modulation":
        """Return the modulation of inputs after the caption."""
        return self._replace(reading=None)

    def segments(self, length: int) -> jax.Array | None:
        """Return the kinds of inputs that begin with a caption, int8 (b, length); else None."""
        if self.reading is None:
            return None
        mask = self.reading.mask
        kinds = jnp.where(mask, Segment.CAPTION, Segment.PADDING).astype(jnp.int8)
        image = [(0, 0), (0, length - mask.shape[1])]
        return jnp.pad(kinds, image, constant_values=Segment.IMAGE)


class Block(nn.Module):
    """Residual block: add, norm, modulate, mix and gate, then the same for an optional MLP.

    The mixer's part is

        residual <- residual + gate * mixer(RMSNorm(residual) * (1 + scale) + shift)
    """

    config: AiMConfig

    @nn.compact
    def __call__(
        self,
        residual: jax.Array,
        modulation: jax.Array,
        cache: Cache | None,
        reading: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Apply the block.

        Args:
          residual: residual stream (b, l, d).
          modulation: (b, parts, d), see `Modulation.layers`.
          cache: mixer state before these inputs, or None to start from zero.
          reading: (1, parts, d), replaces the modulation where a caption is read.
          segments: int8 (b, l), see `Segment`; None if no caption is among the inputs.

        Returns:
          The new residual stream, and the cache after these inputs (None without a cache).
        """
        cfg = self.config
        parts = jnp.split(modulation, cfg.modulation_parts, axis=1)
        mask = None
        if reading is not None and segments is not None:
            mask = segments != Segment.PADDING
            is_image = (segments == Segment.IMAGE)[..., None]
            where_read = jnp.split(reading, cfg.modulation_parts, axis=1)
            pairs = zip(parts, where_read, strict=True)
            parts = [jnp.where(is_image, part, read) for part, read in pairs]
        if cfg.d_intermediate:
            shift, shift_mlp, scale, scale_mlp, gate, gate_mlp = parts
        else:
            shift, scale, gate = parts
        mixer = MODULES[cfg.mixer][0](cfg, name="mixer")

        x = modulate(RMSNorm(eps=cfg.norm_eps, name="norm")(residual), shift, scale)
        x, cache = mixer(x, cache, mask)
        hidden = gate * x
        if cfg.d_intermediate:
            residual = hidden + residual
            x = RMSNorm(eps=cfg.norm_eps, name="norm2")(residual)
            x = modulate(x, shift_mlp, scale_mlp).astype(cfg.compute_dtype)
            mlp = GatedMLP(cfg.mlp_hidden, cfg.compute_dtype, cfg.residual_scale, name="mlp")
            hidden = gate_mlp * mlp(x)
        hidden, residual = (constrain(t, "batch", "length", None) for t in (hidden, residual))
        self.sow("intermediates", "hidden", hidden)
        self.sow("intermediates", "residual", residual)
        return constrain(hidden + residual, "batch", "length", None), cache


class AiM(nn.Module):
    """Autoregressive image model, conditional on a class or a caption.

    Call it to compute training logits. Sampling uses `condition`, `embed_codes` and `forward`.
    Parameters of the layers are stacked along a leading axis for every value of `scan_unroll`.
    """

    config: AiMConfig

    def setup(self) -> None:
        """Create the submodules."""
        cfg = self.config
        self.token_embedding = embedding(cfg.vocab_size, cfg.d_model, "vocab")
        if cfg.positions:
            self.position_embedding = embedding(cfg.num_tokens + 1, cfg.d_model, "position")
        if cfg.is_text:
            self.caption_embedding = CaptionEmbedder(cfg)
        else:
            self.class_embedding = LabelEmbedder(cfg.num_classes, cfg.d_model, cfg.class_dropout)
        groups = cfg.num_groups if cfg.adaln == "group" else cfg.n_layer
        table = cfg.adaln == "group"
        self.adaln = AdaLN(cfg.n_layer, groups, cfg.modulation_parts, table)
        self.final_adaln = AdaLN(1, 1, 2, table=False)
        block = Block
        if cfg.remat in POLICIES:
            block = nn.remat(Block, policy=POLICIES[cfg.remat], prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, 0, nn.broadcast),
            length=cfg.n_layer,
            unroll=cfg.scan_unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg)
        self.norm_f = RMSNorm(eps=cfg.norm_eps)
        self.final_layer = FinalLayer(cfg.norm_eps)
        self.dropout = nn.Dropout(cfg.token_dropout)

    def __call__(self, codes: jax.Array, condition: Condition, *, train: bool = False) -> jax.Array:
        """Compute the logits of every token, given the condition and the tokens before it.

        Args:
          codes: int (b, t) tokens in raster order, t <= num_tokens.
          condition: int (b,) labels, where `num_classes` is the null class; or captions, see
            `aim_jax.models.captions`.
          train: apply dropout of conditions and tokens (needs the "dropout" rng).

        Returns:
          float32 (b, t, v); row i predicts codes[:, i].
        """
        return self.head(self.features(codes, condition, train))

    def cross_entropy(
        self, codes: jax.Array, condition: Condition, *, train: bool = False
    ) -> jax.Array:
        """Compute the cross entropy of every token under the logits of `__call__`.

        With `config.logits_chunk`, only so many positions have their logits in memory at once.

        Args:
          codes, condition, train: see `__call__`.

        Returns:
          Nats (b, t).
        """
        return self._nats(self.features(codes, condition, train), codes, self.output_table())

    def cross_entropies(
        self, codes: jax.Array, captions: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Compute the cross entropy of every token, and the mean one of every caption.

        The first token of a caption is not predicted, because there is nothing before it.

        Args:
          codes, captions, train: see `__call__`.

        Returns:
          Nats (b, t), and nats per token of each caption (b,); 0 for one of fewer than two tokens.
        """
        stream, modulation = self._stacked(codes, captions, train)
        nats = self._nats(self._image_features(stream, modulation), codes, self.output_table())
        reading = modulation.reading
        assert reading is not None
        # Predictions from the real tokens but the last.
        last = reading.mask.shape[1] - 1
        x = self.final(stream[:, :last], reading.final)
        targets = jnp.maximum(captions[:, 1:], 0)
        caption_nats = self._nats(
            x, targets, self._tied(self.caption_embedding.table, "caption_vocab")
        )
        predicts = reading.mask[:, :last]
        total = jnp.sum(jnp.where(predicts, caption_nats, 0), axis=1)
        return nats, total / jnp.maximum(jnp.sum(predicts, axis=1), 1)

    def features(self, codes: jax.Array, condition: Condition, train: bool = False) -> jax.Array:
        """Compute the features (b, t, d) that the output matrix is applied to; see `__call__`."""
        return self._image_features(*self._stacked(codes, condition, train))

    def _stacked(
        self, codes: jax.Array, condition: Condition, train: bool
    ) -> tuple[jax.Array, Modulation]:
        """Apply all blocks to a condition and the tokens but the last."""
        start, modulation = self.condition(condition, train)
        x = self.embed_codes(codes[:, :-1], jnp.arange(codes.shape[1] - 1, dtype=jnp.int32))
        x = self.dropout(jnp.concatenate([start, x], axis=1), deterministic=not train)
        x, _ = self.stack(x, modulation)
        return x, modulation

    def _image_features(self, x: jax.Array, modulation: Modulation) -> jax.Array:
        first = 0 if modulation.reading is None else modulation.reading.mask.shape[1]
        return self.final(x[:, first:], modulation.final)

    def _nats(self, x: jax.Array, labels: jax.Array, table: jax.Array) -> jax.Array:
        chunk = self.config.logits_chunk
        return ops.linear_cross_entropy(x.astype(table.dtype), table, labels, chunk)

    def condition(self, condition: Condition, train: bool = False) -> tuple[jax.Array, Modulation]:
        """Embed a condition of b rows as the first inputs and the modulation of every layer.

        Returns:
          The start token (b, 1, d), with the s tokens of the caption before it (b, s + 1, d); and
          the modulation.
        """
        if not self.config.is_text:
            assert not isinstance(condition, CaptionFeatures)
            c = self.class_embedding(jnp.asarray(condition), train)
            return c[:, None], Modulation(self.adaln(c), self.final_adaln(c))
        x, mask, c, reader = self.caption_embedding(condition, train)
        reading = Reading(self.adaln(reader), self.final_adaln(reader), mask)
        x = jnp.concatenate([x, c[:, None]], axis=1)
        return x, Modulation(self.adaln(c), self.final_adaln(c), reading)

    def embed_codes(self, codes: jax.Array, index: jax.Array) -> jax.Array:
        """Embed tokens (b, l) at raster indices (l,) as inputs (b, l, d)."""
        x = self.token_embedding(codes)
        if not self.config.positions:
            return x
        return x + self.position_embedding(index + self.config.position_offset)[None]

    def forward(
        self, x: jax.Array, modulation: Modulation, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Compute the logits of inputs, and the cache after them.

        Args:
          x: inputs (b, l, d): a whole sequence, a part of one, or a single step (l = 1).
          modulation: from `condition`, for the same b rows. Inputs of a text model begin with the
            caption, or follow it, with `Modulation.after_caption`.
          cache: state before x, with a leading layer axis, from `init_cache` or an earlier call.
            None starts from zero and returns no cache.

        Returns:
          Logits (b, l, v) float32, and the cache after x.
        """
        x, cache = self.stack(x, modulation, cache)
        return self.logits(x, modulation.final), cache

    def stack(
        self, x: jax.Array, modulation: Modulation, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Apply all blocks to inputs (b, l, d); return the residual stream (b, l, d) and cache."""
        reading = modulation.reading and modulation.reading.layers
        x = constrain(x, "batch", "length", None)
        return self.layers(x, modulation.layers, cache, reading, modulation.segments(x.shape[1]))

    def logits(self, x: jax.Array, final: jax.Array) -> jax.Array:
        """Compute logits (b, l, v) from the residual stream (b, l, d); see `final`."""
        return self.head(self.final(x, final))

    def final(self, x: jax.Array, final: jax.Array) -> jax.Array:
        """Apply the last norms to the residual stream.

        Args:
          x: residual stream after the last block (b, l, d).
          final: `Modulation.final`.

        Returns:
          Features (b, l, d) for `head`.
        """
        x = self.norm_f(x)
        self.sow("intermediates", "norm_f_out", x)
        x = self.final_layer(x, final[0, :, 0], final[0, :, 1])
        self.sow("intermediates", "final_out", x)
        return x

    def head(self, x: jax.Array) -> jax.Array:
        """Project features (b, l, d) to float32 logits (b, l, v)."""
        return project(x, self.output_table())

    def output_table(self) -> jax.Array:
        """Return the token embeddings (v, d), the tied output matrix, in the compute dtype."""
        return self._tied(self.token_embedding, "vocab")

    def _tied(self, embedding: nn.Embed, axis: str) -> jax.Array:
        table = embedding.embedding.astype(self.config.compute_dtype)
        return gathered(table, (axis, "embed"))


def project(x: jax.Array, table: jax.Array) -> jax.Array:
    """Project features (b, l, d) to float32 logits (b, l, v) with a table (v, d)."""
    return product("bld,vd->blv", x.astype(table.dtype), table)


@check_arguments
def init_cache(
    config: AiMConfig, batch: int, *, dual: int | None = None, dtype: str = "float32"
) -> Cache:
    """Return the zero cache of `batch` sequences: every array is (n_layer, batch, ...).

    Args:
      config: configuration of the model.
      batch: number of sequences; with guidance every image takes two.
      dual: capacity in tokens of a dual-form cache (Mamba-2 only); None makes a recurrent cache.
      dtype: dtype of the inputs and B in a dual-form cache.
    """
    cache = init_layer_cache(config, batch, dual=dual, dtype=dtype)
    return jax.tree.map(lambda x: jnp.zeros((config.n_layer, *x.shape), x.dtype), cache)


def init_layer_cache(
    config: AiMConfig, batch: int, *, dual: int | None = None, dtype: str = "float32"
) -> Cache:
    """Return the zero cache of one layer; see `init_cache`."""
    if dual is None:
        return MODULES[config.mixer][1](config, batch)
    return init_mamba2_dual_cache(config, batch, dual, dtype)


def init_params(config: AiMConfig, key: jax.Array) -> dict:
    """Initialize float32 parameters, boxed with their logical axes; see `flax.linen.unbox`."""
    codes = jnp.zeros((1, 2), jnp.int32)
    shapes = condition_shapes(config, 1)
    condition = condition_of({k: jnp.zeros(x.shape, x.dtype) for k, x in shapes.items()})
    return AiM(config).init(key, codes, condition)["params"]


@functools.lru_cache(maxsize=32)
def param_shapes(config: AiMConfig) -> dict:
    """Return shapes and dtypes of the parameters, without logical axes; do not change the result.

    Tracing the model takes about a second for some sizes, hence the cache.
    """
    return jax.eval_shape(lambda: nn.unbox(init_params(config, jax.random.key(0))))
