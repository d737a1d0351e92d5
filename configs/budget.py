"""Sizes and lengths of the folder recipes that fit into a time budget on the device at hand.

A few steps of the smallest model are measured. The time of larger ones follows from their
operations (`aim_jax.perf.flops`); they reach a higher rate, so estimates err on the safe side.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from aim_jax.configs.from_folder import (
    AIMS,
    TOKENIZERS,
    aim_settings,
    aim_size,
    length_settings,
    surveyed,
    tokenizer_settings,
    tokenizer_size,
)
from aim_jax.models.config import AiMConfig, VQConfig
from aim_jax.perf.flops import tokenizer_flops, training_flops
from aim_jax.training.checkpoint import has_checkpoint, read_run_file
from aim_jax.training.rate import images_per_second
from aim_jax.utils.checks import NOT_NEGATIVE, check_number
from aim_jax.utils.logging import say
from aim_jax.weights.pretrained import flatten

CPU_MINUTES = 60.0  # budget on a CPU by default; accelerators have none
# Shares of the budget that the training steps of the two stages may take. The rest is for
# compiling, encoding, evaluation and samples.
SHARES = {"vq": 0.45, "aim": 0.4}
# Images that a model has to see to be worth its size; a smaller one sees more in the same time.
ENOUGH_IMAGES = {"vq": 20_000, "aim": 60_000}
MOST_EPOCHS = {"vq": 60, "aim": 120}
LEAST_STEPS = 600  # for a small folder, however many epochs they are
# Settings that a budget decides. A run that resumes keeps those that it began with.
CHOSEN = (
    "steps", "eval_every", "sample_every", "save_every", "export_every", "ema_decay",
    "optimizer.lr", "optimizer.warmup_steps", "model.ch", "model.ch_mult",
    "model.num_res_blocks", "model.z_channels", "model.d_model", "model.n_layer",
    "model.d_state", "model.num_groups",
)  # fmt: skip

Size = tuple[int, ...]


class Choice(NamedTuple):
    """Size and length of a run.

    Attributes:
      size: Entry of `TOKENIZERS` or `AIMS`.
      steps: Training steps.
      seconds: Expected duration of the steps.
    """

    size: Size
    steps: int
    seconds: float


def choose(
    costs: Mapping[Size, float], stage: str, minutes: float, images: int, batch_size: int
) -> Choice:
    """Choose the largest model that sees enough images in its share of a budget.

    Args:
      costs: Expected seconds per image by size, smallest size first.
      stage: "vq" or "aim".
      minutes: Budget of both stages.
      images: Number of training images.
      batch_size: Images per step.
    """
    seconds = 60 * minutes * SHARES[stage]
    fitting = [size for size, cost in costs.items() if ENOUGH_IMAGES[stage] * cost <= seconds]
    size = fitting[-1] if fitting else next(iter(costs))
    step_seconds = costs[size] * batch_size
    most = max(LEAST_STEPS, MOST_EPOCHS[stage] * images // batch_size)
    steps = max(1, min(most, int(seconds / step_seconds)))
    return Choice(size, steps, steps * step_seconds)


def apply_budget(config: ConfigDict, workdir: Path, given: Collection[str]) -> None:
    """Set size and length of a folder recipe by its budget, and print the choice.

    Args:
      config: A recipe of `aim_jax.configs.from_folder`, changed in place.
      workdir: Directory of the run; one that resumes keeps the choice that it began with.
      given: Dotted names of the settings that the user chose, which stay as they are.

    Raises:
      ValueError: The budget is negative, or several processes have one.
    """
    minutes = budget_minutes(config, given)
    if has_checkpoint(workdir):
        _set(config, _settings_of_run(workdir, config.stage), given)
        if "budget_minutes" in given:
            say(
                f"the run resumes with the {config.steps} steps that were chosen at its start; "
                "--config.steps of the recipes makes it longer"
            )
    elif minutes:
        costs = _costs(config, given)
        images = surveyed(config).images
        choice = choose(costs, config.stage, minutes, images, config.batch_size)
        _set(config, _settings(config, choice.size), given)
        steps = config.steps if "steps" in given else choice.steps
        _set(config, length_settings(config.stage, steps), given)
        say(_in_words(config, choice, costs, minutes, images))
    elif "steps" in given and config.budget_minutes is None and jax.default_backend() == "cpu":
        say("no time budget, because the steps are given; --config.budget_minutes=60 sets one")


def budget_minutes(config: ConfigDict, given: Collection[str] = ()) -> float:
    """Return the budget of a folder recipe in minutes; 0 if there is none.

    Unless the user names a budget, there is one on a CPU only, and none if the user chose the
    steps.

    Raises:
      ValueError: It is negative or no number, or several processes have one.
    """
    minutes = config.budget_minutes
    if minutes is None:
        is_alone_on_cpu = jax.default_backend() == "cpu" and jax.process_count() == 1
        return CPU_MINUTES if is_alone_on_cpu and "steps" not in given else 0.0
    check_number("config.budget_minutes", minutes, NOT_NEGATIVE)
    if minutes and jax.process_count() > 1:
        raise ValueError(
            f"config.budget_minutes={minutes:g} is for a single process; set it to 0 and choose "
            "the sizes yourself."
        )
    return float(minutes)


def _settings_of_run(workdir: Path, stage: str) -> dict[str, Any]:
    """Return the settings of `CHOSEN` of the run in a workdir.

    They are {} for a workdir that the training refuses: of another stage, or without a run file.
    """
    try:
        run = flatten(read_run_file(workdir))
    except FileNotFoundError:
        return {}
    if run.get("stage") != stage:
        return {}
    settings = {}
    for name in CHOSEN:
        if name in run:
            settings[name] = tuple(run[name]) if isinstance(run[name], list) else run[name]
    return settings


def _settings(config: ConfigDict, size: Size) -> dict[str, Any]:
    if config.stage == "aim":
        return aim_settings(size)
    return tokenizer_settings(size, 2 ** (len(config.model.ch_mult) - 1))


def _set(config: ConfigDict, settings: Mapping[str, Any], given: Collection[str]) -> None:
    config.update_from_flattened_dict({k: v for k, v in settings.items() if k not in given})


def _costs(config: ConfigDict, given: Collection[str]) -> dict[Size, float]:
    """Return the expected seconds per image of the sizes up to the recipe's own, smallest first."""
    folder = surveyed(config)
    if config.stage == "aim":
        sizes = AIMS[: AIMS.index(aim_size(folder.images)) + 1]
    else:
        sizes = TOKENIZERS[: max(1, TOKENIZERS.index(tokenizer_size(folder.image_size))) + 1]
    flops = {}
    for size in reversed(sizes):  # ends with the smallest
        sized = config.copy_and_resolve_references()
        _set(sized, _settings(config, size), given)
        flops[size] = _flops(sized)
    seconds, further = _seconds_per_image(sized)
    return {size: seconds * flops[size] / flops[sizes[0]] + further for size in sizes}


