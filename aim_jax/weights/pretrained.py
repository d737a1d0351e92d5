"""Trained models in memory."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from aim_jax.data.features import FeatureFile
from aim_jax.data.text import TextTokenizer
from aim_jax.models import vq
from aim_jax.models.config import AiMConfig, VQConfig
from aim_jax.utils.checks import shown
from aim_jax.utils.names import match_name, short_list

MOST_CLASSES = 20  # classes of a large model that programs sample and list by default


def flatten(tree: dict) -> dict[str, Any]:
    """Flatten nested dicts to one dict with dotted keys."""
    return flatten_dict(tree, sep=".")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A trained model in memory; missing parts are None.

    Attributes:
      name: Name or path that the model was loaded from.
      aim_config, aim_params: The autoregressive model; float32 unless loaded as stored.
      vq_config, vq_params: The tokenizer; float32 unless loaded as stored.
      class_names: One name per class, or empty.
      text: The text tokenizer of captions, if their tokens condition the AiM; or the features that
        do, which belong to no model directory.
      sampling: The model's own values of fields of `aim_jax.sampling.SamplingConfig`.
      info: Further metadata of the directory (dataset, image size, provenance).
      prepared: What `aim_jax.generate` keeps of the model, by implementation.
    """

    name: str
    aim_config: AiMConfig | None = None
    aim_params: dict | None = None
    vq_config: VQConfig | None = None
    vq_params: dict | None = None
    class_names: tuple[str, ...] = ()
    sampling: dict = dataclasses.field(default_factory=dict)
    info: dict = dataclasses.field(default_factory=dict)
    text: TextTokenizer | FeatureFile | None = None
    prepared: dict = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        known = 0 if self.text is None else self.text.vocab_size
        expected = 0 if self.aim_config is None else self.aim_config.caption_vocab
        if known != expected:
            raise ValueError(
                f"{self.name}: the AiM has a vocabulary of captions of {expected}, but the text "
                f"tokenizer has {known} (0: there is none); they do not belong together."
            )
        if not (self.aim_config and self.vq_config):
            return
        if self.aim_config.vocab_size != self.vq_config.n_embed:
            raise ValueError(
                f"{self.name}: the AiM has a vocabulary of {self.aim_config.vocab_size}, but the "
                f"tokenizer has {self.vq_config.n_embed} codebook entries; they do not belong "
                "together."
            )

    def aim(self) -> tuple[AiMConfig, dict]:
        """Return configuration and parameters of the autoregressive model.

        Raises:
          ValueError: The model has no AiM.
        """
        if self.aim_config is None or self.aim_params is None:
            raise ValueError(f"{self.name} holds no AiM.")
        return self.aim_config, self.aim_params

    def vq(self) -> tuple[VQConfig, dict]:
        """Return configuration and parameters of the tokenizer.

        Raises:
          ValueError: The model has no tokenizer.
        """
        if self.vq_config is None or self.vq_params is None:
            raise ValueError(f"{self.name} holds no tokenizer.")
        return self.vq_config, self.vq_params

    def with_position_offset(self, offset: int) -> "Pretrained":
        """Return the model with position row j + `offset` for token j; see `AiMConfig`."""
        if self.aim_config is None:
            raise ValueError(f"{self.name} holds no AiM, so it has no positions.")
        config = dataclasses.replace(self.aim_config, position_offset=offset)
        return dataclasses.replace(self, aim_config=config)

    def with_tokenizer(self, other: "Pretrained") -> "Pretrained":
        """Return the model with another tokenizer of the same tokens, whose decoder was trained on.

        Raises:
          ValueError: `other` has no tokenizer, or its tokens have another meaning.
        """
        if self.vq_params is None or other.vq_params is None:
            raise ValueError(f"{self.name} and {other.name}: both must hold a tokenizer.")
        own, others = (
            flatten(vq.encoder_params(params)) for params in (self.vq_params, other.vq_params)
        )
        same = own.keys() == others.keys()
        dtypes = {m.vq_config.compute_dtype for m in (self, other) if m.vq_config is not None}
        same &= len(dtypes) == 1
        if not same or not all(np.array_equal(own[name], others[name]) for name in own):
            raise ValueError(
                f"{other.name} has another encoder, codebook or compute dtype than {self.name}, so "
                "its tokens have another meaning. Train its decoder with config.init and "
                "config.decoder_only=True."
            )
        info = self.info | {k: other.info[k] for k in ("data", "vq_steps") if k in other.info}
        return dataclasses.replace(
            self, vq_config=other.vq_config, vq_params=other.vq_params, info=info
        )

    def with_caption_features(self, path: str | os.PathLike) -> "Pretrained":
        """Return the model with a file of features, so that it takes the captions of the file.

        Raises:
          ValueError: The model takes no features, or features of another width.
          OSError: The file cannot be read.
        """
        width = self.aim_config.caption_features if self.aim_config else 0
        if not width:
            raise ValueError(f"{self.name} takes no features of captions.")
        file = FeatureFile(path)
        if file.width != width:
            raise ValueError(
                f"{file.path} has features of {file.width} values; {self.name} takes {width}."
            )
        return dataclasses.replace(self, text=file)

    def with_compute_dtype(self, dtype: str) -> "Pretrained":
        """Return the model with both parts computing in "float32" or "bfloat16"."""
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute dtype {dtype!r}: expected float32 or bfloat16.")
        changed = {
            name: dataclasses.replace(config, compute_dtype=dtype)
            for name in ("aim_config", "vq_config")
            if (config := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **changed)


def class_ids(model: Pretrained, classes: Sequence[str]) -> list[int]:
    """Return the class ids of names or numbers; without any, all ids, or the first 20 of many.

    Names are matched by `aim_jax.utils.names.match_name`. An item that is a class name is never
    read as a number.

    Raises:
      ValueError: A name is unknown or fits several classes, or a number is out of range; the
        message lists the classes. Or the model holds no AiM, or has no classes.
    """
    if model.aim_config is None:
        raise ValueError(f"{model.name} holds only a tokenizer; sampling needs an AiM.")
    if model.aim_config.is_text:
        raise ValueError(f"{model.name} generates from captions and has no classes; pass captions.")
    count = model.aim_config.num_classes
    if not classes:
        return list(range(min(count, MOST_CLASSES)))
    ids = []
    for item in classes:
        number = match_name(item, model.class_names)
        if number is None:
            number = int(item) if item.strip().isdecimal() else -1
        if not 0 <= number < count:
            known = short_list(model.class_names, MOST_CLASSES) or f"ids 0 to {count - 1}"
            raise ValueError(f"unknown class {shown(item)}; {model.name} has the classes {known}.")
        ids.append(number)
    return ids
