"""Mamba-1 mixer (arXiv 2312.00752): full sequence and single step in one module.

Axes: b batch, l length, d model, e inner = expand d, n state, r rank of dt, w convolution width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_jax import ops
from aim_jax.models.config import AiMConfig
from aim_jax.models.layers import CausalConv1D, Dense, masked
from aim_jax.models.mamba2 import inverse_softplus_of_log_uniform


class Mamba1Cache(NamedTuple):
    """State that the mixer carries from token to token.

    Attributes:
      conv_x: (b, w-1, e) last inputs of the convolution.
      ssm_state: (b, e, n) SSM state, float32.
    """

    conv_x: jax.Array
    ssm_state: jax.Array


def a_log_init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initialize A_log to log(1 .. n) in every channel, the S4D-Real initialization."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=jnp.float32)), shape)


class Mamba1(nn.Module):
    """Mamba-1 mixer.

    Computes out_proj(selective_scan(conv(x), dt, B, C) * SiLU(z)), with dt, B and C from conv(x).
    """

    config: AiMConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Mamba1Cache | None = None, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Mamba1Cache | None]:
        """Mix x along the sequence.

        Args:
          x: inputs (b, l, d).
          cache: state after the inputs before x; None starts from zero and returns no cache.
          mask: bool (b, l); inputs where it is False change neither the state nor later outputs.

        Returns:
          y (b, l, d), and the cache after x.
        """
        cfg = self.config
        _, l, d = x.shape
        e, n, r = cfg.d_inner, cfg.d_state, cfg.dt_rank
        dtype = cfg.compute_dtype

        x = x.astype(dtype)
        xs = Dense(e, ("embed", "inner"), dtype, name="x_proj")(x)
        z = Dense(e, ("embed", "inner"), dtype, name="z_proj")(x)
        start = cache or Mamba1Cache(None, None)  # type: ignore[arg-type]
        xs = masked(xs, mask)
        conv = CausalConv1D(cfg.d_conv, "inner", dtype, cfg.conv_implementation, name="conv_x")
        xs, conv_x = conv(xs, start.conv_x)

        dt = Dense(r, ("inner", "dt_rank"), dtype, name="dt_in_proj")(xs)
        B = Dense(n, ("inner", "state"), dtype, name="B_proj")(xs)
        C = Dense(n, ("inner", "state"), dtype, name="C_proj")(xs)
        dt = Dense(e, ("dt_rank", "inner"), dtype, name="dt_proj")(dt)
        dt = masked(dt, mask, -jnp.inf)  # softplus(-inf) = 0: no decay and no input

        inner = ("inner",)
        dt_bias = self.param(
            "dt_bias", nn.with_logical_partitioning(inverse_softplus_of_log_uniform, inner), (e,)
        )
        A_log = self.param(
            "A_log", nn.with_logical_partitioning(a_log_init, ("inner", "state")), (e, n)
        )
        ones = nn.with_logical_partitioning(nn.initializers.ones, inner)
        D = self.param("D", ones, (e,), jnp.float32)
        A = -jnp.exp(A_log)

        dt = dt.astype(dt_bias.dtype)
        if cache is not None and l == 1:
            y, ssm_state = ops.selective_scan_step(
                cache.ssm_state, xs[:, 0], dt[:, 0], A, B[:, 0], C[:, 0],
                D=D, z=z[:, 0], dt_bias=dt_bias,
            )  # fmt: skip
            y = y[:, None]
        else:
            y, ssm_state = ops.selective_scan(
                xs, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, initial_state=start.ssm_state,
                chunk_size=cfg.chunk_size, implementation=cfg.scan_implementation,
            )  # fmt: skip
        y = Dense(d, ("inner", "embed"), dtype, cfg.residual_scale, name="out_proj")(
            y.astype(dtype)
        )
        return y, cache and Mamba1Cache(conv_x, ssm_state)


def init_mamba1_cache(config: AiMConfig, batch: int) -> Mamba1Cache:
    """Return the zero cache of `batch` sequences for one layer."""
    conv = jnp.zeros((batch, config.d_conv - 1, config.d_inner), jnp.dtype(config.compute_dtype))
    return Mamba1Cache(conv, jnp.zeros((batch, config.d_inner, config.d_state), jnp.float32))
