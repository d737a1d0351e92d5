"""Class-conditional sampling: guidance, filters, and the jitted generation of images.

b images, t tokens per image, v vocabulary. The order of operations on the logits is guidance,
temperature, top-k, top-p, draw.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aim_jax.decode import decode_step, init_caches, prefill, split_layers
from aim_jax.models.aim import AiM, AiMConfig
from aim_jax.models.vq import VQConfig, VQModel


class Samples(NamedTuple):
    """Generated codes (b, t) int32 and images (b, H, W, c) uint8."""

    tokens: jax.Array
    images: jax.Array


# How far guidance has grown when the fraction r of an image is drawn.
SCHEDULES = {
    "constant": lambda r: jnp.ones_like(r),
    "linear": lambda r: r,
    "cosine": lambda r: (1 - jnp.cos(jnp.pi * r)) / 2,
}


def guidance_at(
    position: jax.Array,
    num_tokens: int,
    scale: jax.Array,
    schedule: str = "constant",
    interval: tuple[jax.Array, jax.Array] = (0.0, 1.0),
) -> jax.Array:
    """Guidance scale for one token of an image.

    1 + (scale - 1) ramp(r) with r = (position + 1) / num_tokens, so a growing schedule ends at
    `scale`; and 1, which is no guidance, outside the interval (arXiv 2404.07724).

    Args:
      position: () int, number of the token. scale: () or (b,).
      schedule: "constant", "linear" or "cosine".
      interval: from which fraction of the tokens on, and up to which, there is guidance.
    """
    ramp = SCHEDULES[schedule](jnp.asarray((position + 1) / num_tokens, jnp.float32))
    done = position / num_tokens
    inside = (done >= interval[0]) & (done < interval[1])
    return jnp.where(inside, 1 + (scale - 1) * ramp, 1.0)


def apply_cfg(cond: jax.Array, uncond: jax.Array, scale: jax.Array) -> jax.Array:
    """Classifier-free guidance of logits: uncond + (cond - uncond) * scale.

    Args:
      cond, uncond: (b, v). scale: () or (b,); 1 is the conditional model.
    """
    return uncond + (cond - uncond) * jnp.reshape(scale, (-1, 1))


def filter_top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """Sets logits below the k-th largest to -inf; ties at the k-th value are all kept.

    Args:
      logits: (b, v). k: int () or (b,); 0, or anything above v, keeps everything.
    """
    return _filter(logits, k, None)


def filter_top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Nucleus filter: drops the least likely tokens whose cumulative probability is <= 1 - p.

    The largest logit always stays, and so does any logit equal to the smallest that stays.

    Args:
      logits: (b, v), already filtered ones at -inf. p: () or (b,) in (0, 1]; 1 keeps everything.
    """
    return _filter(logits, None, p)


def filter_logits(logits: jax.Array, k: jax.Array, p: jax.Array) -> jax.Array:
    """`filter_top_k`, then `filter_top_p` on the renormalised rest."""
    return _filter(logits, k, p)


def _filter(logits, k, p):
    """Keeps the logits from a threshold on, which a search by halves finds without a sort.

    Both filters keep the tokens above some logit, and how many tokens, or how much probability, lie
    above a logit falls as it grows. Over the floats in their order (as integers) 32 halvings are
    exact, and much faster on CPU than a sort of the vocabulary.
    """
    order = _ordered_int(logits)
    lowest = threshold = jnp.min(order, axis=-1, keepdims=True)
    highest = jnp.max(order, axis=-1, keepdims=True)
    if k is not None:
        vocab = logits.shape[-1]
        k = jnp.reshape(jnp.where(k < 1, vocab, jnp.minimum(k, vocab)), (-1, 1))
        threshold = _largest(
            lambda t: jnp.sum(order >= t, axis=-1, keepdims=True) >= k, lowest, highest
        )
    if p is not None:
        p = jnp.reshape(jnp.asarray(p, logits.dtype), (-1, 1))
        weights = _weights(jnp.where(order >= threshold, logits, -jnp.inf))
        removed = (1 - p) * jnp.sum(weights, axis=-1, keepdims=True)

        def below_is_removed(t):
            below = jnp.sum(jnp.where(order < t, weights, 0), axis=-1, keepdims=True)
            return below <= removed

        nucleus = _largest(below_is_removed, threshold, highest)
        threshold = jnp.where(p < 1, nucleus, threshold)
    return jnp.where(order >= threshold, logits, -jnp.inf)


