"""Mamba-2 mixer (arXiv 2405.21060): full sequence and single step in one module.

Axes: b batch, l length, d model, e inner = expand d, h heads, p headdim, n state, g SSM groups,
w convolution width.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_jax import ops
from aim_jax.models.config import AiMConfig
from aim_jax.models.layers import CausalConv1D, Dense, GatedRMSNorm, masked
from aim_jax.parallel.sharding import constrain


class Mamba2Cache(NamedTuple):
    """State that the mixer carries from token to token.

    Attributes:
      conv_x: (b, w-1, e) last inputs of the convolution of x.
      conv_B, conv_C: (b, w-1, g n) last inputs of the convolutions of B and C.
      ssm_state: (b, h, p, n) SSM state, float32; in the dual form, an `ops.DualCache`.
    """

    conv_x: jax.Array
    conv_B: jax.Array
    conv_C: jax.Array
    ssm_state: jax.Array | ops.DualCache


def inverse_softplus_of_log_uniform(
    key: jax.Array, shape: tuple[int, ...], low: float = 1e-3, high: float = 0.1
) -> jax.Array:
    """Initialize dt_bias so that softplus(dt_bias) is log-uniform in [low, high].

    See arXiv 2312.00752, section 3.6.
    """
    bounds = (jnp.log(jnp.float32(x)) for x in (low, high))
    log_dt = jax.random.uniform(key, shape, jnp.float32, *bounds)
    dt = jnp.maximum(jnp.exp(log_dt), 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))


class Mamba2(nn.Module):
    """Mamba-2 mixer.

    Computes out_proj(RMSNorm(ssd(conv(x, B, C), dt) * SiLU(z))).

    The packed input projection and convolution of the published weights are stored as one array per
    part, so that the model axis of a mesh shards only the inner channels and heads.
    """

    config: AiMConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Mamba2Cache | None = None, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Mamba2Cache | None]:
        """Mix x along the sequence.

        Args:
          x: inputs (b, l, d). With a dual-form cache l > 1 requires the cache to be empty.
          cache: state after the inputs before x; None starts from zero and returns no cache.
          mask: bool (b, l); inputs where it is False change neither the state nor later outputs.

        Returns:
          y (b, l, d), and the cache after x.
        """
        cfg = self.config
        b, l, d = x.shape
        e, h, p, g, n = cfg.d_inner, cfg.n_heads, cfg.headdim, cfg.ngroups, cfg.d_state
        dtype = cfg.compute_dtype

        x = x.astype(dtype)
        z = Dense(e, ("embed", "inner"), dtype, name="z_proj")(x)
        xs = Dense(e, ("embed", "inner"), dtype, name="x_proj")(x)
        B = Dense(g * n, ("embed", "state"), dtype, name="B_proj")(x)
        C = Dense(g * n, ("embed", "state"), dtype, name="C_proj")(x)
        dt = Dense(h, ("embed", "heads"), dtype, name="dt_proj")(x)

        z, xs = (constrain(t, "batch", "length", "inner") for t in (z, xs))
        xs, B, C = (masked(t, mask) for t in (xs, B, C))
        dt = masked(dt, mask, -jnp.inf)  # softplus(-inf) = 0: no decay and no input

        start = cache or Mamba2Cache(None, None, None, None)  # type: ignore[arg-type]

        def conv(name: str, axis: str) -> CausalConv1D:
            return CausalConv1D(cfg.d_conv, axis, dtype, cfg.conv_implementation, name=name)

        xs, conv_x = conv("conv_x", "inner")(xs, start.conv_x)
        B, conv_B = conv("conv_B", "state")(B, start.conv_B)
        C, conv_C = conv("conv_C", "state")(C, start.conv_C)

        heads = ("heads",)
        dt_bias = self.param(
            "dt_bias", nn.with_logical_partitioning(inverse_softplus_of_log_uniform, heads), (h,)
        )
        A_log = self.param("A_log", nn.with_logical_partitioning(a_log_init, heads), (h,))
        D = self.param(
            "D", nn.with_logical_partitioning(nn.initializers.ones, heads), (h,), jnp.float32
        )
        A = -jnp.exp(A_log)

        xs = xs.reshape(b, l, h, p)
        dt = dt.astype(dt_bias.dtype)
        B = B.reshape(b, l, g, n)
        C = C.reshape(b, l, g, n)
        dual = isinstance(start.ssm_state, ops.DualCache)
        if cache is not None and l == 1:
            step: Callable = ops.ssd_dual_step if dual else ops.ssd_step
            y, ssm_state = step(
                cache.ssm_state, xs[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D=D, dt_bias=dt_bias
            )
        else:
            y, ssm_state = ops.ssd_scan(
                xs, dt, A, B, C, D=D, dt_bias=dt_bias,
                initial_state=None if dual else cast(jax.Array | None, start.ssm_state),
                chunk_size=cfg.chunk_size, implementation=cfg.scan_implementation,
            )  # fmt: skip
            if isinstance(start.ssm_state, ops.DualCache):
                ssm_state = ops.ssd_dual_extend(start.ssm_state, xs, dt, A, B, dt_bias=dt_bias)
        y = GatedRMSNorm(e // g, name="norm")(y.reshape(b, l, e), z).astype(dtype)
        y = Dense(d, ("inner", "embed"), dtype, cfg.residual_scale, name="out_proj")(y)
        return y, cache and Mamba2Cache(conv_x, conv_B, conv_C, ssm_state)


def a_log_init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initialize A_log so that -A is uniform in [1, 16]."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, minval=1.0, maxval=16.0))


def init_mamba2_cache(config: AiMConfig, batch: int) -> Mamba2Cache:
    """Return the zero cache of `batch` sequences for one layer."""
    h, p, n = config.n_heads, config.headdim, config.d_state
    return _with_windows(config, batch, jnp.zeros((batch, h, p, n), jnp.float32))


def init_mamba2_dual_cache(config: AiMConfig, batch: int, tokens: int, dtype: str) -> Mamba2Cache:
    """Return the empty dual-form cache of `batch` sequences of up to `tokens` tokens, one layer."""
    h, p, g, n = config.n_heads, config.headdim, config.ngroups, config.d_state
    return _with_windows(config, batch, ops.init_dual_cache(batch, tokens, h, p, g, n, dtype))


def _with_windows(
    config: AiMConfig, batch: int, ssm_state: jax.Array | ops.DualCache
) -> Mamba2Cache:
    length = config.d_conv - 1
    gn = config.ngroups * config.d_state
    x, B, C = (
        jnp.zeros((batch, length, width), jnp.dtype(config.compute_dtype))
        for width in (config.d_inner, gn, gn)
    )
    return Mamba2Cache(x, B, C, ssm_state)
