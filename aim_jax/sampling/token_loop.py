"""Token loop: samples the tokens of a batch of images one after the other, in compiled programs.

Shapes: b images; rows, the sequences of a decoder, of which a guided image has two; t tokens per
image.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from aim_jax.models.aim import AiM, Modulation
from aim_jax.models.captions import Condition, null_condition
from aim_jax.models.config import AiMConfig
from aim_jax.models.sampling_config import SCHEDULES
from aim_jax.sampling.decoder import Decoder, ModuleDecoder
from aim_jax.sampling.engine import Engine
from aim_jax.sampling.fused_decoder import FusedDecoder
from aim_jax.sampling.logits import guidance_at
from aim_jax.utils.random import GENERATOR


class Request(NamedTuple):
    """Specification of the images to generate, one entry per image.

    Attributes:
      condition: class or caption of each image, see `aim_jax.sampling.conditions.as_condition`.
      index: int (b,), index of each image in its series.
      settings: (b,) arrays by name; see `SamplingConfig.arrays`.
      prefix: int (b, l), the first tokens of the images; l may be 0.
    """

    condition: Condition
    index: jax.Array  # type: ignore[assignment]  # tuples have a method of that name
    settings: dict[str, jax.Array]
    prefix: jax.Array


class Series(NamedTuple):
    """Randomness and guidance that all images of a series share.

    Attributes:
      random: key data of `GENERATOR`.
      schedule: () int32, guidance schedule, as its index in `SCHEDULES`.
      interval: (2,) float32; see `guidance_at`.
    """

    random: jax.Array
    schedule: jax.Array
    interval: jax.Array

    @classmethod
    def of(cls, key: jax.Array, schedule: str, interval: tuple[float, float]) -> "Series":
        """Create a series from a random key and the settings for the whole batch."""
        index = jnp.asarray(SCHEDULES.index(schedule), jnp.int32)
        return cls(jax.random.key_data(key), index, jnp.asarray(interval, jnp.float32))


class Loop(NamedTuple):
    """State of the token loop between two tokens.

    Attributes:
      tokens: int32 (b, t), those sampled so far, then zeros.
      finite: bool (b,), whether all logits of an image were finite so far.
      x: (rows, 1, d), the next input.
      caches: caches of the decoder.
      keys: (b,), a random key per image.
    """

    tokens: jax.Array
    finite: jax.Array
    x: jax.Array
    caches: object
    keys: jax.Array


class Tokens(NamedTuple):
    """Result of the token loop.

    Attributes:
      tokens: int32 (b, t), in raster order.
      finite: bool (b,), whether all logits of an image were finite.
    """

    tokens: jax.Array
    finite: jax.Array


def make_decoder(
    params: dict, config: AiMConfig, engine: Engine, platform: str | None = None
) -> Decoder:
    """Return the decoder of a resolved engine.

    Args:
      params: AiM parameters.
      config: configuration of the model.
      engine: a resolved engine.
      platform: "cpu", "gpu", "cuda" or "tpu"; None if the decoder may run on any.
    """
    if engine.implementation == "xla" and platform in (None, "cpu"):
        return ModuleDecoder.of(params, config, engine)
    return FusedDecoder.of(params, config, engine)


def generate_on_device(
    decoder: Decoder,
    request: Request,
    series: Series,
    *,
    guided: bool,
    every: int | None = None,
    watch: Callable[[Loop, int], None] | None = None,
    device: jax.Device | None = None,
) -> Tokens:
    """Generate the tokens of a request on one device.

    Args:
      decoder: decoder with a resolved engine.
      request: the images to generate.
      series: what they share.
      guided: whether each image has a second row, of the null class or the null caption.
      every: tokens between two calls of `watch`; None runs the loop in the pieces of the decoder.
      watch: called as watch(loop, n) after each piece, with the number of tokens so far.
      device: where to run compiled programs one after the other; None makes this a part of the
        program that it is called in. On CPUs pieces of any length share a program. On GPUs a known
        number of steps lets XLA queue many of them at once.
    """
    first = request.prefix.shape[1]
    last = decoder.config.num_tokens
    modulation, loop = _begin(decoder, request, series, guided)
    if device is not None:
        # Programs are compiled once more for arrays that are bound to no device.
        loop = jax.device_put(loop, device)
    is_cpu = device is not None and device.platform == "cpu"
    advance = _advance_traced if is_cpu else _advance
    # Pieces of one size share one program if all caches have their final size.
    ends = decoder.segments(first) if every is None else [*range(first + every, last, every), last]
    for start, end in zip([first, *ends], ends, strict=False):
        tokens = end if every is None else last
        loop = loop._replace(caches=_grow(decoder, loop.caches, tokens=tokens))
        position = jnp.asarray(start, jnp.int32)
        loop = advance(
            decoder, modulation, loop, request.settings, series, position, end - start,
            guided=guided, tokens=tokens,
        )  # fmt: skip
        if watch is not None:
            watch(loop, end)
    return Tokens(loop.tokens, loop.finite)


def _begin(
    decoder: Decoder, request: Request, series: Series, guided: bool
) -> tuple[Modulation, Loop]:
    """Return the modulation of the images, and the loop state before the first sampled token."""
    before, x, modulation, keys = _inputs(decoder, request, series, guided=guided)
    first = request.prefix.shape[1]
    room = decoder.segments(first)[0]
    if before.shape[1]:
        caches = decoder.start(before, modulation, room)
    else:
        caches = _start(decoder, before, modulation, tokens=room)
    tokens = jnp.pad(request.prefix, [(0, 0), (0, decoder.config.num_tokens - first)])
    finite = jnp.ones(tokens.shape[:1], bool)
    return modulation.after_caption(), Loop(tokens, finite, x, caches, keys)


@functools.partial(jax.jit, static_argnames="guided")
def _inputs(
    decoder: Decoder, request: Request, series: Series, *, guided: bool
) -> tuple[jax.Array, jax.Array, Modulation, jax.Array]:
    """Return all inputs but the last (rows, l, d), the last, the modulation, and keys (b,)."""
    condition = request.condition
    prefix = request.prefix
    if guided:
        null = null_condition(decoder.config, condition)
        condition = jax.tree.map(lambda *rows: jnp.concatenate(rows), condition, null)
        prefix = jnp.concatenate([prefix, prefix])
    index = jnp.arange(prefix.shape[1], dtype=jnp.int32)

    def apply(name: str, *args: Any) -> Any:
        return AiM(decoder.config).apply({"params": decoder.params}, *args, method=name)

    start, modulation = apply("condition", condition)
    x = jnp.concatenate([start, apply("embed_codes", prefix, index)], axis=1)
    base = jax.random.wrap_key_data(series.random, impl=GENERATOR)
    keys = jax.vmap(functools.partial(jax.random.fold_in, base))(request.index)
    return x[:, :-1], x[:, -1:], modulation, keys


@functools.partial(jax.jit, static_argnames="tokens")
def _start(decoder: Decoder, x: jax.Array, modulation: Modulation, *, tokens: int) -> Any:
    return decoder.start(x, modulation, tokens)


@functools.partial(jax.jit, static_argnames="tokens")
def _grow(decoder: Decoder, caches: Any, *, tokens: int) -> Any:
    return decoder.grow(caches, tokens)


def _sample_tokens(
    decoder: Decoder,
    modulation: Modulation,
    loop: Loop,
    settings: dict[str, jax.Array],
    series: Series,
    first: jax.Array,
    count: ArrayLike,
    *,
    guided: bool,
    tokens: int | None = None,
) -> Loop:
    """Sample `count` tokens from position `first` on; `tokens` bounds those there are then."""
    config = decoder.config
    rows_per_image = 2 if guided else 1

    def step(i: jax.Array, loop: Loop) -> Loop:
        position = first + i
        logits, caches = decoder.step(loop.x, modulation, loop.caches, position, tokens)
        finite = jnp.all(jnp.isfinite(logits), axis=-1).reshape(rows_per_image, -1).all(axis=0)
        scale = guidance_at(
            position, config.num_tokens, settings["cfg_scale"], series.schedule, series.interval
        )
        uniform = jax.vmap(
            lambda key: jax.random.uniform(jax.random.fold_in(key, position), dtype=jnp.float32)
        )(loop.keys)
        token = decoder.sample(logits, uniform, settings | {"cfg_scale": scale})
        x = AiM(config).apply(
            {"params": decoder.params}, token[:, None], position[None], method="embed_codes"
        )
        sampled = jax.lax.dynamic_update_slice_in_dim(loop.tokens, token[:, None], position, axis=1)
        x = jnp.concatenate([x] * rows_per_image)
        return Loop(sampled, loop.finite & finite, x, caches, loop.keys)

    return jax.lax.fori_loop(0, count, step, loop)


# The number of steps is known when compiling, or is not.
_advance = jax.jit(
    _sample_tokens, static_argnames=("count", "guided", "tokens"), donate_argnames="loop"
)
_advance_traced = jax.jit(
    _sample_tokens, static_argnames=("guided", "tokens"), donate_argnames="loop"
)


@functools.lru_cache
def device_mesh(devices: tuple[jax.Device, ...]) -> Mesh:
    """Return the one-axis mesh over which the images are divided."""
    return Mesh(np.array(devices), ("data",))


@functools.partial(jax.jit, static_argnames=("guided", "mesh"))
def generate_sharded(
    decoder: Decoder, request: Request, series: Series, *, guided: bool, mesh: Mesh
) -> Tokens:
    """Run `generate_on_device` on several devices; their number must divide b."""
    generate_shares = jax.shard_map(
        functools.partial(generate_on_device, guided=guided),
        mesh=mesh,
        in_specs=(P(), P("data"), P()),
        out_specs=P("data"),
        check_vma=False,
    )
    return generate_shares(decoder, request, series)