def _ordered_int(x: jax.Array) -> jax.Array:
    """Integers in the order of the floats x."""
    size = x.dtype.itemsize * 8
    bits = jax.lax.bitcast_convert_type(x, f"int{size}")
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def _largest(holds, low: jax.Array, high: jax.Array) -> jax.Array:
    """The largest integer in [low, high] for which `holds`, which does up to it and at low."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up, without overflow
        ok = holds(middle)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    bits = low.dtype.itemsize * 8
    return jax.lax.fori_loop(0, bits, halve, tuple(jnp.broadcast_arrays(low, high)))[0]


def _weights(logits: jax.Array) -> jax.Array:
    """Probabilities up to a factor per row."""
    return jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))


def draw(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """One token per row from softmax(logits), by inverting the distribution function.

    One random number per row, where the Gumbel-max rule takes one per token of the vocabulary. The
    sum is taken in two levels, blocks and then within one.

    Args:
      logits: (b, v). keys: (b,), one per row.

    Returns:
      int32 (b,); never a token whose logit is -inf.
    """
    b, vocab = logits.shape
    block = math.isqrt(vocab)
    weights = jnp.pad(_weights(logits), ((0, 0), (0, -vocab % block))).reshape(b, -1, block)
    sums = jnp.sum(weights, axis=-1)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (), logits.dtype))(keys)
    chosen, rest = _invert(sums, uniform * jnp.sum(sums, axis=-1))
    inside, _ = _invert(jnp.take_along_axis(weights, chosen[:, None, None], axis=1)[:, 0], rest)
    return (chosen * block + inside).astype(jnp.int32)


def _invert(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First index (b,) where the running sum of weights (b, n) exceeds target, and what is left.

    Rounding may put the target at or above the whole sum, and makes running sums uneven where
    weights are zero; an index of positive weight is found all the same.
    """
    ends = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0)
    below_all = jnp.nextafter(jnp.max(ends, axis=-1), jnp.zeros((), ends.dtype))
    index = jnp.argmax(ends > jnp.minimum(target, below_all)[:, None], axis=-1)
    at = lambda x: jnp.take_along_axis(x, index[:, None], axis=-1)[:, 0]  # noqa: E731
    return index, target - (at(ends) - at(weights))


@functools.partial(jax.jit, static_argnames=("config", "guided", "schedule"))
def generate_tokens(
    params: dict,
    labels: jax.Array,
    seed: jax.Array,
    index: jax.Array,
    cfg_scale: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    *,
    config: AiMConfig,
    guided: bool = True,
    schedule: str = "constant",
    interval: tuple[jax.Array, jax.Array] = (0.0, 1.0),
    prefix: jax.Array | None = None,
) -> jax.Array:
    """Draws the codes of a batch of images, one after the other, in one compiled loop.

    With guidance every image has two rows, conditional and null class; one token is drawn per
    image and fed to both. Randomness is a function of (seed, index, position) alone, so an image
    does not depend on the batch it is in.

    Args:
      params: AiM parameters. labels: int (b,). seed: int (). index: int (b,), number of each image.
      cfg_scale, temperature, top_k, top_p: () or (b,); see `apply_cfg` and the filters.
      config: shape of the model.
      guided: False leaves the null-class rows out, which is cfg_scale = 1 at half the cost.
      schedule, interval: how guidance changes over an image; see `guidance_at`.
      prefix: int (b, l), the first codes of every image, 0 < l < num_tokens; the rest is drawn.

    Returns:
      int32 (b, num_tokens), raster order.
    """
    model, b = AiM(config), labels.shape[0]
    base = jax.random.key(seed)
    image_keys = jax.vmap(functools.partial(jax.random.fold_in, base))(index)

    def apply(method, *args):
        return model.apply({"params": params}, *args, method=method)

    def rows(x):
        return jnp.concatenate([x, x]) if guided else x

    null = jnp.full_like(labels, config.num_classes)
    start, modulation = apply("condition", jnp.concatenate([labels, null]) if guided else labels)

    def step(carry, position):
        x, caches = carry
        logits, caches = decode_step(params, layers, x, modulation, caches, config)
        if guided:
            scale = guidance_at(position, config.num_tokens, cfg_scale, schedule, interval)
            logits = apply_cfg(logits[:b], logits[b:], scale)
        logits = filter_logits(logits / jnp.reshape(temperature, (-1, 1)), top_k, top_p)
        keys = jax.vmap(lambda key: jax.random.fold_in(key, position))(image_keys)
        token = draw(logits, keys)
        x = rows(apply("embed_codes", token[:, None], position[None]))
        return (x, caches), token

    layers = split_layers(params, config)
    if prefix is None:
        first, carry = 0, (start, init_caches(config, start.shape[0]))
    else:
        first = prefix.shape[1]
        given = rows(apply("embed_codes", prefix, jnp.arange(first)))
        before = jnp.concatenate([start, given[:, :-1]], axis=1)
        carry = (given[:, -1:], prefill(params, before, modulation, config))
    _, tokens = jax.lax.scan(step, carry, jnp.arange(first, config.num_tokens))
    return tokens.T if prefix is None else jnp.concatenate([prefix, tokens.T], axis=1)


