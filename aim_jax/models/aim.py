"""AiM: class-conditional autoregressive image generation with Mamba (arXiv 2408.12245).

A class embedding and t - 1 token embeddings enter a stack of Mamba blocks modulated by adaLN.
Output i predicts token i.

Axes: b batch, l length, t tokens of an image, d model, v vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_jax import ops
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


class Modulation(NamedTuple):
    """Contribution of the class to a forward pass, constant over the tokens of an image.

    Attributes:
      layers: (n_layer, b, parts, d): shift, scale and gate of every layer. With an MLP the parts
        are shift_mixer, shift_mlp, scale_mixer, scale_mlp, gate_mixer and gate_mlp.
      final: (1, b, 2, d): shift and scale of the final layer.
    """

    layers: jax.Array
    final: jax.Array


class Block(nn.Module):
    """Residual block: add, norm, modulate, mix and gate, then the same for an optional MLP.

    The mixer's part is

        residual <- residual + gate * mixer(RMSNorm(residual) * (1 + scale) + shift)
    """

    config: AiMConfig

    @nn.compact
    def __call__(
        self, residual: jax.Array, modulation: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """Apply the block.

        Args:
          residual: residual stream (b, l, d).
          modulation: (b, parts, d), see `Modulation.layers`.
          cache: mixer state before these inputs, or None to start from zero.

        Returns:
          The new residual stream, and the cache after these inputs (None without a cache).
        """
        cfg = self.config
        parts = jnp.split(modulation, cfg.modulation_parts, axis=1)
        parts = [part[:, 0] for part in parts]
        if cfg.d_intermediate:
            shift, shift_mlp, scale, scale_mlp, gate, gate_mlp = parts
        else:
            shift, scale, gate = parts
        mixer = MODULES[cfg.mixer][0](cfg, name="mixer")

        x = modulate(RMSNorm(eps=cfg.norm_eps, name="norm")(residual), shift, scale)
        x, cache = mixer(x, cache)
        hidden = gate[:, None] * x
        if cfg.d_intermediate:
            residual = hidden + residual
            x = RMSNorm(eps=cfg.norm_eps, name="norm2")(residual)
            x = modulate(x, shift_mlp, scale_mlp).astype(cfg.compute_dtype)
            mlp = GatedMLP(cfg.mlp_hidden, cfg.compute_dtype, cfg.residual_scale, name="mlp")
            hidden = gate_mlp[:, None] * mlp(x)
        hidden, residual = (constrain(t, "batch", "length", None) for t in (hidden, residual))
        self.sow("intermediates", "hidden", hidden)
        self.sow("intermediates", "residual", residual)
        return constrain(hidden + residual, "batch", "length", None), cache


class AiM(nn.Module):
    """Class-conditional autoregressive image model.

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
        self.class_embedding = LabelEmbedder(cfg.num_classes, cfg.d_model, cfg.class_dropout)
        groups = cfg.num_groups if cfg.adaln == "group" else cfg.n_layer
        table = cfg.adaln == "group"
        self.adaln = AdaLN(cfg.n_layer, groups, cfg.modulation_parts, table)
        self.final_adaln = AdaLN(1, 1, 2, table=False)
        block = Block
        if cfg.remat != "none":
            block = nn.remat(Block, policy=POLICIES[cfg.remat], prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, 0),
            length=cfg.n_layer,
            unroll=cfg.scan_unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg)
        self.norm_f = RMSNorm(eps=cfg.norm_eps)
        self.final_layer = FinalLayer(cfg.norm_eps)
        self.dropout = nn.Dropout(cfg.token_dropout)

    def __call__(self, codes: jax.Array, labels: jax.Array, *, train: bool = False) -> jax.Array:
        """Compute the logits of every token, given the class and the tokens before it.

        Args:
          codes: int (b, t) tokens in raster order, t <= num_tokens.
          labels: int (b,); `num_classes` is the null class.
          train: apply class and token dropout (needs the "dropout" rng).

        Returns:
          float32 (b, t, v); row i predicts codes[:, i].
        """
        return self.head(self.features(codes, labels, train))

    def cross_entropy(
        self, codes: jax.Array, labels: jax.Array, *, train: bool = False
    ) -> jax.Array:
        """Compute the cross entropy of every token under the logits of `__call__`.

        With `config.logits_chunk`, only so many positions have their logits in memory at once.

        Args:
          codes, labels, train: see `__call__`.

        Returns:
          Nats (b, t).
        """
        x = self.features(codes, labels, train)
        table = self.output_table()
        return ops.linear_cross_entropy(
            x.astype(table.dtype), table, codes, self.config.logits_chunk
        )

    def features(self, codes: jax.Array, labels: jax.Array, train: bool = False) -> jax.Array:
        """Compute the features (b, t, d) that the output matrix is applied to; see `__call__`."""
        start, modulation = self.condition(labels, train)
        x = self.embed_codes(codes[:, :-1], jnp.arange(codes.shape[1] - 1, dtype=jnp.int32))
        x = self.dropout(jnp.concatenate([start, x], axis=1), deterministic=not train)
        x, _ = self.stack(x, modulation)
        return self.final(x, modulation.final)

    def condition(self, labels: jax.Array, train: bool = False) -> tuple[jax.Array, Modulation]:
        """Embed labels (b,) as the first input (b, 1, d) and the modulation of every layer."""
        c = self.class_embedding(labels, train)
        return c[:, None], Modulation(self.adaln(c), self.final_adaln(c))

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
          modulation: from `condition`, for the same b rows.
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
        return self.layers(constrain(x, "batch", "length", None), modulation.layers, cache)

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
        table = self.output_table()
        return product("bld,vd->blv", x.astype(table.dtype), table)

    def output_table(self) -> jax.Array:
        """Return the token embeddings (v, d), the tied output matrix, in the compute dtype."""
        table = self.token_embedding.embedding.astype(self.config.compute_dtype)
        return gathered(table, ("vocab", "embed"))


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
    if dual is None:
        cache = MODULES[config.mixer][1](config, batch)
    else:
        cache = init_mamba2_dual_cache(config, batch, dual, dtype)
    return jax.tree.map(lambda x: jnp.zeros((config.n_layer, *x.shape), x.dtype), cache)


def init_params(config: AiMConfig, key: jax.Array) -> dict:
    """Initialize float32 parameters, boxed with their logical axes; see `flax.linen.unbox`."""
    codes = jnp.zeros((1, 2), jnp.int32)
    return AiM(config).init(key, codes, jnp.zeros((1,), jnp.int32))["params"]
