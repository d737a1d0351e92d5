"""Generation of images from classes or captions.

Shapes: b images, t tokens per image.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from aim_jax.models.captions import CaptionFeatures, Condition, padded, rows_of
from aim_jax.models.config import AiMConfig
from aim_jax.parallel import sharding
from aim_jax.sampling.conditions import as_array, as_condition
from aim_jax.sampling.config import SamplingConfig
from aim_jax.sampling.decoder import Decoder
from aim_jax.sampling.engine import Engine, resolve
from aim_jax.sampling.images import Samples, decode_images, unfinished
from aim_jax.sampling.padding import pad_rows, padded_count
from aim_jax.sampling.token_loop import (
    Loop,
    Request,
    Series,
    device_mesh,
    generate_on_device,
    generate_sharded,
    make_decoder,
)
from aim_jax.utils.checks import check_arguments, check_type
from aim_jax.utils.random import is_key, random_key
from aim_jax.weights.pretrained import Pretrained


def prepare_decoder(params: dict, config: AiMConfig, engine: Engine = Engine()) -> Decoder:  # noqa: B008
    """Lay out the weights of a model for sampling: merged, transposed, and in the compute dtype.

    With parameters on several devices, each device gets all weights.

    Args:
      params: AiM parameters.
      config: configuration of the model.
      engine: form and implementation of the loop; a form of None is chosen for every batch.

    Raises:
      ValueError: if the model or the device does not support the engine.
    """
    devices = tuple(sharding.devices_of(params))
    platform = devices[0].platform
    implementation = resolve(engine, config, 1, platform).implementation
    engine = dataclasses.replace(engine, implementation=implementation)
    return _lay_out(devices if len(devices) > 1 else None, config, engine, platform)(params)


@functools.lru_cache
def _lay_out(
    devices: tuple[jax.Device, ...] | None, config: AiMConfig, engine: Engine, platform: str
) -> Callable[[dict], Decoder]:
    """Return the compiled function of parameters that makes a decoder."""
    make = functools.partial(make_decoder, config=config, engine=engine, platform=platform)
    if devices is None:
        return jax.jit(make)
    return jax.jit(make, out_shardings=NamedSharding(device_mesh(devices), PartitionSpec()))


def generate_tokens(
    decoder: Decoder,
    labels: ArrayLike | CaptionFeatures,
    seed: int | jax.Array,
    index: ArrayLike,
    sampling: SamplingConfig,
    *,
    guided: bool | None = None,
    prefix: jax.Array | None = None,
    callback: Callable[[jax.Array], None] | None = None,
    every: int = 1,
) -> jax.Array:
    """Sample the tokens of a batch of images autoregressively in a compiled loop.

    With guidance, each image has two rows, conditional and null; one token is sampled per
    image and fed to both. Randomness is a function of (seed, index, position) alone, so an image
    does not depend on its batch or on the devices. With weights on several devices, each device
    generates its share of the images independently, with all weights.

    One program is compiled per size of the batch (see `aim_jax.sampling.padding`), with guidance or
    without. On accelerators, which run a known number of steps faster, it is for whole images, and
    another one is for rows of tokens, with which images with a prefix are completed.

    Args:
      decoder: from `prepare_decoder`.
      labels: class of each image int (b,), or captions as arrays; see `as_condition`.
      seed: int or a JAX key.
      index: int (b,), index of each image in its series.
      sampling: guidance, temperature and filters.
      guided: False omits the null rows, which is cfg_scale = 1 at half the cost. None omits
        them if no image uses guidance.
      prefix: int (b, l), the first tokens of every image, 0 < l < num_tokens.
      callback: called as callback(tokens (b, n)) with all tokens so far, after every `every` tokens
        and at the end; on one device only. Without it the loop runs in one piece.
      every: tokens between two calls of `callback`.

    Returns:
      int32 (b, num_tokens) in raster order.

    Raises:
      ValueError: if the model or the device does not support the engine, or a callback is given and
        the weights are on several devices.
      NonFiniteError: if logits are not finite.
    """
    config = decoder.config
    condition: Condition = (
        labels if isinstance(labels, CaptionFeatures) else np.asarray(labels, np.int32)
    )
    if config.is_text:
        condition = padded(condition, config.max_caption)
    b = rows_of(condition)
    devices = tuple(sharding.devices_of(decoder))
    if callback is not None and len(devices) > 1:
        raise ValueError(
            f"callback: the model is on {len(devices)} devices; expected one. Move it to a single "
            "device, or generate without a callback."
        )
    guided = sampling.guided if guided is None else guided
    per_device = padded_count(-(-b // len(devices)))
    rows = per_device * (2 if guided else 1)
    decoder = decoder.with_engine(resolve(decoder.engine, config, rows, devices[0].platform))
    known = np.zeros((b, 0), np.int32) if prefix is None else prefix
    request = Request(condition, index, sampling.arrays(b), known)  # type: ignore[arg-type]
    series = Series.of(random_key(seed), sampling.cfg_schedule, sampling.cfg_interval)
    # As NumPy, because arrays on the devices of one process cannot be mixed with arrays on all.
    request, series = jax.tree.map(np.asarray, (request, series))
    request = request._replace(index=request.index.astype(np.int32))
    request = pad_rows(request, per_device * len(devices))
    if len(devices) > 1:
        mesh = device_mesh(devices)
        result = generate_sharded(decoder, request, series, guided=guided, mesh=mesh)
        _check_finite(result.finite)
        return result.tokens[:b]

    def watch(loop: Loop, count: int) -> None:
        if callback is not None:
            _check_finite(loop.finite)
            callback(loop.tokens[:b, :count])

    row = math.isqrt(config.num_tokens)
    is_cpu = devices[0].platform == "cpu"
    whole = callback is None and (is_cpu or not request.prefix.shape[1])
    pieces = None if whole else every if callback else row
    result = generate_on_device(
        decoder, request, series, guided=guided, every=pieces, watch=watch, device=devices[0]
    )
    _check_finite(result.finite)
    return result.tokens[:b]


class NonFiniteError(ValueError):
    """Logits of a model are infinite or not a number."""


def _check_finite(finite: jax.Array) -> None:
    """Check the result of the token loop.

    Raises:
      NonFiniteError: if logits of an image were not finite.
    """
    if not bool(jnp.all(finite)):
        raise NonFiniteError(
            "the model computed logits that are infinite or not a number, from which no token can "
            "be sampled. Its weights are damaged or its training diverged; with "
            "compute_dtype='bfloat16', try 'float32'."
        )


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


class PreparedModel:
    """A model whose weights are laid out for sampling; see `prepare`.

    Attributes:
      model: the model without the parameters of its AiM.
      decoder: the laid out weights.
    """

    def __init__(self, model: Pretrained, engine: Engine = Engine()) -> None:  # noqa: B008
        if model.aim_config is None or model.aim_params is None or model.vq_params is None:
            raise ValueError(f"{model.name}: generating images requires an AiM and a tokenizer.")
        self.model = dataclasses.replace(model, aim_params=None)
        self.decoder = prepare_decoder(model.aim_params, model.aim_config, engine)

    def generate(self, labels: Any, seed: int | jax.Array = 0, **options: Any) -> Samples:
        """Call `aim_jax.generate` with this model."""
        return generate(self, labels, seed, **options)


@check_arguments
def prepare(
    model: Pretrained,
    implementation: str | None = None,
    form: str | None = None,
    cache_dtype: str = "float32",
) -> PreparedModel:
    """Lay out the weights of a model for sampling.

    `generate` does so in its first call for a model, and keeps the result beside the parameters.
    Services that only sample prepare the model and drop it, so that only one copy of the weights
    stays in memory, in the compute dtype.

    Args:
      model: a `Pretrained` with an AiM and a tokenizer, from `load_pretrained`.
      implementation, form, cache_dtype: see `aim_jax.sampling.engine.Engine`.

    Returns:
      A `PreparedModel`, whose `generate` takes the arguments of `aim_jax.generate`.

    Raises:
      ValueError: if the model lacks a part, or the model or the device does not support the engine.
    """
    return PreparedModel(model, Engine(form, implementation, cache_dtype))


def _prepared(model: Pretrained, implementation: str | None) -> PreparedModel:
    """Return the prepared form of a model, which is kept with the model."""
    leaves = jax.tree.leaves(model.aim_params)
    known = model.prepared.get(implementation)
    if known is None or any(a is not b for a, b in zip(known[0], leaves, strict=True)):
        known = (leaves, PreparedModel(model, Engine(implementation=implementation)))
        model.prepared[implementation] = known
    return known[1]


def generate(
    model: Pretrained | PreparedModel,
    labels: ArrayLike | Sequence[int] | Sequence[str] | CaptionFeatures,
    seed: int | jax.Array = 0,
    config: SamplingConfig | None = None,
    *,
    prefix: np.ndarray | None = None,
    first_index: int = 0,
    implementation: str | None = None,
    form: str | None = None,
    cache_dtype: str | None = None,
    callback: Callable[[Samples], None] | None = None,
    every: int | None = None,
    **settings: Any,
) -> Samples:
    """Generate one image per label or caption.

    Args:
      model: a `Pretrained` with an AiM and a tokenizer, from `load_pretrained`; or one that was
        prepared by `prepare`.
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
    if not isinstance(model, Pretrained | PreparedModel):
        raise ValueError(
            "model: expected a Pretrained from aim_jax.load_pretrained, or a PreparedModel, got "
            f"{type(model).__name__}."
        )
    if config is not None and not isinstance(config, SamplingConfig):
        raise TypeError(f"config: expected a SamplingConfig, got {type(config).__name__}.")
    parts = model.model if isinstance(model, PreparedModel) else model
    aim_config = parts.aim_config
    vq_config = parts.vq_config
    if aim_config is None or vq_config is None or parts.vq_params is None:
        raise ValueError(f"{parts.name}: generating images requires an AiM and a tokenizer.")
    vq_params = parts.vq_params
    sampling = (config or SamplingConfig(**parts.sampling)).updated(settings)
    check_type("callback", callback, Callable | None)
    Engine(form, implementation, cache_dtype or "float32")  # checks them before the long work
    condition = as_condition(parts, labels)
    count = rows_of(condition)
    if not is_key(seed):
        seed = whole_number("seed", seed)
    first_index = whole_number("first_index", first_index)
    if every is not None and whole_number("every", every) < 1:
        raise ValueError("every=0: expected 1 or more tokens.")
    first_tokens = None if prefix is None else check_prefix(prefix, count, aim_config)
    if isinstance(model, Pretrained):
        model = _prepared(model, implementation)
    decoder = model.decoder
    if implementation not in (None, decoder.engine.implementation):
        raise ValueError(
            f"implementation={implementation!r}: {parts.name} was prepared for "
            f"{decoder.engine.implementation!r}; pass it to aim_jax.prepare."
        )
    engine = Engine(
        form or decoder.engine.form,
        decoder.engine.implementation,
        cache_dtype or decoder.engine.cache_dtype,
    )
    tokens = generate_tokens(
        decoder.with_engine(engine),
        condition,
        seed,
        first_index + np.arange(count, dtype=np.int32),
        sampling,
        prefix=first_tokens,
        callback=callback and (lambda tokens: callback(unfinished(parts, tokens))),
        every=every or math.isqrt(aim_config.num_tokens),
    )
    return Samples(tokens, decode_images(vq_params, tokens, config=vq_config))
