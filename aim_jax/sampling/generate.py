"""Image generation from classes or captions, with a jitted token loop.

Shapes: b images, t tokens per image, v vocabulary entries.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from aim_jax.models.aim import AiM, Modulation
from aim_jax.models.captions import (
    CaptionFeatures,
    Condition,
    null_condition,
    padded,
    rows_of,
)
from aim_jax.models.config import AiMConfig, VQConfig
from aim_jax.models.vq import VQModel
from aim_jax.parallel import sharding
from aim_jax.sampling.conditions import as_array, as_condition
from aim_jax.sampling.config import SamplingConfig
from aim_jax.sampling.decoder import Decoder, ModuleDecoder
from aim_jax.sampling.engine import Engine, resolve
from aim_jax.sampling.fused_decoder import FusedDecoder
from aim_jax.sampling.logits import guidance_at
from aim_jax.utils.checks import check_type
from aim_jax.utils.images import to_uint8
from aim_jax.utils.random import GENERATOR, is_key, random_key
from aim_jax.weights.pretrained import Pretrained


class Samples(NamedTuple):
    """Generated tokens and images.

    Attributes:
      tokens: int32 (b, t), in raster order.
      images: uint8 (b, H, W, c).
    """

    tokens: jax.Array
    images: jax.Array


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


class Method(NamedTuple):
    """Static part of the token loop; see `generate_tokens`.

    Attributes:
      config: configuration of the model.
      guided: whether each image has a second row, of the null class or the null caption.
      schedule: guidance schedule; see `guidance_at`.
      engine: a resolved engine.
    """

    config: AiMConfig
    guided: bool
    schedule: str
    engine: Engine

    def rows(self, x: jax.Array) -> jax.Array:
        """Repeat rows per image as rows per sequence: with guidance each image has two."""
        return jnp.concatenate([x, x]) if self.guided else x


class Loop(NamedTuple):
    """Carry of the token loop.

    Attributes:
      x: (rows, 1, d), the next input.
      caches: caches of the decoder.
      keys: (b,), a random key per image.
    """

    x: jax.Array
    caches: object
    keys: jax.Array


def generate_tokens(
    params: dict,
    labels: ArrayLike | CaptionFeatures,
    seed: int | jax.Array,
    index: ArrayLike,
    sampling: SamplingConfig,
    *,
    config: AiMConfig,
    guided: bool | None = None,
    prefix: jax.Array | None = None,
    engine: Engine = Engine(),  # noqa: B008
    callback: Callable[[jax.Array], None] | None = None,
    every: int = 1,
) -> jax.Array:
    """Sample the tokens of a batch of images autoregressively in one compiled loop.

    With guidance, each image has two rows, conditional and null; one token is sampled per
    image and fed to both. Randomness is a function of (seed, index, position) alone, so an image
    does not depend on its batch or on the devices. With parameters on several devices, each device
    generates its share of the images independently, with all parameters.

    Args:
      params: AiM parameters.
      labels: class of each image int (b,), or captions as arrays; see `as_condition`.
      seed: int or a JAX key.
      index: int (b,), index of each image in its series.
      sampling: guidance, temperature and filters.
      config: configuration of the model.
      guided: False omits the null rows, which is cfg_scale = 1 at half the cost. None omits
        them if no image uses guidance.
      prefix: int (b, l), the first tokens of every image, 0 < l < num_tokens.
      engine: recurrence form and implementation of the loop.
      callback: called as callback(tokens (b, n)) with all tokens so far, after every `every` tokens
        and at the end; on one device only. Without it the loop runs in one piece.
      every: tokens between two calls of `callback`.

    Returns:
      int32 (b, num_tokens) in raster order.

    Raises:
      ValueError: if the model or the device does not support the engine, or a callback is given and
        the parameters are on several devices.
    """
    condition: Condition = (
        labels if isinstance(labels, CaptionFeatures) else jnp.asarray(labels, jnp.int32)
    )
    if config.is_text:
        condition = padded(condition, config.max_caption)
    b = rows_of(condition)
    prefix = jnp.zeros((b, 0), jnp.int32) if prefix is None else prefix
    settings = {name: jnp.asarray(x) for name, x in sampling.arrays(b).items()}
    index = jnp.asarray(index, jnp.int32)
    request = Request(condition, index, settings, prefix)
    guided = sampling.guided if guided is None else guided
    devices = sharding.devices_of(params)
    rows = -(-b // len(devices)) * (2 if guided else 1)
    engine = resolve(engine, config, rows, devices[0].platform)
    method = Method(config, guided, sampling.cfg_schedule, engine)
    random = jax.random.key_data(random_key(seed))
    interval = jnp.asarray(sampling.cfg_interval, jnp.float32)
    if callback is None and len(devices) == 1:
        return generate_on_device(params, random, request, interval, method=method)
    if callback is None:
        return _generate_on(tuple(devices), params, random, request, interval, method=method)
    if len(devices) > 1:
        raise ValueError(
            f"callback: the model is on {len(devices)} devices; expected one. Move it to a single "
            "device, or generate without a callback."
        )
    return _generate_watched(params, random, request, interval, method, callback, every)


def make_decoder(
    params: dict, modulation: Modulation, config: AiMConfig, engine: Engine
) -> Decoder:
    """Return the decoder of a resolved engine."""
    if engine.implementation == "xla":
        return ModuleDecoder.of(params, modulation, config, engine)
    return FusedDecoder.of(params, modulation, config, engine)


@functools.partial(jax.jit, static_argnames="method")
def generate_on_device(
    params: dict, random: jax.Array, request: Request, interval: jax.Array, *, method: Method
) -> jax.Array:
    """Generate the tokens (b, t) of a request on one device.

    Args:
      params: AiM parameters.
      random: key data of `GENERATOR`.
      request: the images to generate.
      interval: (2,) float32; see `guidance_at`.
      method: the static part of the loop.
    """
    first = request.prefix.shape[1]
    decoder, loop = _begin(params, random, request, method)
    ends = decoder.segments(first)
    pieces = []
    for start, end in zip([first, *ends], ends, strict=False):
        loop = loop._replace(caches=decoder.grow(loop.caches, end))
        loop, tokens = _advance(decoder, loop, request, interval, start, end - start, method)
        pieces.append(tokens)
    return jnp.concatenate([request.prefix, *pieces], axis=1)


def _begin(
    params: dict, random: jax.Array, request: Request, method: Method
) -> tuple[Decoder, Loop]:
    """Return the decoder of a request, and the loop state before the first sampled token."""
    config = method.config

    def apply(name: str, *args: Any) -> Any:
        return AiM(config).apply({"params": params}, *args, method=name)

    condition = request.condition
    first = request.prefix.shape[1]
    if method.guided:
        null = null_condition(config, condition)
        condition = jax.tree.map(lambda *rows: jnp.concatenate(rows), condition, null)
    start, modulation = apply("condition", condition)
    prefix = method.rows(apply("embed_codes", request.prefix, jnp.arange(first, dtype=jnp.int32)))
    x = jnp.concatenate([start, prefix], axis=1)
    decoder = make_decoder(params, modulation, config, method.engine)
    caches = decoder.start(params, x[:, :-1], decoder.segments(first)[0])
    base = jax.random.wrap_key_data(random, impl=GENERATOR)
    keys = jax.vmap(functools.partial(jax.random.fold_in, base))(request.index)
    return decoder, Loop(x[:, -1:], caches, keys)


def _advance(
    decoder: Decoder,
    loop: Loop,
    request: Request,
    interval: jax.Array,
    first: ArrayLike,
    count: int,
    method: Method,
) -> tuple[Loop, jax.Array]:
    """Sample `count` tokens from position `first` on; return the new loop state and the tokens."""
    config = method.config

    def step(loop, position):
        logits, caches = decoder.step(loop.x, loop.caches, position)
        scale = guidance_at(
            position, config.num_tokens, request.settings["cfg_scale"], method.schedule, interval
        )
        uniform = jax.vmap(
            lambda key: jax.random.uniform(jax.random.fold_in(key, position), dtype=jnp.float32)
        )(loop.keys)
        token = decoder.sample(logits, uniform, request.settings | {"cfg_scale": scale})
        x = AiM(config).apply(
            {"params": decoder.params}, token[:, None], position[None], method="embed_codes"
        )
        return loop._replace(x=method.rows(x), caches=caches), token

    loop, tokens = jax.lax.scan(step, loop, first + jnp.arange(count, dtype=jnp.int32))
    return loop, tokens.T


@functools.lru_cache
def device_mesh(devices: tuple[jax.Device, ...]) -> Mesh:
    """Return the one-axis mesh over which the images are divided."""
    return Mesh(np.array(devices), ("data",))


def _generate_on(
    devices: tuple[jax.Device, ...],
    params: dict,
    random: jax.Array,
    request: Request,
    interval: jax.Array,
    *,
    method: Method,
) -> jax.Array:
    """Generate the tokens (b, t) of a request; each device generates its share."""
    mesh = device_mesh(devices)
    b = len(request.index)
    # Pad with copies of the first image to the same number of images per device.
    order = np.arange(-(-b // len(devices)) * len(devices))
    order = np.where(order < b, order, 0)
    # As NumPy, because arrays on the devices of one process cannot be mixed with arrays on all.
    random, request, interval = jax.tree.map(np.asarray, (random, request, interval))
    request = jax.tree.map(lambda x: x[order], request)
    return generate_sharded(params, random, request, interval, method=method, mesh=mesh)[:b]


@functools.partial(jax.jit, static_argnames=("method", "mesh"))
def generate_sharded(
    params: dict,
    random: jax.Array,
    request: Request,
    interval: jax.Array,
    *,
    method: Method,
    mesh: Mesh,
) -> jax.Array:
    """Run `generate_on_device` on several devices; their number must divide b.

    Returns:
      The tokens (b, t).
    """
    generate_shares = jax.shard_map(
        functools.partial(generate_on_device, method=method),
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P()),
        out_specs=P("data"),
        check_vma=False,
    )
    return generate_shares(params, random, request, interval)


_begin_jit = jax.jit(_begin, static_argnums=3)
_advance_jit = jax.jit(_advance, static_argnums=(5, 6), donate_argnums=1)


def _generate_watched(
    params: dict,
    random: jax.Array,
    request: Request,
    interval: jax.Array,
    method: Method,
    callback: Callable[[jax.Array], None],
    every: int,
) -> jax.Array:
    """Generate the tokens (b, t) of a request in pieces, on one device."""
    first = request.prefix.shape[1]
    last = method.config.num_tokens
    decoder, loop = _begin_jit(params, random, request, method)
    # Caches have their final size, so that all pieces share one compiled program.
    loop = loop._replace(caches=decoder.grow(loop.caches, last))
    tokens = request.prefix
    for start in range(first, last, every):
        count = min(every, last - start)
        position = jnp.asarray(start, jnp.int32)
        loop, new_tokens = _advance_jit(decoder, loop, request, interval, position, count, method)
        tokens = jnp.concatenate([tokens, new_tokens], axis=1)
        callback(tokens)
    return tokens


@functools.partial(jax.jit, static_argnames="config")
def decode_images(params: dict, tokens: jax.Array, *, config: VQConfig) -> jax.Array:
    """Decode tokens (b, t) into images uint8 (b, H, W, c) with the decoder of the tokenizer."""
    return to_uint8(VQModel(config).apply({"params": params}, tokens, method="decode_tokens"))


def unfinished(model: Pretrained, tokens: jax.Array) -> Samples:
    """Return partial images from their first tokens (b, n); the missing part is grey."""
    n = tokens.shape[1]
    config = model.vq_config
    assert model.aim_config is not None and config is not None
    total = model.aim_config.num_tokens
    padded = jnp.pad(tokens, ((0, 0), (0, total - n)))
    images = decode_images(model.vq_params, padded, config=config)
    side = math.isqrt(total)
    known = (jnp.arange(total) < n).reshape(side, side)
    known = jnp.repeat(jnp.repeat(known, config.downsampling, 0), config.downsampling, 1)
    return Samples(tokens, jnp.where(known[..., None], images, jnp.uint8(128)))


def whole_number(name: str, value: Any) -> int:
    """Convert a Python, NumPy or JAX integer to int.

    Raises:
      ValueError: if the value is not an integer from 0 to 2**31 - 1.
    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**31:
        raise ValueError(f"{name}={value!r}: expected an integer from 0 to 2**31 - 1.")
    return number


