"""Describe a model: its configuration, class names, sampling defaults and parameters.

Examples:
  aim-jax describe --checkpoint cifar10
  aim-jax describe --checkpoint runs/fashion_mnist
  aim-jax describe --checkpoint runs/fashion_mnist --seal    # after an edit of its model.json
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from aim_jax.utils.names import printable, short_list

if TYPE_CHECKING:
    from aim_jax.weights.pretrained import Pretrained


def define_flags() -> None:
    """Define the flags of the program."""
    flags.DEFINE_string(
        "checkpoint", "cifar10", "Bundled model, model directory, workdir of a run, or hf://."
    )
    flags.DEFINE_bool(
        "seal",
        False,
        "Write the checksums of a model directory again, after you edited model.json.",
    )


def main() -> None:
    """Print the description of a model."""
    from aim_jax.utils.logging import say
    from aim_jax.weights.load import load_pretrained, seal_model

    if flags.FLAGS.seal:
        say(f"sealed {seal_model(flags.FLAGS.checkpoint)}")
    print("\n".join(describe(load_pretrained(flags.FLAGS.checkpoint, as_stored=True))))


def describe(model: "Pretrained") -> Iterator[str]:
    """Yield the lines of the description of a model; sizes are of its parameters as loaded."""
    from aim_jax.utils.parameters import parameter_table
    from aim_jax.weights.pretrained import MOST_CLASSES

    yield printable(model.name, lines=False)
    yield from _fields(model.info)
    if model.class_names:
        yield f"\n{len(model.class_names)} classes"
        yield f"  {short_list(model.class_names, MOST_CLASSES)}"
    if model.aim_params is not None:
        yield "\nSampling defaults"
        yield from _fields(model.sampling)
    for title, config, params in (
        ("AiM", model.aim_config, model.aim_params),
        ("Tokenizer", model.vq_config, model.vq_params),
    ):
        if config is not None and params is not None:
            yield f"\n{title}"
            yield from _fields(dataclasses.asdict(config))
            yield parameter_table(params)


def _fields(values: dict[str, Any]) -> Iterator[str]:
    width = max(map(len, values), default=0)
    for name, value in values.items():
        yield f"  {name:<{width}}  {printable(str(value), lines=False)}"