@functools.partial(jax.jit, static_argnames="config")
def decode_images(params: dict, tokens: jax.Array, *, config: VQConfig) -> jax.Array:
    """Codes (b, t) -> images (b, H, W, c) uint8, through the tokenizer's decoder."""
    return to_uint8(VQModel(config).apply({"params": params}, tokens, method="decode_tokens"))


def to_uint8(images: jax.Array) -> jax.Array:
    """Images in [-1, 1] (values outside are clipped) -> uint8."""
    return jnp.round(jnp.clip((images + 1) * 127.5, 0, 255)).astype(jnp.uint8)


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
        ("top_k", top_k, lambda x: x >= 0 and x == int(x), "an integer >= 0 (0 is off)"),
        ("top_p", top_p, lambda x: 0 < x <= 1, "in (0, 1] (1 is off)"),
    ):
        bad = [x for x in np.ravel(value).tolist() if not ok(x)]
        if bad:
            raise ValueError(f"{name}={bad[0]}: expected {expected}.")
        if np.ndim(value) and np.shape(value) != labels.shape:
            raise ValueError(f"{name}: expected one value, or one per label ({labels.size}).")
    if schedule not in SCHEDULES:
        raise ValueError(f"cfg_schedule={schedule!r}: expected one of {sorted(SCHEDULES)}.")
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(
            f"cfg_interval={tuple(interval)}: expected two fractions of the image, start < end, in "
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


def encode_rows(model, images: np.ndarray, rows: int) -> np.ndarray:
    """Codes of the upper part of pictures, for `generate(prefix=...)`.

    The encoder sees the whole picture, so the codes know a little of what lies below them.

    Args:
      model: a `Pretrained` with a tokenizer. images: float (b, H, W, c) in [-1, 1], see
        `aim_jax.data.preprocess`. rows: rows of codes to keep, each `downsampling` pixels high.

    Returns:
      int32 (b, rows * width in codes).

    Raises:
      ValueError: the number of rows leaves nothing to complete.
    """
    height, width = (size // model.vq_config.downsampling for size in images.shape[1:3])
    if not 0 < rows < height:
        raise ValueError(f"rows={rows}: expected 1 to {height - 1} of {height} rows of codes.")
    vq = VQModel(model.vq_config)
    codes = vq.apply({"params": model.vq_params}, jnp.asarray(images), method="encode_to_tokens")
    return np.asarray(codes[:, : rows * width])


def generate(
    model,
    labels,
    seed: int = 0,
    *,
    cfg_scale=None,
    temperature=None,
    top_k=None,
    top_p=None,
    cfg_schedule: str = "constant",
    cfg_interval: tuple[float, float] = (0.0, 1.0),
    prefix: np.ndarray | None = None,
    first_index: int = 0,
) -> Samples:
    """Generates one image per label.

    Args:
      model: a `Pretrained` with both parts, from `load_pretrained`.
      labels: class ids (b,); `num_classes` is the null class.
      seed: with the image's number it decides the randomness of the image.
      cfg_scale: guidance; 1 is none. temperature: > 0. top_k: 0 is off; 1 is greedy. top_p: in
        (0, 1]. Each may be one value or one per image; None takes the model's default.
      cfg_schedule, cfg_interval: "constant", "linear" or "cosine" growth of the guidance over an
        image, and the part of the image that has any; see `guidance_at`.
      prefix: int (b, l), codes that the images start with, to complete them; `encode_rows` makes
        them from pictures.
      first_index: number of the first image, to continue a series in batches.

    Returns:
      Samples: tokens (b, t) int32 and images (b, H, W, c) uint8.

    Raises:
      ValueError: a label or setting out of range, or a model without one of the parts.
    """
    if model.aim_params is None or model.vq_params is None:
        raise ValueError(f"{model.name}: generating images needs both an AiM and a tokenizer.")
    chosen = dict(cfg_scale=cfg_scale, temperature=temperature, top_k=top_k, top_p=top_p)
    settings = {k: model.sampling[k] if v is None else v for k, v in chosen.items()}
    labels = np.asarray(labels)
    check_settings(
        labels,
        model.aim_config.num_classes,
        **settings,
        schedule=cfg_schedule,
        interval=cfg_interval,
    )
    tokens = generate_tokens(
        model.aim_params,
        jnp.asarray(labels, jnp.int32),
        seed,
        first_index + jnp.arange(labels.size),
        *(jnp.asarray(settings[k], jnp.float32) for k in ("cfg_scale", "temperature")),
        jnp.asarray(settings["top_k"], jnp.int32),
        jnp.asarray(settings["top_p"], jnp.float32),
        config=model.aim_config,
        guided=bool(np.any(np.asarray(settings["cfg_scale"]) != 1)),
        schedule=cfg_schedule,
        interval=tuple(cfg_interval),
        prefix=None if prefix is None else check_prefix(prefix, labels.size, model.aim_config),
    )
    return Samples(tokens, decode_images(model.vq_params, tokens, config=model.vq_config))
