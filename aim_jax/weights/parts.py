"""Stored parameters of a part of a model, the AiM or the tokenizer, before they are read."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from aim_jax.models import aim, vq
from aim_jax.models.config import AiMConfig, VQConfig
from aim_jax.utils.names import reason_of
from aim_jax.weights.model_files import check_sizes
from aim_jax.weights.pretrained import flatten

PARTS = ("aim", "vq")


class StoredPart(NamedTuple):
    """Parameters in files.

    Attributes:
      path: File or directory, for messages.
      shapes: Shapes by dotted name.
      size: Bytes on disk.
      load: Function of the abstract parameters and `as_stored` (see `load_pretrained`), which reads
        them.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    size: int
    load: Callable[[dict, bool], dict]


def load_part(stored: StoredPart, config: AiMConfig | VQConfig, as_stored: bool) -> dict:
    """Load parameters after checking them against the shapes of the configuration.

    Raises:
      ValueError: They do not fit, or cannot be read.
    """
    try:
        check_sizes(config, stored.shapes, stored.size)
        shapes_of = aim.param_shapes if isinstance(config, AiMConfig) else vq.param_shapes
        abstract = shapes_of(config)
    except Exception as error:  # of a module that cannot be built from these sizes
        raise ValueError(
            f"{stored.path} does not fit its configuration: {reason_of(error)}"
        ) from error
    expected = {name: array.shape for name, array in flatten(abstract).items()}
    actual = stored.shapes
    wrong = [f"{name}: missing" for name in sorted(expected.keys() - actual.keys())]
    wrong += [f"{name}: unexpected" for name in sorted(actual.keys() - expected.keys())]
    wrong += [
        f"{name}: shape {actual[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & actual.keys())
        if actual[name] != expected[name]
    ]
    if wrong:
        raise ValueError(
            f"{stored.path} does not fit its configuration ({len(wrong)} arrays): "
            f"{'; '.join(wrong[:5])}"
        )
    return stored.load(abstract, as_stored)