def _seconds_per_image(config: ConfigDict) -> tuple[float, float]:
    """Measure a training step: what grows with the model, and LPIPS and discriminator."""
    measured = 1 / images_per_second(config)
    if config.stage == "aim" or not (config.loss.perceptual or config.loss.adversarial):
        return measured, 0.0
    alone = config.copy_and_resolve_references()
    alone.loss.perceptual = 0.0
    alone.loss.adversarial = 0.0
    seconds = 1 / images_per_second(alone)
    return seconds, max(0.0, measured - seconds)


def _flops(config: ConfigDict) -> float:
    """Return the operations of training on one image, without LPIPS and the discriminator."""
    if config.stage == "aim":
        return training_flops(AiMConfig(**config.model))
    return 3 * tokenizer_flops(VQConfig(**config.model), config.data.image_size)


def _in_words(
    config: ConfigDict, choice: Choice, costs: Mapping[Size, float], minutes: float, images: int
) -> str:
    """Describe a choice: time, what the images are seen for, and what more time would buy."""
    batch = config.batch_size
    epochs = config.steps * batch / images
    expected = config.steps * batch * costs[choice.size] / 60
    text = (
        f"budget of {minutes:g} minutes for both stages (--config.budget_minutes): about "
        f"{expected:.0f} minutes of {1 / costs[choice.size]:.1f} images/s here, {epochs:.0f} times "
        "every image"
    )
    larger = [size for size in costs if costs[size] > costs[choice.size]]
    if larger:
        needed = ENOUGH_IMAGES[config.stage] * costs[larger[0]] / 60 / SHARES[config.stage]
        what = "width {} and {} layers" if config.stage == "aim" else "width {} and {} blocks"
        text += f"; from {needed:.0f} minutes on, a model of {what.format(*larger[0])}"
    elif expected < 0.9 * minutes * SHARES[config.stage]:
        text += "; more time is not needed for these images"
    else:
        text += "; more minutes train it longer"
    return text
