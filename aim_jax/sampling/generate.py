"""Class-conditional sampling: the jitted generation of images.

b images, t tokens per image, v vocabulary.
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
from aim_jax.models.config import AiMConfig, VQConfig
from aim_jax.models.vq import VQModel
from aim_jax.parallel import sharding
from aim_jax.sampling.config import SamplingConfig
from aim_jax.sampling.decoder import Decoder, ModuleDecoder
from aim_jax.sampling.engine import Engine, resolve
from aim_jax.sampling.fused_decoder import FusedDecoder
from aim_jax.sampling.logits import guidance_at
from aim_jax.utils.images import to_uint8
from aim_jax.utils.random import GENERATOR, is_key, random_key
from aim_jax.weights.pretrained import Pretrained, class_ids


class Samples(NamedTuple):
    """Generated codes (b, t) int32 and images (b, H, W, c) uint8."""

    tokens: jax.Array
    images: jax.Array


class Request(NamedTuple):
    """The images to generate, one entry per image.

    Attributes:
      labels, index: int (b,), class and number of each image.
      settings: (b,) by name; see `SamplingConfig.arrays`.
      prefix: int (b, l), the first tokens of the images, l may be 0.
    """

    labels: jax.Array
    index: jax.Array  # type: ignore[assignment]  # tuples have a method of that name
    settings: dict[str, jax.Array]
    prefix: jax.Array


class Method(NamedTuple):
    """What is compiled into the loop: see `generate_tokens`.

    Attributes:
      generator: of the random numbers, as JAX names it.
    """

    config: AiMConfig
    guided: bool
    schedule: str
    engine: Engine
    generator: str = GENERATOR

    def rows(self, x: jax.Array) -> jax.Array:
        """One row per image -> one per sequence: with guidance each image has two."""
        return jnp.concatenate([x, x]) if self.guided else x


class Loop(NamedTuple):
    """What the loop carries: the next input (rows, 1, d), caches, and a random key per image."""

    x: jax.Array
    caches: object
    keys: jax.Array


def generate_tokens(
    params: dict,
    labels: ArrayLike,
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
    """Samples the tokens of a batch of images, one after the other, in one compiled loop.

    With guidance every image has two rows, conditional and null class; one token is sampled per
    image and fed to both. Randomness is a function of (seed, index, position) alone, so an image
    does not depend on the batch it is in, nor on the devices: where the parameters are on several,
    each generates its share of the images by itself, with all parameters.

    Args:
      params: AiM parameters. labels: int (b,). seed: int, or a JAX key. index: int (b,), number of
        each image.
      sampling: guidance, temperature and filters.
      config: shape of the model.
      guided: False leaves the null-class rows out, which is cfg_scale = 1 at half the cost; None
        does so where no image has guidance.
      prefix: int (b, l), the first tokens of every image, 0 < l < num_tokens.
      engine: how the loop computes.
      callback, every: callback(tokens (b, n)) is called after each `every` tokens, and at the end,
        with all that are there; on one device only. Without it the loop runs in one piece.

    Returns:
      int32 (b, num_tokens), raster order.

    Raises:
      ValueError: the model or device has no such engine; a callback with several devices.
    """
    b = np.shape(labels)[0]
    given = jnp.zeros((b, 0), jnp.int32) if prefix is None else prefix
    settings = {name: jnp.asarray(x) for name, x in sampling.arrays(b).items()}
    labels, index = jnp.asarray(labels, jnp.int32), jnp.asarray(index, jnp.int32)
    request = Request(labels, index, settings, given)
    guided = sampling.guided if guided is None else guided
    devices = sharding.devices_of(params)
    rows = -(-b // len(devices)) * (2 if guided else 1)
    engine = resolve(engine, config, rows, devices[0].platform)
    key = random_key(seed)
    method = Method(config, guided, sampling.cfg_schedule, engine, str(jax.random.key_impl(key)))
    random, interval = jax.random.key_data(key), jnp.asarray(sampling.cfg_interval, jnp.float32)
    if callback is None and len(devices) == 1:
        return generate_on_device(params, random, request, interval, method=method)
    if callback is None:
        return _generate_on(tuple(devices), params, random, request, interval, method=method)
    if len(devices) > 1:
        raise ValueError(
            f"callback: the model is on {len(devices)} devices; put it on one to watch it draw."
        )
    return _generate_watched(params, random, request, interval, method, callback, every)


def make_decoder(
    params: dict, modulation: Modulation, config: AiMConfig, engine: Engine
) -> Decoder:
    """The decoder of a resolved engine."""
    if engine.implementation == "xla":
        return ModuleDecoder.of(params, modulation, config, engine)
    return FusedDecoder.of(params, modulation, config, engine)


@functools.partial(jax.jit, static_argnames="method")
def generate_on_device(
    params: dict, random: jax.Array, request: Request, interval: jax.Array, *, method: Method
) -> jax.Array:
    """The tokens (b, t) of the images of a request, on one device.

    Args:
      params: AiM parameters. random: data of a key of `method.generator`.
      interval: (2,) float32; see `guidance_at`.
    """
    first = request.prefix.shape[1]
    decoder, loop = _begin(params, random, request, method)
    ends, drawn = decoder.segments(first), []
    for start, end in zip([first, *ends], ends, strict=False):
        loop = loop._replace(caches=decoder.grow(loop.caches, end))
        loop, tokens = _advance(decoder, loop, request, interval, start, end - start, method)
        drawn.append(tokens)
    return jnp.concatenate([request.prefix, *drawn], axis=1)


def _begin(
    params: dict, random: jax.Array, request: Request, method: Method
) -> tuple[Decoder, Loop]:
    """The decoder of these images, and the loop before the first token that is sampled."""
    config = method.config

    def apply(name: str, *args: Any) -> Any:
        return AiM(config).apply({"params": params}, *args, method=name)

    labels, first = request.labels, request.prefix.shape[1]
    if method.guided:
        labels = jnp.concatenate([labels, jnp.full_like(labels, config.num_classes)])
    start, modulation = apply("condition", labels)
    codes = method.rows(apply("embed_codes", request.prefix, jnp.arange(first)))
    x = jnp.concatenate([start, codes], axis=1)
    decoder = make_decoder(params, modulation, config, method.engine)
    caches = decoder.start(params, x[:, :-1], decoder.segments(first)[0])
    base = jax.random.wrap_key_data(random, impl=method.generator)
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
    """Draws `count` tokens from position `first` on -> (the loop after them, tokens (b, count))."""
    config = method.config

    def step(loop, position):
        logits, caches = decoder.step(loop.x, loop.caches, position)
        scale = guidance_at(
            position, config.num_tokens, request.settings["cfg_scale"], method.schedule, interval
        )
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, position)))(
            loop.keys
        )
        token = decoder.sample(logits, uniform, request.settings | {"cfg_scale": scale})
        x = AiM(config).apply(
            {"params": decoder.params}, token[:, None], position[None], method="embed_codes"
        )
        return loop._replace(x=method.rows(x), caches=caches), token

    loop, tokens = jax.lax.scan(step, loop, first + jnp.arange(count))
    return loop, tokens.T


@functools.lru_cache
def device_mesh(devices: tuple[jax.Device, ...]) -> Mesh:
    """The mesh whose devices each draw a share of the images."""
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
    """The codes of the images asked for; every device draws its share."""
    mesh, b = device_mesh(devices), len(request.labels)
    # Images repeat the first one until there are equally many for every device.
    order = np.arange(-(-b // len(devices)) * len(devices))
    order = np.where(order < b, order, 0)
    # As NumPy, because arrays of one process's devices may not meet those of all.
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
    """`generate_on_device` on several devices: tokens (b, t), b a multiple of their number."""
    share = jax.shard_map(
        functools.partial(generate_on_device, method=method),
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P()),
        out_specs=P("data"),
        check_vma=False,
    )
    return share(params, random, request, interval)


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
    """The codes of the images asked for, in pieces, on one device."""
    first, last = request.prefix.shape[1], method.config.num_tokens
    decoder, loop = _begin_jit(params, random, request, method)
    # Caches of their final size, so that all pieces are one program.
    loop = loop._replace(caches=decoder.grow(loop.caches, last))
    tokens = request.prefix
    for start in range(first, last, every):
        count = min(every, last - start)
        position = jnp.asarray(start, jnp.int32)
        loop, drawn = _advance_jit(decoder, loop, request, interval, position, count, method)
        tokens = jnp.concatenate([tokens, drawn], axis=1)
        callback(tokens)
    return tokens


@functools.partial(jax.jit, static_argnames="config")
def decode_images(params: dict, tokens: jax.Array, *, config: VQConfig) -> jax.Array:
    """Codes (b, t) -> images (b, H, W, c) uint8, through the tokenizer's decoder."""
    return to_uint8(VQModel(config).apply({"params": params}, tokens, method="decode_tokens"))


