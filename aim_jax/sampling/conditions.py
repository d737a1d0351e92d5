"""Checks of what images are generated for: classes, captions, or features of captions."""

from typing import Any

import numpy as np

from aim_jax.data.features import FeatureFile
from aim_jax.data.text import TextTokenizer
from aim_jax.models.captions import CaptionFeatures
from aim_jax.utils.checks import ArgumentError
from aim_jax.utils.logging import say
from aim_jax.weights.pretrained import Pretrained, class_ids


def as_array(name: str, value: Any) -> np.ndarray:
    """Return an argument as a NumPy array.

    Raises:
      ArgumentError: its parts have different lengths, or it is no array; the message names it.
    """
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name}: expected an array or a list of numbers: {error}") from error


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Check that labels are a non-empty one-dimensional array of class ids.

    Raises:
      ValueError: if they are not; the null class `num_classes` is accepted.
    """
    if labels.ndim != 1 or not labels.size or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels: expected a non-empty list of class ids, got {labels.dtype} of shape "
            f"{labels.shape}."
        )
    out_of_range = sorted({int(i) for i in labels if not 0 <= i <= num_classes})
    if out_of_range:
        raise ValueError(
            f"labels: {out_of_range} out of range; expected class ids 0..{num_classes - 1}, or "
            f"{num_classes} for the null class."
        )


def as_condition(model: Pretrained, labels: Any) -> np.ndarray | CaptionFeatures:
    """Check what images are to be generated for, and return it as arrays.

    Args:
      model: a `Pretrained` with an AiM.
      labels: class ids or class names; or, for a text model, captions as text, as tokens int (b, l)
        with -1 on the left, or as `CaptionFeatures`, with l of at most `max_caption`. A model of
        features takes text if a file of features is attached to it. An empty caption is the null
        caption, which is said, and the end of a long one is cut off.

    Returns:
      Labels int (b,), or captions.

    Raises:
      ValueError: if they are empty, out of range, or of another kind than the model takes.
    """
    config = model.aim_config
    if config is None:
        raise ValueError(f"{model.name} holds no AiM.")
    if config.caption_features:
        return _checked_features(model, labels)
    if isinstance(labels, CaptionFeatures):
        raise ValueError(f"labels: {model.name} takes no features of captions.")
    labels = as_array("labels", labels)
    is_names = labels.dtype.kind == "U" and labels.ndim == 1
    if not config.is_text:
        labels = np.asarray(class_ids(model, labels.tolist())) if is_names else labels
        check_labels(labels, config.num_classes)
        return labels
    if is_names and labels.size:
        assert isinstance(model.text, TextTokenizer)
        tokens = model.text.encode(labels.tolist(), config.max_caption)
        if empty := int((tokens < 0).all(axis=1).sum()):
            say(f"{empty} of {len(tokens)} captions are empty: the null caption, for any image")
        return tokens
    fits = labels.ndim == 2 and len(labels) and 0 < labels.shape[1] <= config.max_caption
    if not fits or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels: {model.name} takes captions; expected a list of texts, or tokens (b, l) with "
            f"l of at most {config.max_caption}, got {labels.dtype} of shape {labels.shape}."
        )
    ends = np.diff((labels >= 0).astype(np.int8), axis=1) < 0
    if labels.min() < -1 or labels.max() >= config.caption_vocab or ends.any():
        raise ValueError(
            f"labels: expected tokens of captions in 0..{config.caption_vocab - 1}, with -1 before "
            "the first."
        )
    return labels.astype(np.int32)


def _checked_features(model: Pretrained, captions: Any) -> CaptionFeatures:
    """Return the features of captions as arrays, after checking their shapes."""
    assert model.aim_config is not None
    config = model.aim_config
    width = config.caption_features
    if isinstance(model.text, FeatureFile) and not isinstance(captions, CaptionFeatures):
        texts = as_array("labels", captions)
        if texts.dtype.kind == "U" and texts.ndim == 1 and texts.size:
            return model.text.encode(texts.tolist(), config.max_caption)
    if isinstance(captions, CaptionFeatures):
        values = as_array("labels: values", captions.values)
        lengths = as_array("labels: lengths", captions.lengths)
        length = values.shape[1] if values.ndim == 3 else 0
        fits = 0 < length <= config.max_caption and values.shape[2] == width and len(values) > 0
        fits = fits and lengths.shape == values.shape[:1] and lengths.dtype.kind in "iu"
        if fits and lengths.min() >= 0 and lengths.max() <= length:
            return CaptionFeatures(values.astype(np.float32), lengths.astype(np.int32))
    raise ValueError(
        f"labels: {model.name} takes features of captions; expected CaptionFeatures with values "
        f"(b, l, {width}), l of at most {config.max_caption}, and lengths (b,) from 0 to l."
    )
