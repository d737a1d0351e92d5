"""AiM: class-conditional autoregressive image generation with Mamba (arXiv 2408.12245).

A class embedding and t - 1 code embeddings enter a stack of Mamba blocks modulated by adaLN; output
i predicts code i. b batch, l length, t tokens of an image, d model, v vocabulary.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_jax import ops
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
from aim_jax.sharding import constrain

MIXERS: dict[str, tuple] = {
    "mamba1": (Mamba1, init_mamba1_cache),
    "mamba2": (Mamba2, init_mamba2_cache),
}
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
Cache = Mamba1Cache | Mamba2Cache


@dataclasses.dataclass(frozen=True)
class AiMConfig:
    """Shape of an AiM model; the defaults are AiM-B.

    Attributes:
      vocab_size, num_classes, num_tokens: codes, classes (a null class is added), codes per image.
      d_model, n_layer: width and depth.
      mixer: "mamba2" or "mamba1".
      d_state, d_conv, expand: SSM state size, convolution width, inner width / d_model.
      headdim, ngroups: Mamba-2 only: channels per head, groups that share B and C.
      chunk_size: tokens per chunk of the training scan; changes speed, not results.
      ssm_scan: what scans whole sequences: "xla", or "triton", kernels for NVIDIA GPUs that have no
        derivative; changes speed, not results.
      d_intermediate: width of a gated MLP after each mixer, rounded up to a multiple of 128; 0 is
        none.
      adaln: "layer" (one map per layer) or "group" (`num_groups` shared maps and a table per layer;
        one group is adaLN-single).
      num_groups: maps shared by the layers when adaln="group".
      positions: whether codes get position embeddings (the paper's ablation goes without).
      position_offset: position row of code j is j + position_offset. 0 is what the paper's training
        does; 1 is what its published sampler does.
      class_dropout, token_dropout: training only: probability of the null class; dropout of inputs.
      norm_eps: added to mean squares.
      compute_dtype: dtype of projections and convolutions ("float32" or "bfloat16"); parameters,
        residual stream, norms, decays, states and logits are float32.
      remat: "none", "dots" or "full": what backpropagation recomputes per block.
      logits_chunk: tokens of an image whose logits the training loss holds at once; 0 is all.
      scan_unroll: layers per iteration of the loop over layers; n_layer unrolls it whole.
    """

    vocab_size: int = 16384
    num_classes: int = 1000
    num_tokens: int = 256
    d_model: int = 768
    n_layer: int = 24
    mixer: str = "mamba2"
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    chunk_size: int = 64
    ssm_scan: str = "xla"
    d_intermediate: int = 0
    adaln: str = "layer"
    num_groups: int = 1
    positions: bool = True
    position_offset: int = 0
    class_dropout: float = 0.1
    token_dropout: float = 0.0
    norm_eps: float = 1e-5
    compute_dtype: str = "float32"
    remat: str = "none"
    logits_chunk: int = 0
    scan_unroll: int = 1

    def __post_init__(self):
        def require(ok, message):
            if not ok:
                raise ValueError(f"AiMConfig: {message}")

        require(self.mixer in MIXERS, f"mixer={self.mixer!r}; expected one of {sorted(MIXERS)}.")
        require(self.remat in REMAT, f"remat={self.remat!r}; expected one of {sorted(REMAT)}.")
        require(
            self.ssm_scan in ("xla", "triton"),
            f"ssm_scan={self.ssm_scan!r}; expected 'xla' or 'triton'.",
        )
        require(
            self.adaln in ("layer", "group"), f"adaln={self.adaln!r}; expected 'layer' or 'group'."
        )
        require(self.position_offset in (0, 1), "position_offset must be 0 or 1.")
        sizes = ("vocab_size", "num_classes", "num_tokens", "d_model", "n_layer", "d_state")
        sizes += ("d_conv", "expand", "headdim", "ngroups", "chunk_size", "num_groups")
        for name in (*sizes, "scan_unroll"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1.")
        require(self.logits_chunk >= 0, f"logits_chunk={self.logits_chunk} must not be negative.")
        if self.mixer == "mamba2":
            require(
                self.d_inner % self.headdim == 0,
                f"expand * d_model = {self.d_inner} is not a multiple of headdim={self.headdim}.",
            )
            require(
                self.n_heads % self.ngroups == 0,
                f"{self.n_heads} heads cannot be shared among ngroups={self.ngroups}.",
            )

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def n_heads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def dt_rank(self) -> int:
        """Rank of the Mamba-1 dt projection."""
        return math.ceil(self.d_model / 16)

    @property
    def mlp_hidden(self) -> int:
        return -(-self.d_intermediate // 128) * 128

    @property
    def modulation_parts(self) -> int:
        return 6 if self.d_intermediate else 3

    @property
    def residual_scale(self) -> float:
        """Shrinks the initial output maps of residual branches: 1 / sqrt(branches)."""
        return (self.n_layer * (2 if self.d_intermediate else 1)) ** -0.5


PRESETS = {
    "B": AiMConfig(),
    "L": AiMConfig(d_model=1024, n_layer=48, adaln="group", num_groups=4),
    "XL": AiMConfig(d_model=1536, n_layer=48, adaln="group", num_groups=4),
    "1B": AiMConfig(d_model=2048, n_layer=48, adaln="group", num_groups=4),
}


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
    def __call__(self, carry, modulation: jax.Array, cache: Cache | None):
        """carry = (hidden, residual), each (b, l, d); modulation (b, parts, d)."""
        cfg = self.config
        hidden, residual = carry
        parts = jnp.split(modulation, cfg.modulation_parts, axis=1)
        parts = [part[:, 0] for part in parts]
        if cfg.d_intermediate:
            shift, shift_mlp, scale, scale_mlp, gate, gate_mlp = parts
        else:
            shift, scale, gate = parts
        mixer = MIXERS[cfg.mixer][0](cfg, name="mixer")

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

    def setup(self):
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
            block = nn.remat(Block, policy=REMAT[cfg.remat], prevent_cse=False)
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

    def stack(self, x: jax.Array, modulation: Modulation, cache: Cache | None = None):
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
    """The zero cache of `batch` sequences: every array leads with the layer axis.

    Args:
      dual: Mamba-2 only: makes the cache of the dual form, with room for so many tokens.
      dtype: of what the dual form keeps.
    """
    if dual is None:
        cache = MIXERS[config.mixer][1](config, batch)
    else:
        cache = init_mamba2_dual_cache(config, batch, dual, dtype)
    return jax.tree.map(lambda x: jnp.zeros((config.n_layer, *x.shape), x.dtype), cache)


def init_params(config: AiMConfig, key: jax.Array) -> dict:
    """Random float32 parameters, boxed with their logical axes (`flax.linen.unbox` opens them)."""
    codes = jnp.zeros((1, 2), jnp.int32)
    return AiM(config).init(key, codes, jnp.zeros((1,), jnp.int32))["params"]
