"""Class-conditional sampling: the jitted generation of images.

b images, t tokens per image, v vocabulary.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

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
from aim_jax.sampling.decoder import ModuleDecoder
from aim_jax.sampling.engine import Engine, resolve
from aim_jax.sampling.fused_decoder import FusedDecoder
from aim_jax.sampling.logits import SCHEDULES, guidance_at
from aim_jax.utils.images import to_uint8
from aim_jax.weights.pretrained import Pretrained, class_ids


class Samples(NamedTuple):
    """Generated codes (b, t) int32 and images (b, H, W, c) uint8."""

    tokens: jax.Array
    images: jax.Array


class Request(NamedTuple):
    """What is asked for, one entry per image: labels and index int (b,), settings (b,).

    `prefix` (b, l) holds the first codes of the images, l may be 0.
    """

    labels: jax.Array
    index: jax.Array  # type: ignore[assignment]  # tuples have a method of that name
    cfg_scale: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    prefix: jax.Array


class Method(NamedTuple):
    """What is compiled into the loop: see `generate_tokens`."""

    config: AiMConfig
    guided: bool
    schedule: str
    engine: Engine

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
    seed: ArrayLike,
    index: ArrayLike,
    cfg_scale: ArrayLike,
    temperature: ArrayLike,
    top_k: ArrayLike,
    top_p: ArrayLike,
    *,
    config: AiMConfig,
    guided: bool = True,
    schedule: str = "constant",
    interval: tuple[float, float] = (0.0, 1.0),
    prefix: jax.Array | None = None,
    engine: Engine = Engine(),  # noqa: B008
    callback: Callable[[jax.Array], None] | None = None,
    every: int = 1,
) -> jax.Array:
    """Draws the codes of a batch of images, one after the other, in one compiled loop.

    With guidance every image has two rows, conditional and null class; one token is drawn per
    image and fed to both. Randomness is a function of (seed, index, position) alone, so an image
    does not depend on the batch it is in, nor on the devices: where the parameters are on several,
    each draws its share of the images by itself, with all parameters.

    Args:
      params: AiM parameters. labels: int (b,). seed: int (). index: int (b,), number of each image.
      cfg_scale, temperature, top_k, top_p: () or (b,); see `apply_cfg` and the filters.
      config: shape of the model.
      guided: False leaves the null-class rows out, which is cfg_scale = 1 at half the cost.
      schedule, interval: how guidance changes over an image; see `guidance_at`.
      prefix: int (b, l), the first codes of every image, 0 < l < num_tokens; the rest is drawn.
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

    def each(value, dtype):
        return jnp.broadcast_to(jnp.asarray(value, dtype), (b,))

    request = Request(
        jnp.asarray(labels, jnp.int32), jnp.asarray(index, jnp.int32),
        each(cfg_scale, jnp.float32), each(temperature, jnp.float32),
        each(top_k, jnp.int32), each(top_p, jnp.float32), given,
    )  # fmt: skip
    devices = sharding.devices_of(params)
    rows = -(-b // len(devices)) * (2 if guided else 1)
    engine = resolve(engine, config, rows, devices[0].platform)
    method, part = Method(config, guided, schedule, engine), jnp.asarray(interval, jnp.float32)
    if callback is None and len(devices) == 1:
        return generate_on_device(params, seed, request, part, method=method)
    if callback is None:
        return _generate_on(tuple(devices), params, seed, request, part, method=method)
    if len(devices) > 1:
        raise ValueError(
            f"callback: the model is on {len(devices)} devices; put it on one to watch it draw."
        )
    return _generate_watched(params, seed, request, part, method, callback, every)


def make_decoder(params: dict, modulation: Modulation, config: AiMConfig, engine: Engine):
    """The decoder of a resolved engine: a `ModuleDecoder`, or one with the same methods."""
    if engine.kernels == "xla":
        return ModuleDecoder.of(params, modulation, config, engine)
    return FusedDecoder.of(params, modulation, config, engine)


@functools.partial(jax.jit, static_argnames="method")
def generate_on_device(params, seed, request: Request, interval, *, method: Method) -> jax.Array:
    """The codes (b, t) of the images asked for, on one device."""
    first = request.prefix.shape[1]
    decoder, loop = _begin(params, seed, request, method)
    ends, drawn = decoder.segments(first), []
    for start, end in zip([first, *ends], ends, strict=False):
        loop = loop._replace(caches=decoder.grow(loop.caches, end))
        loop, tokens = _advance(decoder, loop, request, interval, start, end - start, method)
        drawn.append(tokens)
    return jnp.concatenate([request.prefix, *drawn], axis=1)


def _begin(params, seed, request: Request, method: Method):
    """The decoder of these images, and the loop before the first token that is drawn."""
    config = method.config

    def apply(name, *args):
        return AiM(config).apply({"params": params}, *args, method=name)

    labels, first = request.labels, request.prefix.shape[1]
    if method.guided:
        labels = jnp.concatenate([labels, jnp.full_like(labels, config.num_classes)])
    start, modulation = apply("condition", labels)
    codes = method.rows(apply("embed_codes", request.prefix, jnp.arange(first)))
    x = jnp.concatenate([start, codes], axis=1)
    decoder = make_decoder(params, modulation, config, method.engine)
    caches = decoder.start(params, x[:, :-1], decoder.segments(first)[0])
    base = jax.random.key(seed)
    keys = jax.vmap(functools.partial(jax.random.fold_in, base))(request.index)
    return decoder, Loop(x[:, -1:], caches, keys)


def _advance(decoder, loop: Loop, request: Request, interval, first, count: int, method: Method):
    """Draws `count` tokens from position `first` on -> (the loop after them, tokens (b, count))."""
    config = method.config

    def step(loop, position):
        logits, caches = decoder.step(loop.x, loop.caches, position)
        scale = guidance_at(
            position, config.num_tokens, request.cfg_scale, method.schedule, interval
        )
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, position)))(
            loop.keys
        )
        token = decoder.sample(
            logits, uniform, scale, request.temperature, request.top_k, request.top_p
        )
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


