"""Decoder of fused ops: about four calls per layer instead of dozens.

The calls of a layer are add + norm + modulate; the input projection; the mixer up to its gate; and
the output projection. The division of the gated norm is deferred to the add of the next layer. Each
call is an op of `aim_jax.ops.decode` or `aim_jax.sampling.logits`, in the implementation of the
engine.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike, DTypeLike

from aim_jax import ops
from aim_jax.models.aim import Cache, Modulation, init_layer_cache
from aim_jax.models.config import AiMConfig
from aim_jax.models.layers import modulate, rms_norm
from aim_jax.sampling.decoder import Layer, growing_segments, output_table, own_head, prefill
from aim_jax.sampling.engine import Engine
from aim_jax.sampling.logits import sample

# Indices of shift, scale and gate for the mixer and the MLP, by the number of modulation parts.
PARTS = {3: ((0, 1, 2), None), 6: ((0, 2, 4), (1, 3, 5))}
MIXER_EPS = 1e-5  # epsilon of the gated norm

# Caches of all layers, stacked: the ring of the convolution, and the states or the dual caches.
Caches = tuple[jax.Array, ...]


class Stream(NamedTuple):
    """Values between two branches of the stack.

    Attributes:
      hidden: output of the last branch, before its gate (b, d).
      residual: residual stream before that branch (b, d) float32.
      sum_squares: for the pending division of the gated norm, see `ops.add_norm_modulate`; or None.
    """

    hidden: jax.Array
    residual: jax.Array
    sum_squares: jax.Array | None


class Rows(NamedTuple):
    """Rows of the dual caches in a step.

    Attributes:
      position: index of the token.
      end: number of rows that may be read, more than `position`.
    """

    position: ArrayLike
    end: int


@struct.dataclass
class FusedDecoder:
    """Implementation of `aim_jax.sampling.decoder.Decoder` with the ops of `aim_jax.ops.decode`.

    Caches are stacked: an op takes the stacked cache and the index of the layer, and updates the
    cache in place. With kernels ("native", "triton") layers are unrolled, each with matrices of its
    own. Plain XLA ("xla") runs a loop over layers with stacked matrices, because TPUs take minutes
    to compile an unrolled program.

    Attributes:
      params: AiM parameters, with only the norms and A_log of the layers.
      matrices: by the name of the projection, a matrix (out, in) for each layer, or the matrices of
        all layers (n_layer, out, in).
      head: see `aim_jax.sampling.decoder.own_head`.
      conv: parameters of the convolutions, by the names of the kernels, layers stacked.
      ssm: the other parameters of the mixers, by the names of the kernels, layers stacked.
      config: configuration of the model.
      engine: a resolved engine.
    """

    params: dict
    matrices: dict[str, jax.Array | list[jax.Array]]
    head: jax.Array | None
    conv: dict
    ssm: dict
    config: AiMConfig = struct.field(pytree_node=False)
    engine: Engine = struct.field(pytree_node=False)

    @classmethod
    def of(cls, params: dict, config: AiMConfig, engine: Engine) -> "FusedDecoder":
        """Create a decoder from the parameters of a model.

        Args:
          params: AiM parameters, layers stacked.
          config: configuration of the model.
          engine: a resolved engine.
        """
        mixer = params["layers"]["mixer"]

        def laid_out(kernel: jax.Array) -> jax.Array | list[jax.Array]:
            if engine.implementation == "xla":
                return kernel.swapaxes(1, 2).astype(config.compute_dtype)
            return [kernel[i].T.astype(config.compute_dtype) for i in range(config.n_layer)]

        matrices = {k: laid_out(kernel) for k, kernel in _merged(params["layers"], config).items()}
        names = "xBC" if config.mixer == "mamba2" else "x"
        conv = {
            "conv_weight": jnp.concatenate([mixer[f"conv_{k}"]["kernel"] for k in names], axis=-1),
            "conv_bias": jnp.concatenate([mixer[f"conv_{k}"]["bias"] for k in names], axis=-1),
        }
        ssm = {"dt_bias": mixer["dt_bias"], "A": -jnp.exp(mixer["A_log"]), "D": mixer["D"]}
        if config.mixer == "mamba2":
            ssm["norm_scale"] = mixer["norm"]["scale"]
        head = own_head(params, config)
        kept = {k: v for k, v in params["layers"].items() if k.startswith("norm")}
        kept["mixer"] = {"A_log": mixer["A_log"]}
        return cls(  # type: ignore[call-arg]
            params | {"layers": kept}, matrices, head, conv, ssm, config, engine
        )

    def with_engine(self, engine: Engine) -> "FusedDecoder":
        """Return the decoder with another form or cache dtype; weights are shared."""
        return self.replace(engine=engine)  # type: ignore[attr-defined]

    @property
    def implementation(self) -> str:
        """Implementation of the ops; see `aim_jax.ops.implementation`."""
        assert self.engine.implementation is not None
        return self.engine.implementation

    @property
    def dtype(self) -> jnp.dtype:
        """Compute dtype of the model."""
        return jnp.dtype(self.config.compute_dtype)

    def _linear(self, x: jax.Array, matrix: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """Multiply x (b, in) by matrix (out, in) into (b, out); `dtype` is `self.dtype` if None."""
        native = self.implementation == "native"
        return ops.linear(
            x.astype(matrix.dtype), matrix, dtype=dtype or self.dtype,
            implementation="native" if native else "xla",
        )  # fmt: skip

    @property
    def _is_loop(self) -> bool:
        """True if a step is a loop over layers."""
        return self.implementation == "xla"

    def segments(self, first: int) -> list[int]:
        """Return the ends of the loop's segments after `first`; each reads more of the caches.

        Kernels read only the rows that they need.
        """
        if self._is_loop and self.engine.form == "dual":
            return growing_segments(self.config.num_tokens, first)
        return [self.config.num_tokens]

    def start(self, x: jax.Array, modulation: Modulation, tokens: int) -> Caches:
        """Return caches after the inputs x (b, l, d), l >= 0, with room for all positions."""
        del tokens
        cfg = self.config
        position = x.shape[1]
        # Prefill in float32 and round once at the end.
        dual = cfg.max_caption + cfg.num_tokens if self.engine.form == "dual" else None
        if not position:
            caches = cfg.n_layer * [init_layer_cache(cfg, x.shape[0], dual=dual)]
        else:
            scan = "triton" if self.implementation == "triton" else cfg.scan_implementation
            prefix_config = dataclasses.replace(cfg, scan_implementation=scan)
            layers = [Layer(self._weights(i), i) for i in range(cfg.n_layer)]
            caches = prefill(
                layers, _block_params, x, modulation, prefix_config, dual=dual, dtype="float32"
            )
        return _stacked_caches(caches, config=cfg, engine=self.engine, position=position)

    def _weights(self, layer: int) -> dict:
        """Return the weights of a layer: matrices of its own, and those of all layers stacked."""
        stacked = {"conv": self.conv, "ssm": self.ssm, "kept": self.params["layers"]}
        if self._is_loop:
            return {"own": {}, "stacked": stacked | {"matrices": self.matrices}}
        matrices = {name: per_layer[layer] for name, per_layer in self.matrices.items()}
        return {"own": {"matrices": matrices}, "stacked": stacked}

    def _project(self, x: jax.Array, name: str, layer: ArrayLike) -> jax.Array:
        """Multiply x (b, in) by the matrix of a layer's projection."""
        return self._linear(x, self.matrices[name][layer])  # type: ignore[index]

    def grow(self, caches: Caches, tokens: int) -> Caches:
        """Return the caches unchanged; they have room for all positions."""
        del tokens
        return caches

    def step(
        self,
        x: jax.Array,
        modulation: Modulation,
        caches: Caches,
        position: ArrayLike,
        tokens: int | None = None,
    ) -> tuple[jax.Array, Caches]:
        """Return float32 logits (b, v) and updated caches for x (b, 1, d) at `position`."""
        cfg = self.config
        rows = Rows(cfg.max_caption + position, cfg.max_caption + (tokens or cfg.num_tokens))
        parts = modulation.layers
        # The first layer takes hidden as it is, without a division or a gate.
        stream = Stream(x[:, 0], jnp.zeros_like(x[:, 0]), None)
        if self._is_loop:
            stream, caches = self._loop(stream, caches, parts, rows)
        else:
            for layer in range(cfg.n_layer):
                stream, caches = self._layer(layer, stream, caches, parts, rows)
        hidden = stream.hidden.astype(jnp.float32) * self._divisor(stream.sum_squares)
        residual = stream.residual + parts[-1, :, _last_gate(parts)] * hidden
        x = rms_norm(residual, self.params["norm_f"]["scale"], cfg.norm_eps)
        x = rms_norm(x, self.params["final_layer"]["norm_final"]["scale"], cfg.norm_eps)
        shift = modulation.final[0, :, 0]
        scale = modulation.final[0, :, 1]
        x = modulate(x[:, None], shift, scale)[:, 0]
        return self._linear(x, output_table(self.params, self.head), jnp.float32), caches

    def sample(
        self, logits: jax.Array, uniform: jax.Array, settings: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Sample one token per image, int32 (b,); see `aim_jax.sampling.logits.sample`."""
        return sample(logits, uniform, **settings, implementation=self.implementation)

    def _loop(
        self, stream: Stream, caches: Caches, parts: jax.Array, rows: Rows
    ) -> tuple[Stream, Caches]:
        """Apply all layers in a loop, whose state has the same shapes and dtypes in every round."""

        def body(layer: jax.Array, state: tuple[Stream, Caches]) -> tuple[Stream, Caches]:
            after, caches = self._layer(layer, *state, parts, rows)
            return after._replace(hidden=after.hidden.astype(stream.hidden.dtype)), caches

        cfg = self.config
        if cfg.mixer == "mamba2" and cfg.ngroups == 1 and not cfg.d_intermediate:
            nothing = jnp.zeros((stream.hidden.shape[0], cfg.n_heads), jnp.float32)
            stream = stream._replace(sum_squares=nothing)
        return jax.lax.fori_loop(0, cfg.n_layer, body, (stream, caches))

    def _layer(
        self,
        layer: ArrayLike,
        stream: Stream,
        caches: Caches,
        parts: jax.Array,
        rows: Rows,
    ) -> tuple[Stream, Caches]:
        """Apply a layer to the stream; `parts` is `Modulation.layers`."""
        mixer_parts, mlp_parts = PARTS[parts.shape[2]]
        norms = self.params["layers"]
        u, residual = self._seam(
            stream, norms["norm"]["scale"], parts, layer, mixer_parts[:2], _last_gate(parts), -1
        )
        hidden, sum_squares, caches = self._mix(u, caches, layer, rows)
        if mlp_parts:
            u, residual = self._seam(
                Stream(hidden, residual, sum_squares), norms["norm2"]["scale"], parts, layer,
                mlp_parts[:2], mixer_parts[2], 0,
            )  # fmt: skip
            up, gate = jnp.split(self._project(u, "up", layer), 2, axis=-1)
            hidden = self._project(up * jax.nn.silu(gate), "down", layer)
            sum_squares = None
        return Stream(hidden, residual, sum_squares), caches

    def _seam(self, stream, norm, parts, layer, shift_scale, gate, gate_offset):
        """Add the output of the previous branch and prepare the input of the next one."""
        shift, scale = shift_scale
        return ops.add_norm_modulate(
            stream.hidden, stream.residual, norm, parts, layer,
            sum_squares=stream.sum_squares, inner=self.config.d_inner, shift=shift, scale=scale,
            gate=gate, gate_offset=gate_offset, eps=self.config.norm_eps, mixer_eps=MIXER_EPS,
            dtype=self.dtype, implementation=self.implementation,
        )  # fmt: skip

    def _divisor(self, sum_squares: jax.Array | None) -> jax.Array | float:
        if sum_squares is None:
            return 1.0
        mean = jnp.sum(sum_squares, axis=1, keepdims=True) / self.config.d_inner
        return jax.lax.rsqrt(mean + MIXER_EPS)

    def _mix(
        self,
        u: jax.Array,
        caches: Caches,
        layer: ArrayLike,
        rows: Rows,
    ) -> tuple[jax.Array, jax.Array | None, Caches]:
        """Apply the mixer of a layer to u (b, d).

        Returns:
          The output (b, d) before the division of the gated norm; the sums of squares for that
          division, or None if none is pending; and the updated caches.
        """
        cfg = self.config
        projected = self._project(u, "in", layer)
        options: dict[str, Any] = {"implementation": self.implementation}
        if cfg.mixer == "mamba1":
            ring, state = caches
            x, ring = ops.conv_step(projected, ring, layer, rows.position, **self.conv, **options)
            dt_BC = self._project(x, "x", layer)
            dt = self._project(dt_BC[:, : cfg.dt_rank], "dt", layer)
            y, state = ops.mamba1_step(x, dt, dt_BC, projected, state, layer, **self.ssm, **options)
            return self._project(y, "out", layer), None, (ring, state)
        step: Callable = ops.mamba2_step
        if self.engine.form == "dual":
            step = functools.partial(ops.dual_step, room=rows.end)
        y, sum_squares, *caches = step(
            projected, *caches, layer, rows.position, **self.conv, **self.ssm, **options
        )
        if cfg.ngroups > 1:  # the division does not commute with the output projection
            groups = sum_squares.reshape(y.shape[0], cfg.ngroups, -1).sum(axis=-1, keepdims=True)
            rstd = jax.lax.rsqrt(groups / (cfg.d_inner / cfg.ngroups) + MIXER_EPS)
            y = (y.reshape(y.shape[0], cfg.ngroups, -1) * rstd).reshape(y.shape)
            sum_squares = None
        return self._project(y, "out", layer), sum_squares, tuple(caches)


@functools.partial(jax.jit, static_argnames=("config", "engine"))
def _stacked_caches(
    caches: Sequence[Cache], *, config: AiMConfig, engine: Engine, position: ArrayLike
) -> Caches:
    """Stack the caches of the layers after `position` inputs."""
    cache = jax.tree.map(lambda *layers: jnp.stack(layers), *caches)
    windows = [getattr(cache, f"conv_{k}") for k in _convolved(config)]
    # The native kernels compute the convolution in float32 and keep its inputs in float32.
    ring_dtype = jnp.float32 if engine.implementation == "native" else config.compute_dtype
    ring = ops.conv_ring(jnp.concatenate(windows, axis=-1).astype(ring_dtype), position)
    rounded = functools.partial(jnp.asarray, dtype=engine.cache_dtype)
    if isinstance(cache.ssm_state, ops.DualCache):
        past = cache.ssm_state
        return ring, rounded(past.inputs), rounded(past.B), past.log_decay
    return ring, rounded(cache.ssm_state)


def _last_gate(parts: jax.Array) -> int:
    """Return the index of the gate of a layer's last branch."""
    mixer_parts, mlp_parts = PARTS[parts.shape[2]]
    return (mlp_parts or mixer_parts)[2]


def _convolved(config: AiMConfig) -> str:
    """Return the names of the inputs of the convolutions, in the order of the kernels."""
    return "xBC" if config.mixer == "mamba2" else "x"


def _merged_projections(config: AiMConfig) -> dict[str, dict[str, int]]:
    """Return the projections that share an input, and their numbers of outputs, by merged name."""
    e = config.d_inner
    n = config.d_state
    gn = config.ngroups * n
    if config.mixer == "mamba2":
        return {"in": {"z": e, "x": e, "B": gn, "C": gn, "dt": config.n_heads}}
    return {"in": {"x": e, "z": e}, "x": {"dt_in": config.dt_rank, "B": n, "C": n}, "dt": {"dt": e}}


def _merged(layers: dict, config: AiMConfig) -> dict:
    """Return kernels (layers, in, out), concatenated where they share an input, by projection."""
    mixer = layers["mixer"]

    def joined(names):
        return jnp.concatenate([mixer[f"{name}_proj"]["kernel"] for name in names], axis=-1)

    merged = {name: joined(parts) for name, parts in _merged_projections(config).items()}
    merged["out"] = mixer["out_proj"]["kernel"]
    if config.d_intermediate:
        mlp = {name: layers["mlp"][name]["kernel"] for name in ("fc1", "gate", "fc2")}
        merged |= {"up": jnp.concatenate([mlp["fc1"], mlp["gate"]], axis=-1), "down": mlp["fc2"]}
    return merged


def _block_params(layer: Layer, config: AiMConfig) -> dict:
    """Return the parameters of `Block` for a layer of `FusedDecoder`."""

    def parts(array: jax.Array, sizes: Iterable[int], axis: int) -> list[jax.Array]:
        return jnp.split(array, np.cumsum(list(sizes))[:-1].tolist(), axis=axis)

    own = layer.weights["own"] | jax.tree.map(lambda x: x[layer.index], layer.weights["stacked"])
    matrices = own["matrices"]
    conv = own["conv"]
    ssm = own["ssm"]
    mixer = {"out_proj": {"kernel": matrices["out"].T}}
    for merged, sizes in _merged_projections(config).items():
        for name, matrix in zip(sizes, parts(matrices[merged], sizes.values(), 0), strict=True):
            mixer[f"{name}_proj"] = {"kernel": matrix.T}
    gn = config.ngroups * config.d_state
    widths = (config.d_inner, gn, gn)[: len(_convolved(config))]
    kernels = parts(conv["conv_weight"], widths, -1)
    biases = parts(conv["conv_bias"], widths, -1)
    for name, kernel, bias in zip(_convolved(config), kernels, biases, strict=True):
        mixer[f"conv_{name}"] = {"kernel": kernel, "bias": bias}
    mixer |= own["kept"]["mixer"] | {"dt_bias": ssm["dt_bias"], "D": ssm["D"]}
    if config.mixer == "mamba2":
        mixer["norm"] = {"scale": ssm["norm_scale"]}
    block = own["kept"] | {"mixer": mixer}
    if config.d_intermediate:
        fc1, gate = jnp.split(matrices["up"], 2)
        block["mlp"] = {
            "fc1": {"kernel": fc1.T}, "gate": {"kernel": gate.T},
            "fc2": {"kernel": matrices["down"].T},
        }  # fmt: skip
    return block
