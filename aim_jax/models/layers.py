"""Layers of the AiM stack: norms, causal convolution, projections, embeddings, adaLN."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from aim_jax import ops
from aim_jax.ops.products import precision_of, product
from aim_jax.ops.reference import with_rank
from aim_jax.parallel.sharding import constrain

PROJECTION = "projection"  # name of the outputs of `Dense` for rematerialization


def at_least_fp32(x: jax.Array) -> jax.Array:
    """Cast x to float32, or keep a wider dtype."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rms_norm(x: jax.Array, weight: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467).

    The result is at least float32.
    """
    x = at_least_fp32(x)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * rstd * with_rank(weight, x.ndim)


def gated_rms_norm(
    x: jax.Array,
    z: jax.Array,
    weight: jax.Array,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> jax.Array:
    """Compute RMSNorm(x * SiLU(z)) * weight, in at least float32.

    Args:
      x, z: inputs and gates (..., e).
      weight: scales (e,).
      eps: added to the mean square.
      group_size: channels that share a mean square; None means all of them.
      norm_before_gate: compute RMSNorm(x) * weight * SiLU(z) instead.
    """
    x = at_least_fp32(x)
    gate = nn.silu(at_least_fp32(z))
    x = x if norm_before_gate else x * gate
    if group_size in (None, x.shape[-1]):  # XLA is slow on CPU where an axis of groups has size one
        normed = rms_norm(x, weight, eps)
    else:
        groups = x.reshape(*x.shape[:-1], -1, group_size)
        normed = rms_norm(groups, weight.reshape(-1, group_size), eps).reshape(x.shape)
    return normed * gate if norm_before_gate else normed


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Compute x * (1 + scale) + shift for x (b, l, d).

    Shift and scale are (b, d), or (b, l, d) where they differ between positions.
    """
    chex.assert_rank([x, shift, scale], [3, {2, 3}, {2, 3}])
    shift, scale = (part if part.ndim == 3 else part[:, None] for part in (shift, scale))
    return x * (1 + scale) + shift