def unfinished(model: Pretrained, tokens: jax.Array) -> Samples:
    """Images of which only the first codes (b, n) are there; what they do not cover is grey."""
    n, config = tokens.shape[1], model.vq_config
    assert model.aim_config is not None and config is not None
    total = model.aim_config.num_tokens
    padded = jnp.pad(tokens, ((0, 0), (0, total - n)))
    images = decode_images(model.vq_params, padded, config=config)
    side = math.isqrt(total)
    there = (jnp.arange(total) < n).reshape(side, side)
    there = jnp.repeat(jnp.repeat(there, config.downsampling, 0), config.downsampling, 1)
    return Samples(tokens, jnp.where(there[..., None], images, jnp.uint8(128)))


def whole_number(name: str, value: Any) -> int:
    """A Python, NumPy or JAX integer from 0 to 2**31 - 1 as int; ValueError for all else."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**31:
        raise ValueError(f"{name}={value!r}: expected a whole number from 0 to 2**31 - 1.")
    return number


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError for labels that are not class ids."""
    if labels.ndim != 1 or not labels.size or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels: expected a non-empty list of class ids, got {labels.dtype} of shape "
            f"{labels.shape}."
        )
    wrong = sorted({int(i) for i in labels if not 0 <= i <= num_classes})
    if wrong:
        raise ValueError(
            f"labels: {wrong} out of range; classes are 0..{num_classes - 1} and {num_classes} is "
            "the null class (no class)."
        )