def check_prefix(prefix: np.ndarray, count: int, config: AiMConfig) -> jax.Array:
    """Validate the first tokens of `count` images and return them as int32.

    Raises:
      ValueError: if the shape, the dtype or a token is invalid.
    """
    prefix = as_array("prefix", prefix)
    fits = prefix.ndim == 2 and len(prefix) == count and 0 < prefix.shape[1] < config.num_tokens
    if not fits or prefix.dtype.kind not in "iu":
        raise ValueError(
            f"prefix: expected integer tokens of shape ({count}, l) with 0 < l < "
            f"{config.num_tokens}, got {prefix.dtype} of shape {prefix.shape}."
        )
    if prefix.min() < 0 or prefix.max() >= config.vocab_size:
        raise ValueError(f"prefix: expected tokens in 0..{config.vocab_size - 1}.")
    return jnp.asarray(prefix, jnp.int32)


def encode_rows(model: Pretrained, images: np.ndarray, rows: int) -> np.ndarray:
    """Encode the upper part of images as tokens, for `generate(prefix=...)`.

    The encoder sees the entire image, so the tokens carry a little information about the part below
    them.

    Args:
      model: a `Pretrained` with a tokenizer.
      images: float (b, H, W, c) in [-1, 1]; see `aim_jax.data.preprocess`.
      rows: rows of tokens to keep, each `downsampling` pixels high.

    Returns:
      int32 (b, rows * tokens per row).

    Raises:
      ValueError: if no rows, or all rows, would be kept, or the model has no tokenizer.
    """
    if model.vq_config is None or model.vq_params is None:
        raise ValueError(f"{model.name} has no tokenizer.")
    height, width = (size // model.vq_config.downsampling for size in images.shape[1:3])
    if not 0 < rows < height:
        raise ValueError(f"rows={rows}: expected 1 to {height - 1} of {height} rows of tokens.")
    vq = VQModel(model.vq_config)
    tokens = vq.apply({"params": model.vq_params}, jnp.asarray(images), method="encode_to_tokens")
    return np.asarray(tokens[:, : rows * width])


def generate(
    model: Pretrained,
    labels: ArrayLike | Sequence[int] | Sequence[str] | CaptionFeatures,
    seed: int | jax.Array = 0,
    config: SamplingConfig | None = None,
    *,
    prefix: np.ndarray | None = None,
    first_index: int = 0,
    implementation: str | None = None,
    form: str | None = None,
    cache_dtype: str = "float32",
    callback: Callable[[Samples], None] | None = None,
    every: int | None = None,
    **settings: Any,
) -> Samples:
    """Generate one image per label or caption.

    Args:
      model: a `Pretrained` with an AiM and a tokenizer, from `load_pretrained`.
      labels: class ids (b,), where `num_classes` is the null class; or class names from the
        `class_names` of the model. For a text model captions, as text, tokens or features; see
        `aim_jax.sampling.conditions.as_condition`.
      seed: an integer or a JAX key. Together with the index of an image it determines the image's
        randomness.
      config: guidance, temperature and filters; the model's defaults if None.
      prefix: int (b, l), the first tokens of the images, to be completed; `encode_rows` makes them
        from images.
      first_index: index of the first image, to continue a series in batches.
      implementation: implementation of the token loop; see `aim_jax.sampling.engine.Engine`.
      form: form of the recurrence; see `aim_jax.sampling.engine.Engine`.
      cache_dtype: dtype of the caches; see `aim_jax.sampling.engine.Engine`.
      callback: called as callback(Samples) after every `every` tokens with the tokens sampled so
        far and the partial images, whose missing part is grey. The model must be on one device.
      every: tokens between two calls of `callback`; by default one row of tokens.
      **settings: fields of `SamplingConfig` that override those of `config`, such as `cfg_scale=3`;
        None keeps the value of `config`. A number may be one for all images or one per image.

    Returns:
      `Samples` with tokens int32 (b, t) and images uint8 (b, H, W, c).

    Raises:
      ValueError: if a label, the seed or a setting is out of range, or the model lacks a part.
      TypeError: if a setting is unknown or not a number.
    """
    if not isinstance(model, Pretrained):
        raise ValueError(
            f"model: expected a Pretrained from aim_jax.load_pretrained, got "
            f"{type(model).__name__}."
        )
    if model.aim_config is None or model.aim_params is None or model.vq_params is None:
        raise ValueError(f"{model.name}: generating images requires an AiM and a tokenizer.")
    assert model.vq_config is not None
    if config is not None and not isinstance(config, SamplingConfig):
        raise TypeError(f"config: expected a SamplingConfig, got {type(config).__name__}.")
    sampling = (config or SamplingConfig(**model.sampling)).updated(settings)
    engine = Engine(form, implementation, cache_dtype)
    check_type("callback", callback, Callable | None)
    condition = as_condition(model, labels)
    count = rows_of(condition)
    if not is_key(seed):
        seed = whole_number("seed", seed)
    first_index = whole_number("first_index", first_index)
    if every is not None and whole_number("every", every) < 1:
        raise ValueError("every=0: expected 1 or more tokens.")
    tokens = generate_tokens(
        model.aim_params,
        condition,
        seed,
        first_index + jnp.arange(count, dtype=jnp.int32),
        sampling,
        config=model.aim_config,
        prefix=None if prefix is None else check_prefix(prefix, count, model.aim_config),
        engine=engine,
        callback=callback and (lambda tokens: callback(unfinished(model, tokens))),
        every=every or math.isqrt(model.aim_config.num_tokens),
    )
    return Samples(tokens, decode_images(model.vq_params, tokens, config=model.vq_config))