def masked(x: jax.Array, mask: jax.Array | None, value: float = 0.0) -> jax.Array:
    """Replace x (b, l, ...) by `value` where `mask` (b, l) is False; None keeps everything."""
    return x if mask is None else jnp.where(mask[..., None], x, jnp.asarray(value, x.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square norm with one learned scale per channel.

    Attributes:
      axis: logical axis of the channels.
      eps: added to the mean square.
    """

    axis: str = "embed"
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x over its last axis, in at least float32."""
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        return rms_norm(x, self.param("scale", init, (x.shape[-1],), jnp.float32), self.eps)


class GatedRMSNorm(nn.Module):
    """RMSNorm of x * SiLU(z), as in the Mamba-2 mixer (arXiv 2405.21060, section 7).

    Attributes:
      group_size: channels that share a mean square: d_inner / ngroups.
      eps: added to the mean square.
    """

    group_size: int
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        """Gate x by z and normalize over the last axis, in at least float32."""
        init = nn.with_logical_partitioning(nn.initializers.ones, ("inner",))
        weight = self.param("scale", init, (x.shape[-1],), jnp.float32)
        return gated_rms_norm(x, z, weight, eps=self.eps, group_size=self.group_size)


class CausalConv1D(nn.Module):
    """Depthwise causal convolution of width w, followed by SiLU, with carried state.

    Attributes:
      width: number of taps w; the last one weighs the current input.
      axis: logical axis of the channels.
      dtype: dtype of the computation and of the state.
      implementation: of `ops.causal_conv1d`.
    """

    width: int
    axis: str
    dtype: str
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, state: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Convolve x.

        Args:
          x: inputs (b, l, c).
          state: the w - 1 inputs before x (b, w - 1, c); zeros when None.

        Returns:
          y (b, l, c), and the last w - 1 inputs (b, w - 1, c).
        """
        init = uniform_init(self.width)
        kernel_init = nn.with_logical_partitioning(init, (None, self.axis))
        bias_init = nn.with_logical_partitioning(init, (self.axis,))
        kernel = self.param("kernel", kernel_init, (self.width, x.shape[-1]))
        bias = self.param("bias", bias_init, (x.shape[-1],))
        y, state = ops.causal_conv1d(
            x.astype(self.dtype), kernel, bias, initial_state=state,
            implementation=self.implementation,
        )  # fmt: skip
        return y, state.astype(self.dtype)


def uniform_init(fan_in: int, scale: float = 1.0) -> Callable[..., jax.Array]:
    """Return an initializer U(-s, s), s = scale / sqrt(fan_in); scale 1 is PyTorch's default."""
    bound = scale * fan_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Dense(nn.Module):
    """Linear layer without bias whose kernel (in, out) carries logical axes.

    Attributes:
      features: outputs.
      axes: logical axes of the kernel.
      dtype: dtype of the product.
      scale: factor on the initial kernel.
    """

    features: int
    axes: tuple[str, str]
    dtype: str
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Project x (b, l, in) to (b, l, out)."""
        init = nn.with_logical_partitioning(uniform_init(x.shape[-1], self.scale), self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        kernel = gathered(kernel.astype(self.dtype), self.axes)
        precision = precision_of(self.dtype)
        if x.shape[1] > 1:
            # All positions in one axis: on CPU, XLA is slow at gradients that sum over two axes.
            rows = x.reshape(-1, x.shape[-1])
            y = jnp.matmul(rows, kernel, precision=precision).reshape(*x.shape[:-1], -1)
            return checkpoint_name(y, PROJECTION)
        # On CPU, a product with few rows is faster with the kernel on the left.
        return jnp.matmul(kernel.T, x[:, 0].T, precision=precision).T[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(kernel: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Gather a parameter along "embed", the axis that FSDP shards, so that activations stay put.

    Projections cast to the compute dtype first, so that devices exchange bfloat16 and not float32
    (`AdaLN` computes in float32). The gradient is constrained to be sharded again, so that the
    devices' contributions are summed by a reduce-scatter.
    """
    return constrain(kernel, *(None if axis == "embed" else axis for axis in axes))


gathered.defvjp(
    lambda kernel, axes: (gathered(kernel, axes), None),
    lambda axes, _, gradient: (constrain(gradient, *axes),),
)


def embedding(size: int, features: int, axis: str) -> nn.Embed:
    """Return an embedding table (size, features), initialized from N(0, 0.02^2)."""
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (axis, "embed"))
    return nn.Embed(size, features, embedding_init=init)


class LabelEmbedder(nn.Module):
    """Class embedding with a null class, which replaces labels at random while training.

    The null class makes classifier-free guidance possible (arXiv 2207.12598).

    Attributes:
      num_classes: number of real classes; the null class is row `num_classes`.
      features: d_model.
      dropout: probability that training replaces a label by the null class.
    """

    num_classes: int
    features: int
    dropout: float

    def setup(self) -> None:
        """Create the embedding table."""
        self.table = embedding(self.num_classes + 1, self.features, "class")

    def __call__(self, labels: jax.Array, train: bool = False) -> jax.Array:
        """Embed int labels (b,) as (b, d); training with dropout needs the "dropout" rng."""
        if train and self.dropout:
            rate = jnp.float32(self.dropout)
            drop = jax.random.bernoulli(self.make_rng("dropout"), rate, labels.shape)
            labels = jnp.where(drop, self.num_classes, labels)
        return self.table(labels)


class AdaLN(nn.Module):
    """Modulation of every layer by the class embedding: adaLN-Group (AiM, section 3.3).

    Layer i uses group i mod `num_groups`:

        m_i = W_g SiLU(c) + b_g + table_i,  g = i mod num_groups

    One group is adaLN-single. As many groups as layers, without tables, is ordinary adaLN in every
    layer. `group_to_layer` rewrites a grouped model as a per-layer one with equal outputs.

    Attributes:
      n_layer: number of layers.
      num_groups: number of linear maps that the layers share.
      parts: modulation vectors per layer: 3, or 6 with an MLP.
      table: add a learned vector per layer to the group's output.
    """

    n_layer: int
    num_groups: int
    parts: int
    table: bool

    @nn.compact
    def __call__(self, c: jax.Array) -> jax.Array:
        """Map class embeddings c (b, d) to modulations (n_layer, b, parts, d)."""
        d = c.shape[-1]
        # Shared maps start as linear layers, per-layer maps at zero (identity blocks).
        init = uniform_init(d) if self.table else nn.initializers.zeros
        axes = ("adaln_group", "embed", "adaln_part", "modulation")
        shape = (self.num_groups, d, self.parts, d)
        kernel = self.param("kernel", nn.with_logical_partitioning(init, axes), shape, jnp.float32)
        zeros = nn.with_logical_partitioning(
            nn.initializers.zeros, ("adaln_group", "adaln_part", "modulation")
        )
        bias = self.param("bias", zeros, (self.num_groups, self.parts, d), jnp.float32)
        group = jnp.arange(self.n_layer, dtype=jnp.int32) % self.num_groups
        offset = bias[group]
        if self.table:
            init = nn.with_logical_partitioning(
                nn.initializers.normal(d**-0.5), ("layers", "adaln_part", "modulation")
            )
            table_shape = (self.n_layer, self.parts, d)
            offset = offset + self.param("table", init, table_shape, jnp.float32)
        kernel = gathered(kernel, axes)
        shared = product("bd,gdpe->gbpe", nn.silu(c), kernel)
        return shared[group] + offset[:, None]


def group_to_layer(adaln: dict) -> dict:
    """Rewrite grouped adaLN parameters as per-layer ones with equal outputs.

    Args:
      adaln: `kernel` (groups, d, parts, d), `bias` (groups, parts, d), `table` (n_layer, parts, d).

    Returns:
      `kernel` (n_layer, d, parts, d) and `bias` (n_layer, parts, d).
    """
    group = np.arange(adaln["table"].shape[0]) % adaln["kernel"].shape[0]
    return {"kernel": adaln["kernel"][group], "bias": adaln["bias"][group] + adaln["table"]}


def layer_to_group(adaln: dict, num_groups: int) -> tuple[dict, float]:
    """Approximate per-layer adaLN parameters by grouped ones.

    A shared map is the mean of its layers' maps, the nearest one in the sum of squares. Differences
    between biases go into the tables. Outputs are therefore equal only if the layers of a group
    have equal kernels.

    Args:
      adaln: `kernel` (n_layer, d, parts, d), `bias` (n_layer, parts, d).
      num_groups: number of groups; 1 is adaLN-single.

    Returns:
      `kernel` (num_groups, d, parts, d), `bias` (num_groups, parts, d) and `table` (n_layer, parts,
      d) as NumPy arrays, and the relative error of the kernels, |k - k_group| / |k| over all
      layers.
    """
    kernel = np.asarray(adaln["kernel"])
    bias = np.asarray(adaln["bias"])
    shared = np.empty((num_groups, *kernel.shape[1:]), kernel.dtype)
    error = total = 0.0
    for g in range(num_groups):
        members = kernel[g::num_groups]
        shared[g] = members.mean(axis=0, dtype=np.float64)
        for member in members:
            error += np.sum(np.square(member - shared[g], dtype=np.float64))
            total += np.sum(np.square(member, dtype=np.float64))
    means = [bias[g::num_groups].mean(axis=0, dtype=np.float64) for g in range(num_groups)]
    center = np.stack(means).astype(bias.dtype)
    table = bias - center[np.arange(len(bias)) % num_groups]
    relative_error = float(np.sqrt(error / total)) if total else 0.0
    return {"kernel": shared, "bias": center, "table": table}, relative_error


class FinalLayer(nn.Module):
    """Final norm, modulated by the class embedding."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
        """Normalize and modulate x (b, l, d) by shift and scale (b, d)."""
        return modulate(RMSNorm(eps=self.eps, name="norm_final")(x), shift, scale)


class GatedMLP(nn.Module):
    """Gated MLP: fc2(fc1 x * SiLU(gate x)).

    Attributes:
      hidden: inner width.
      dtype: dtype of the products.
      out_scale: factor on the initial output map (residual branches use 1 / sqrt(branches)).
    """

    hidden: int
    dtype: str
    out_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (b, l, d) to (b, l, d)."""
        d = x.shape[-1]
        up = Dense(self.hidden, ("embed", "inner"), self.dtype, name="fc1")(x)
        gate = Dense(self.hidden, ("embed", "inner"), self.dtype, name="gate")(x)
        out = Dense(d, ("inner", "embed"), self.dtype, self.out_scale, name="fc2")
        return out(up * nn.silu(gate))
