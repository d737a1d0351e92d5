"""Sample images from a trained model into a labelled PNG grid.

Examples:
  aim-jax sample --checkpoint fashion_mnist --out samples
  aim-jax sample --checkpoint cifar10 --classes cat,ship,3 --per_class 16 --cfg_scale 3
  aim-jax sample --checkpoint cifar10 --progressive  # watch samples/grid.png
  aim-jax sample --checkpoint runs/t2i --captions "a red apple,a blue heart"

--checkpoint is the name of a bundled model, a model directory, the workdir of a training run,
official weights, or an address on the Hugging Face hub (hf://hp-l33/aim-base).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from aim_jax.cli.common import define_sampling_flags, given_settings
from aim_jax.sampling.config import SCHEDULES

if TYPE_CHECKING:
    from aim_jax.weights.pretrained import Pretrained


def define_flags() -> None:
    """Define the flags of the program."""
    flags.DEFINE_string("checkpoint", "fashion_mnist", "Bundled model, model directory or workdir.")
    flags.DEFINE_list("classes", [], "Class names or ids. Default: all classes, at most 20.")
    flags.DEFINE_list(
        "captions",
        [],
        "Captions, for a model of captions; one with a comma in quotes: '\"a cat, asleep\",a dog'.",
    )
    flags.DEFINE_string("captions_file", "", "File of more captions, one per line.")
    define_caption_features()
    flags.DEFINE_bool(
        "strict", False, "Refuse captions that are too long, which are cut otherwise."
    )
    flags.DEFINE_integer("per_class", 8, "Images per class or caption.", lower_bound=1)
    flags.DEFINE_integer(
        "seed",
        0,
        "Random seed; image i of a seed is the same in any batch, except for rounding.",
        lower_bound=0,
    )
    define_sampling_flags()
    flags.DEFINE_enum(
        "cfg_schedule",
        None,
        list(SCHEDULES),
        "Growth of the guidance scale over an image. Default: that of the model.",
    )
    flags.DEFINE_list(
        "cfg_interval",
        None,
        "Start and end of guidance, as fractions of the tokens, such as 0.1,0.8. Default: those of "
        "the model.",
    )
    flags.DEFINE_enum(
        "position_offset",
        None,
        ["0", "1"],
        "Offset of token j in the position table. For converted weights: 1 as in the official "
        "sampler, 0 as in the official training. Default: that of the model.",
    )
    flags.DEFINE_bool("progressive", False, "Write the grid after every row of tokens.")
    flags.DEFINE_enum(
        "compute_dtype",
        None,
        ["float32", "bfloat16"],
        "Dtype of matrix products and convolutions. Default: that of the model.",
    )
    flags.DEFINE_enum(
        "implementation",
        None,
        ["xla", "native", "triton"],
        "Implementation of the token loop: XLA, or fused kernels for CPU (native) or NVIDIA GPU "
        "(triton). Default: the fastest for the device.",
    )
    flags.DEFINE_enum(
        "form",
        None,
        ["recurrent", "dual"],
        "Form of the recurrence, which carries states or past tokens. Default: the faster one.",
    )
    flags.DEFINE_enum(
        "cache_dtype", "float32", ["float32", "bfloat16"], "Dtype of the carried states or tokens."
    )
    flags.DEFINE_integer("batch_size", 64, "Images sampled at once.", lower_bound=1)
    flags.DEFINE_string("out", "samples", "Directory for the results.")
    flags.DEFINE_bool("pngs", False, "Also write one PNG per image.")
    flags.DEFINE_bool(
        "npz", False, "Also write samples.npz: arr_0 uint8 NHWC, and labels int32 or captions."
    )


def main() -> None:
    """Write the samples and print the paths."""
    from aim_jax.sampling.grids import sample_to_directory
    from aim_jax.weights.load import load_pretrained

    f = flags.FLAGS
    settings = given_settings(f) | {
        "cfg_schedule": f.cfg_schedule,
        "cfg_interval": _interval(f.cfg_interval),
    }
    model = load_pretrained(f.checkpoint)
    if f.position_offset is not None:
        model = model.with_position_offset(int(f.position_offset))
    if f.compute_dtype:
        model = model.with_compute_dtype(f.compute_dtype)
    model = with_caption_features(model, f.caption_features)
    classes = chosen(model, f.classes, f.captions, f.captions_file, f.strict)
    for path in sample_to_directory(
        model, classes, f.per_class, Path(f.out), seed=f.seed, batch_size=f.batch_size,
        pngs=f.pngs, npz=f.npz, progressive=f.progressive,
        implementation=f.implementation, form=f.form, cache_dtype=f.cache_dtype, **settings,
    ):  # fmt: skip
        print(path)


def define_caption_features() -> None:
    """Define the flag of the file of features."""
    flags.DEFINE_string(
        "caption_features",
        "",
        "File of the features of captions, for a model that takes those of another encoder.",
    )


def with_caption_features(model: "Pretrained", path: str) -> "Pretrained":
    """Return the model with the file that the flag names, if any."""
    return model.with_caption_features(path) if path else model


def chosen(
    model: "Pretrained",
    classes: Sequence[str],
    captions: Sequence[str],
    captions_file: str,
    strict: bool = False,
) -> list[int] | list[str]:
    """Return class ids, or the captions of a model of captions.

    Args:
      classes: names or ids; without any, all classes, at most 20.
      captions: captions.
      captions_file: file of more captions, one per line; "" is none.
      strict: refuse captions that are too long.

    Raises:
      ValueError: the model takes the other kind, no caption is given, or one is too long.
    """
    from aim_jax.data.captions import read_captions
    from aim_jax.weights.pretrained import class_ids

    if captions_file:
        captions = [*captions, *read_captions(captions_file)]
    config, _ = model.aim()
    if not config.is_text:
        if captions:
            raise ValueError(f"{model.name} takes no captions; choose its --classes.")
        return class_ids(model, classes)
    if model.text is None:
        raise ValueError(
            f"{model.name} takes features of captions, from another encoder; name their file by "
            "--caption_features."
        )
    if classes:
        raise ValueError(f"{model.name} has no classes; write --captions.")
    if not captions:
        raise ValueError(
            f"{model.name} generates from captions; write --captions or --captions_file."
        )
    if strict:
        model.text.encode(captions, config.max_caption, strict=True)
    return list(captions)


def _interval(texts: Sequence[str] | None) -> tuple[float, ...] | None:
    """Parse the flag `--cfg_interval`; None if it is not set."""
    if texts is None:
        return None
    try:
        return tuple(map(float, texts))
    except ValueError:
        raise ValueError(
            f"--cfg_interval={','.join(texts)}: expected two fractions separated by a comma, such "
            "as 0.1,0.8."
        ) from None