def check_prefix(prefix: np.ndarray, count: int, config: AiMConfig) -> jax.Array:
    """The prefix as int32; ValueError if it is no beginning of `count` images."""
    prefix = np.asarray(prefix)
    fits = prefix.ndim == 2 and len(prefix) == count and 0 < prefix.shape[1] < config.num_tokens
    if not fits or prefix.dtype.kind not in "iu":
        raise ValueError(
            f"prefix: {prefix.dtype} of shape {prefix.shape}; expected codes of shape ({count}, l) "
            f"with 0 < l < {config.num_tokens}."
        )
    if prefix.min() < 0 or prefix.max() >= config.vocab_size:
        raise ValueError(f"prefix: codes are 0..{config.vocab_size - 1}.")
    return jnp.asarray(prefix, jnp.int32)


def encode_rows(model: Pretrained, images: np.ndarray, rows: int) -> np.ndarray:
    """Codes of the upper part of pictures, for `generate(prefix=...)`.

    The encoder sees the whole picture, so the codes know a little of what lies below them.

    Args:
      model: a `Pretrained` with a tokenizer. images: float (b, H, W, c) in [-1, 1], see
        `aim_jax.data.preprocess`. rows: rows of codes to keep, each `downsampling` pixels high.

    Returns:
      int32 (b, rows * width in codes).

    Raises:
      ValueError: the number of rows leaves nothing to complete, or there is no tokenizer.
    """
    if model.vq_config is None or model.vq_params is None:
        raise ValueError(f"{model.name} holds no tokenizer.")
    height, width = (size // model.vq_config.downsampling for size in images.shape[1:3])
    if not 0 < rows < height:
        raise ValueError(f"rows={rows}: expected 1 to {height - 1} of {height} rows of codes.")
    vq = VQModel(model.vq_config)
    codes = vq.apply({"params": model.vq_params}, jnp.asarray(images), method="encode_to_tokens")
    return np.asarray(codes[:, : rows * width])


def generate(
    model: Pretrained,
    labels: ArrayLike | Sequence[int] | Sequence[str],
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
    """Generates one image per label.

    Args:
      model: a `Pretrained` with both parts, from `load_pretrained`.
      labels: class ids (b,), `num_classes` is the null class; or class names, as the model has them
        in `class_names`.
      seed: an integer or a JAX key; with the image's number it decides the randomness of the image.
      config: guidance, temperature and filters; the model's own by default.
      prefix: int (b, l), tokens that the images start with, to complete them; `encode_rows` makes
        them from images.
      first_index: number of the first image, to continue a series in batches.
      implementation, form, cache_dtype: how the token loop computes; see
        `aim_jax.sampling.engine.Engine`.
      callback, every: callback(Samples) is called after each `every` tokens (default: a row of
        tokens) with what is there: the tokens sampled so far, and the images with what is missing
        in grey. Needs the model on one device.
      **settings: single fields of `SamplingConfig`, which take the place of those in `config`, such
        as `cfg_scale=3`; None leaves them. Numbers may be one for all images or one per image.

    Returns:
      Samples: tokens (b, t) int32 and images (b, H, W, c) uint8.

    Raises:
      ValueError: a label, seed or setting out of range, or a model without one of the parts.
      TypeError: a setting that does not exist, or is not a number.
    """
    if not isinstance(model, Pretrained):
        raise ValueError(
            f"model: expected what aim_jax.load_pretrained returns, got {type(model).__name__}."
        )
    if model.aim_config is None or model.aim_params is None or model.vq_params is None:
        raise ValueError(f"{model.name}: generating images needs both an AiM and a tokenizer.")
    assert model.vq_config is not None
    if config is not None and not isinstance(config, SamplingConfig):
        raise TypeError(f"config: expected a SamplingConfig, got {type(config).__name__}.")
    sampling = (config or SamplingConfig(**model.sampling)).updated(settings)
    engine = Engine(form, implementation, cache_dtype)
    labels = np.asarray(labels)
    if labels.dtype.kind == "U" and labels.ndim == 1:
        labels = np.asarray(class_ids(model, labels.tolist()))
    check_labels(labels, model.aim_config.num_classes)
    if not is_key(seed):
        seed = whole_number("seed", seed)
    first_index = whole_number("first_index", first_index)
    if every is not None and whole_number("every", every) < 1:
        raise ValueError("every=0: expected 1 or more tokens.")
    tokens = generate_tokens(
        model.aim_params,
        labels,
        seed,
        first_index + jnp.arange(labels.size),
        sampling,
        config=model.aim_config,
        prefix=None if prefix is None else check_prefix(prefix, labels.size, model.aim_config),
        engine=engine,
        callback=callback and (lambda tokens: callback(unfinished(model, tokens))),
        every=every or math.isqrt(model.aim_config.num_tokens),
    )
    return Samples(tokens, decode_images(model.vq_params, tokens, config=model.vq_config))