def _generate_on(devices, params, seed, request: Request, interval, *, method: Method):
    """The codes of the images asked for; every device draws its share."""
    mesh, b = device_mesh(devices), len(request.labels)
    # Images repeat the first one until there are equally many for every device.
    order = np.arange(-(-b // len(devices)) * len(devices))
    order = np.where(order < b, order, 0)
    # As NumPy, because arrays of one process's devices may not meet those of all.
    request, interval = jax.tree.map(np.asarray, (request, interval))
    request = jax.tree.map(lambda x: x[order], request)
    return generate_sharded(params, seed, request, interval, method=method, mesh=mesh)[:b]


@functools.partial(jax.jit, static_argnames=("method", "mesh"))
def generate_sharded(params, seed, request, interval, *, method, mesh):
    """What `generate_tokens` runs on several devices: codes (b, t), b a multiple of them."""
    share = jax.shard_map(
        functools.partial(generate_on_device, method=method),
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P()),
        out_specs=P("data"),
        check_vma=False,
    )
    return share(params, seed, request, interval)


_begin_jit = jax.jit(_begin, static_argnums=3)
_advance_jit = jax.jit(_advance, static_argnums=(5, 6), donate_argnums=1)


def _generate_watched(params, seed, request, interval, method: Method, callback, every):
    """The codes of the images asked for, in pieces, on one device."""
    first, last = request.prefix.shape[1], method.config.num_tokens
    decoder, loop = _begin_jit(params, seed, request, method)
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


def whole_number(name: str, value) -> int:
    """A Python, NumPy or JAX integer from 0 to 2**31 - 1 as int; ValueError for all else."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**31:
        raise ValueError(f"{name}={value!r}: expected a whole number from 0 to 2**31 - 1.")
    return number


def check_settings(
    labels: np.ndarray, num_classes: int, cfg_scale, temperature, top_k, top_p, schedule, interval
) -> None:
    """Raises ValueError for labels or sampling settings outside their range."""
    labels = np.asarray(labels)
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
    for name, value, ok, expected in (
        ("cfg_scale", cfg_scale, lambda x: math.isfinite(x), "a finite number"),
        ("temperature", temperature, lambda x: 0 < x < math.inf, "a positive number"),
        ("top_k", top_k, lambda x: 0 <= x < 2**31 and x == int(x), "an integer >= 0 (0 is off)"),
        ("top_p", top_p, lambda x: 0 < x <= 1, "in (0, 1] (1 is off)"),
    ):
        bad = [x for x in np.ravel(value).tolist() if not ok(x)]
        if bad:
            raise ValueError(f"{name}={bad[0]}: expected {expected}.")
        if np.ndim(value) and np.shape(value) != labels.shape:
            raise ValueError(f"{name}: expected one value, or one per label ({labels.size}).")
    if schedule not in SCHEDULES:
        raise ValueError(f"cfg_schedule={schedule!r}: expected one of {sorted(SCHEDULES)}.")
    if np.shape(interval) != (2,) or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(
            f"cfg_interval={interval!r}: expected two fractions of the image, start < end, in "
            "[0, 1]."
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
    seed: int = 0,
    *,
    cfg_scale: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    top_k: ArrayLike | None = None,
    top_p: ArrayLike | None = None,
    cfg_schedule: str = "constant",
    cfg_interval: tuple[float, float] = (0.0, 1.0),
    prefix: np.ndarray | None = None,
    first_index: int = 0,
    engine: Engine = Engine(),  # noqa: B008
    callback: Callable[[Samples], None] | None = None,
    every: int | None = None,
) -> Samples:
    """Generates one image per label.

    Args:
      model: a `Pretrained` with both parts, from `load_pretrained`.
      labels: class ids (b,), `num_classes` is the null class; or class names, as the model has them
        in `class_names`.
      seed: with the image's number it decides the randomness of the image.
      cfg_scale: guidance; 1 is none. temperature: > 0. top_k: 0 is off; 1 is greedy. top_p: in
        (0, 1]. Each may be one value or one per image; None takes the model's default.
      cfg_schedule, cfg_interval: "constant", "linear" or "cosine" growth of the guidance over an
        image, and the part of the image that has any; see `guidance_at`.
      prefix: int (b, l), codes that the images start with, to complete them; `encode_rows` makes
        them from pictures.
      first_index: number of the first image, to continue a series in batches.
      engine: how the token loop computes; see `aim_jax.sampling.engine.Engine`.
      callback, every: callback(Samples) is called after each `every` tokens (default: a row of
        codes) with what is there: the tokens drawn so far, and the pictures with what is missing
        in grey. Needs the model on one device.

    Returns:
      Samples: tokens (b, t) int32 and images (b, H, W, c) uint8.

    Raises:
      ValueError: a label, seed or setting out of range, or a model without one of the parts.
    """
    if not isinstance(model, Pretrained):
        raise ValueError(
            f"model: expected what aim_jax.load_pretrained returns, got {type(model).__name__}."
        )
    if model.aim_config is None or model.aim_params is None or model.vq_params is None:
        raise ValueError(f"{model.name}: generating images needs both an AiM and a tokenizer.")
    if not isinstance(engine, Engine):
        raise ValueError(f"engine={engine!r}: expected an aim_jax.sampling.engine.Engine.")
    chosen = dict(cfg_scale=cfg_scale, temperature=temperature, top_k=top_k, top_p=top_p)
    settings = {k: model.sampling[k] if v is None else v for k, v in chosen.items()}
    labels = np.asarray(labels)
    if labels.dtype.kind == "U" and labels.ndim == 1:
        labels = np.asarray(class_ids(model, labels.tolist()))
    seed = whole_number("seed", seed)
    first_index = whole_number("first_index", first_index)
    if every is not None and whole_number("every", every) < 1:
        raise ValueError("every=0: expected 1 or more tokens.")
    check_settings(
        labels,
        model.aim_config.num_classes,
        **settings,
        schedule=cfg_schedule,
        interval=cfg_interval,
    )
    tokens = generate_tokens(
        model.aim_params,
        labels,
        seed,
        first_index + jnp.arange(labels.size),
        **settings,
        config=model.aim_config,
        guided=bool(np.any(np.asarray(settings["cfg_scale"]) != 1)),
        schedule=cfg_schedule,
        interval=cfg_interval,
        prefix=None if prefix is None else check_prefix(prefix, labels.size, model.aim_config),
        engine=engine,
        callback=callback and (lambda tokens: callback(unfinished(model, tokens))),
        every=every or math.isqrt(model.aim_config.num_tokens),
    )
    return Samples(tokens, decode_images(model.vq_params, tokens, config=model.vq_config))
