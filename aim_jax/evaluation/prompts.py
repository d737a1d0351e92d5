"""Prompts of the samples of an evaluation: classes in turn, or captions."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from aim_jax.data.captions import read_captions
from aim_jax.evaluation.references import open_sources
from aim_jax.weights.pretrained import Pretrained


class Prompts(NamedTuple):
    """Conditions of a series of samples.

    Attributes:
      name: where captions come from, for the report; "" for classes.
      labels: class ids int32 (n,), or captions as text (n,).
    """

    name: str
    labels: np.ndarray

    @property
    def settings(self) -> dict[str, str]:
        """Hash of the captions, for the settings of a series; {} for classes."""
        if not self.name:
            return {}
        text = "\n".join(self.labels.tolist())
        return {"captions": hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()}


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
    """Return `count` labels that cycle through the classes, so that every part is balanced too.

    The Inception Score is a mean over splits of the series; sorted labels would leave few classes
    in each split.
    """
    return (np.arange(count) % num_classes).astype(np.int32)


def open_prompts(model: Pretrained, config: ConfigDict, reference: str = "") -> Prompts:
    """Return what a model's `config.num_samples` samples are generated for.

    Captions take turns; of more captions than samples, evenly spaced ones are used.

    Args:
      model: with an AiM.
      config: `config.captions` is a text file of one caption per line, or NAME:SPLIT of a dataset
        with captions; "" takes the captions of the reference.
      reference: name of the reference; see `aim_jax.evaluation.references.open_reference`.

    Raises:
      ValueError: The model and the captions do not fit together, or there are none.
      FileNotFoundError: The file of captions is missing.
    """
    aim_config, _ = model.aim()
    if not aim_config.is_text:
        if config.captions:
            raise ValueError(
                f"{model.name} generates from classes; leave out config.captions={config.captions}."
            )
        return Prompts("", balanced_labels(config.num_samples, aim_config.num_classes))
    if model.text is None:
        raise ValueError(f"{model.name} takes features of captions; name their file.")
    name = config.captions or reference
    captions = _captions(name, config)
    count = config.num_samples
    turns = np.arange(count) % len(captions)
    spaced = np.linspace(0, len(captions) - 1, count).astype(int)
    chosen = turns if count >= len(captions) else spaced
    return Prompts(f"{name} ({len(captions)})", np.asarray(captions)[chosen])


def _captions(name: str, config: ConfigDict) -> list[str]:
    """Return the captions that `name` stands for: a text file, or a dataset."""
    missing = ValueError(
        f"{name} has no captions to generate from; set config.captions to a text file of one "
        "caption per line, or to NAME:SPLIT of a dataset with captions."
    )
    if name.endswith(".npz"):
        raise missing
    if Path(name).is_file() or name.endswith(".txt"):
        return read_captions(name)
    dataset, _, split = name.partition(":")
    if not split:
        raise missing
    captions: list[str] = []
    for source in open_sources(dataset, split, config.data.dir or None):
        if source.captions is None:
            raise missing
        captions += source.captions
    return captions
