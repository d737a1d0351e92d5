"""AiM: class-conditional autoregressive image generation with Mamba (arXiv 2408.12245).

A class embedding and t - 1 code embeddings enter a stack of Mamba blocks modulated by adaLN; output
i predicts code i. b batch, l length, t tokens of an image, d model, v vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_jax import ops
from aim_jax.models.config import AiMConfig
from aim_jax.models.layers import (
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
from aim_jax.parallel.sharding import constrain

MODULES: dict[str, tuple] = {
    "mamba1": (Mamba1, init_mamba1_cache),
    "mamba2": (Mamba2, init_mamba2_cache),
}
POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
Cache = Mamba1Cache | Mamba2Cache
Carry = tuple[jax.Array, jax.Array]  # (hidden, residual), each (b, l, d)


class Modulation(NamedTuple):
    """Everything the class contributes to a forward pass; constant over the tokens of an image.

    Attributes:
      layers: (n_layer, b, parts, d): shift, scale, gate of every layer, or with an MLP
        shift_mixer, shift_mlp, scale_mixer, scale_mlp, gate_mixer, gate_mlp.
      final: (1, b, 2, d): shift and scale of the final layer.
    """

    layers: jax.Array
    final: jax.Array


class Block(nn.Module):
    """Add, norm, modulate, mix, gate; then the same around an MLP if there is one.

    residual <- hidden + residual
    hidden   <- gate * mixer(RMSNorm(residual) * (1 + scale) + shift)
    """

    config: AiMConfig

    @nn.compact
    def __call__(
        self, carry: Carry, modulation: jax.Array, cache: Cache | None
    ) -> tuple[Carry, Cache | None]:
        """carry = (hidden, residual); modulation (b, parts, d)."""
        cfg = self.config
        hidden, residual = carry
        parts = jnp.split(modulation, cfg.modulation_parts, axis=1)
        parts = [part[:, 0] for part in parts]
        if cfg.d_intermediate:
            shift, shift_mlp, scale, scale_mlp, gate, gate_mlp = parts
        else:
            shift, scale, gate = parts
        mixer = MODULES[cfg.mixer][0](cfg, name="mixer")

        residual = hidden + residual
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
        return (hidden, residual), cache


class AiM(nn.Module):
    """The model: call it for training logits; `condition`, `embed_codes` and `forward` to sample.

    Parameters of the layers are stacked along a leading axis, whatever `scan_unroll` says.
    """

    config: AiMConfig

    def setup(self) -> None:
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
        """Logits of every code given the class and the codes before it.

        Args:
          codes: int (b, t), t <= num_tokens, raster order.
          labels: int (b,); `num_classes` is the null class.
          train: applies class and token dropout (rng "dropout").

        Returns:
          float32 (b, t, v); row i predicts codes[:, i].
        """
        return self.head(self.features(codes, labels, train))

    def cross_entropy(
        self, codes: jax.Array, labels: jax.Array, *, train: bool = False
    ) -> jax.Array:
        """Nats (b, t) of every code under the logits of `__call__`, see `config.logits_chunk`."""
        x, table = self.features(codes, labels, train), self.output_table()
        return ops.linear_cross_entropy(
            x.astype(table.dtype), table, codes, self.config.logits_chunk
        )

    def features(self, codes: jax.Array, labels: jax.Array, train: bool = False) -> jax.Array:
        """What the output matrix is applied to, (b, t, d); see `__call__`."""
        start, modulation = self.condition(labels, train)
        x = self.embed_codes(codes[:, :-1], jnp.arange(codes.shape[1] - 1))
        x = self.dropout(jnp.concatenate([start, x], axis=1), deterministic=not train)
        carry, _ = self.stack(x, modulation)
        hidden, residual = carry
        return self.final(hidden, residual, modulation.final)

    def condition(self, labels: jax.Array, train: bool = False) -> tuple[jax.Array, Modulation]:
        """labels (b,) -> (the sequence's first input (b, 1, d), modulation of every layer)."""
        c = self.class_embedding(labels, train)
        return c[:, None], Modulation(self.adaln(c), self.final_adaln(c))

    def embed_codes(self, codes: jax.Array, index: jax.Array) -> jax.Array:
        """codes (b, l) at raster indices (l,) -> inputs (b, l, d)."""
        x = self.token_embedding(codes)
        if not self.config.positions:
            return x
        return x + self.position_embedding(index + self.config.position_offset)

    def forward(
        self, x: jax.Array, modulation: Modulation, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Inputs (b, l, d) -> (logits (b, l, v), the cache after them).

        Args:
          x: a whole sequence, a part of one, or a single step (l = 1).
          modulation: from `condition`, of the same b rows.
          cache: state before x, with a leading layer axis, from `init_cache` or an earlier call;
            None starts from zero and returns none.
        """
        carry, cache = self.stack(x, modulation, cache)
        hidden, residual = carry
        return self.logits(hidden, residual, modulation.final), cache

    def stack(
        self, x: jax.Array, modulation: Modulation, cache: Cache | None = None
    ) -> tuple[Carry, Cache | None]:
        """Inputs (b, l, d) -> ((hidden, residual) after the last block, the cache)."""
        x = constrain(x, "batch", "length", None)
        return self.layers((x, jnp.zeros_like(x)), modulation.layers, cache)

    def logits(self, hidden: jax.Array, residual: jax.Array, final: jax.Array) -> jax.Array:
        """What the last block leaves, (b, l, d) twice, and its modulation -> (b, l, v)."""
        return self.head(self.final(hidden, residual, final))

    def final(self, hidden: jax.Array, residual: jax.Array, final: jax.Array) -> jax.Array:
        """The norms that end the stack, modulated: (b, l, d) twice -> (b, l, d)."""
        x = self.norm_f(hidden + residual)
        self.sow("intermediates", "norm_f_out", x)
        x = self.final_layer(x, final[0, :, 0], final[0, :, 1])
        self.sow("intermediates", "final_out", x)
        return x

    def head(self, x: jax.Array) -> jax.Array:
        """(b, l, d) -> logits (b, l, v), float32."""
        table = self.output_table()
        return jnp.einsum(
            "bld,vd->blv", x.astype(table.dtype), table, preferred_element_type=jnp.float32
        )

    def output_table(self) -> jax.Array:
        """The code embeddings (v, d), which are the output matrix too, in the compute dtype."""
        table = self.token_embedding.embedding.astype(self.config.compute_dtype)
        return gathered(table, ("vocab", "embed"))


def init_cache(
    config: AiMConfig, batch: int, *, dual: int | None = None, dtype: str = "float32"
) -> Cache:
    """The zero cache of `batch` sequences: every array is (n_layer, batch, ...).

    Args:
      batch: sequences; with guidance an image is two.
      dual: Mamba-2 only: makes the cache of the dual form, with room for so many tokens.
      dtype: of what the dual form keeps.
    """
    if dual is None:
        cache = MODULES[config.mixer][1](config, batch)
    else:
        cache = init_mamba2_dual_cache(config, batch, dual, dtype)
    return jax.tree.map(lambda x: jnp.zeros((config.n_layer, *x.shape), x.dtype), cache)


def init_params(config: AiMConfig, key: jax.Array) -> dict:
    """Random float32 parameters, boxed with their logical axes (`flax.linen.unbox` opens them)."""
    codes = jnp.zeros((1, 2), jnp.int32)
    return AiM(config).init(key, codes, jnp.zeros((1,), jnp.int32))["params"]
