"""Compile training and generation for absent devices to estimate memory and speed.

Examples:
  aim-jax compile --config aim_xl --topology v5e:16x16
  aim-jax compile --config aim_l --topology 8xA100-80G --search
  aim-jax compile --config aim_xl --topology v5e:1x1 --notrain --images 64 --cache_dtype bfloat16

This requires the compiler of the devices, not the devices: the extra `tpu`, or JAX's CUDA plugin,
whose installation command is printed if it is missing. The exit status is 1 if a program does not
fit into memory.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from aim_jax.cli.common import define_config
from aim_jax.models.aim import param_shapes
from aim_jax.models.captions import condition_of, condition_shapes
from aim_jax.models.config import AiMConfig
from aim_jax.ops.implementation import compiling_kernels_for
from aim_jax.parallel.sharding import batch_share
from aim_jax.perf.accelerators import peak_flops, topology
from aim_jax.perf.flops import executed_flops, forward_flops, training_flops
from aim_jax.perf.footprint import DoesNotFitError, Footprint, describe, footprint
from aim_jax.sampling.config import SETTINGS
from aim_jax.sampling.engine import Engine, resolve
from aim_jax.sampling.token_loop import (
    Request,
    Series,
    device_mesh,
    generate_sharded,
    make_decoder,
)
from aim_jax.training.aim import Setup
from aim_jax.utils.files import write_json
from aim_jax.utils.logging import say
from aim_jax.utils.random import random_key


def define_flags() -> None:
    """Define the flags of the program."""
    define_config("Recipe for AiM: its name or a file.")
    flags.DEFINE_string(
        "topology", None, "Devices, such as v5e:16x16, v5p-32, 8xA100-80G or 8xH100."
    )
    flags.DEFINE_integer("images", 8, "Images per device for generation; 0 skips generation.", 0)
    flags.DEFINE_enum(
        "cache_dtype", "float32", ("float32", "bfloat16"), "Dtype of the caches of generation."
    )
    flags.DEFINE_bool("train", True, "Compile the training step.")
    flags.DEFINE_bool("search", False, "Double config.accumulate until the training step fits.")
    flags.DEFINE_string("json", "", "JSON file to write the figures to.")
    flags.mark_flags_as_required(["config", "topology"])


def main() -> int:
    """Compile, print the figures, and return the exit status."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs; local accelerators stay free
    f = flags.FLAGS
    figures = report(
        f.config, f.topology, f.images, f.search, train=f.train, cache_dtype=f.cache_dtype
    )
    if f.json:
        write_json(Path(f.json), figures)
    return 0 if figures["fits"] else 1


def training(config: ConfigDict, devices: list[jax.Device]) -> Footprint:
    """Compile the train step that `train` runs, and return its footprint.

    Raises:
      DoesNotFitError: see `footprint`.
      ValueError: see `footprint`, `Setup` and `batch_share` (of every process).
    """
    setup = Setup(config, devices)
    for process in {device.process_index for device in devices}:
        batch_share(setup.mesh, process)
    flops = executed_flops(setup.trained) * config.batch_size / len(devices)
    with compiling_kernels_for(devices[0]):
        lowered = setup.train_step.lower(*setup.abstract_arguments())
        return footprint(lowered, flops, devices[0])


def generation(
    model: AiMConfig, images: int, devices: list[jax.Device], cache_dtype: str = "float32"
) -> Footprint:
    """Compile `generate` with guidance, without the tokenizer, and return its footprint.

    Args:
      model: configuration of the model.
      images: images per device.
      devices: the devices to compile for.
      cache_dtype: see `aim_jax.sampling.engine.Engine`.
    """
    mesh = device_mesh(tuple(devices))
    replicated = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    count = images * len(devices)

    def per_image(dtype: DTypeLike, *shape: int) -> Any:  # stands for an array
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=split)

    ints = per_image(jnp.int32)
    settings = {name: per_image(setting.dtype) for name, setting in SETTINGS.items()}
    shapes = condition_shapes(model, count)
    condition = condition_of({k: x.update(sharding=split) for k, x in shapes.items()})
    request = Request(condition, ints, settings, per_image(jnp.int32, 0))
    # Plain XLA, because the Triton kernels query the local GPU.
    platform = devices[0].platform
    engine = Engine(implementation="xla", cache_dtype=cache_dtype)
    engine = resolve(engine, model, 2 * images, platform)
    make = functools.partial(make_decoder, config=model, engine=engine, platform=platform)
    decoder = jax.eval_shape(make, param_shapes(model))
    series = jax.eval_shape(lambda: Series.of(random_key(0), "constant", (0.0, 1.0)))
    decoder, series = (
        jax.tree.map(lambda x: x.update(sharding=replicated), tree) for tree in (decoder, series)
    )
    lowered = generate_sharded.lower(decoder, request, series, guided=True, mesh=mesh)
    return footprint(lowered, 2 * images * forward_flops(model), devices[0])


def report(
    config: ConfigDict,
    name: str,
    images: int,
    search: bool,
    *,
    train: bool = True,
    cache_dtype: str = "float32",
) -> dict:
    """Compile training and generation, and print and return the figures.

    Args:
      config: configuration of a training of AiM.
      name: name of the topology; see `aim_jax.perf.accelerators.topology`.
      images: images per device for generation; 0 skips generation.
      search: double `config.accumulate` until training fits.
      train: compile the training step.
      cache_dtype: see `generation`.

    Returns:
      "fits", and for "training" and "generation", if compiled, the fields of `Footprint` or the
      error message of the compiler.

    Raises:
      ValueError: if the configuration is not for AiM, or see `training`.
    """
    if config.stage != "aim":
        raise ValueError(f"the configuration has stage {config.stage!r}, expected one for AiM.")
    devices = topology(name, config.mesh.slices)
    model = AiMConfig(**config.model)
    say(
        f"{len(devices)} x {devices[0].device_kind}; analytic GFLOP per image: "
        f"{training_flops(model) / 1e9:.1f} in training, {forward_flops(model) / 1e9:.1f} forward"
    )
    results = {"topology": name, "devices": len(devices), "kind": devices[0].device_kind}
    fits = True
    while train:
        outcome = _try_compile("training", lambda: training(config, devices))
        fits = isinstance(outcome, Footprint) and outcome.fits
        more = 2 * config.accumulate
        if fits or not search or config.batch_size % (more * len(devices) // config.mesh.model):
            break
        config.accumulate = more
        say(f"trying again with config.accumulate={more}")
    if train:
        results["training"] = _as_dict(outcome) | {"accumulate": config.accumulate}
        if isinstance(outcome, Footprint) and outcome.fits:
            rate = config.batch_size / outcome.seconds
            mfu = rate * training_flops(model) / peak_flops(devices)
            hours = config.steps * outcome.seconds / 3600
            results["training"] |= {"images_per_second": rate, "mfu": mfu, "hours": hours}
            say(
                f"{rate:.0f} images/s, MFU {mfu:.0%}, {config.steps} steps in {hours:.1f} h, "
                f"{hours * len(devices):.0f} device hours (modelled)"
            )
    if images:
        outcome = _try_compile(
            f"generation, {images} images per device",
            lambda: generation(model, images, devices, cache_dtype),
        )
        fits = fits and isinstance(outcome, Footprint) and outcome.fits
        results["generation"] = _as_dict(outcome) | {"images": images}
        if isinstance(outcome, Footprint):
            say(f"{images / outcome.seconds:.2f} images/s per device (modelled)")
    return results | {"fits": fits}


def _try_compile(name: str, make: Callable[[], Footprint]) -> Footprint | str:
    """Return the footprint that `make` compiles, or the error message if it does not fit."""
    start = time.perf_counter()
    try:
        result = make()
    except DoesNotFitError as error:
        say(f"\n{name}: DOES NOT FIT: {error}")
        return str(error)
    say(f"\n{name} (compiled in {time.perf_counter() - start:.0f} s)\n{describe(result)}")
    return result


def _as_dict(outcome: Footprint | str) -> dict:
    if isinstance(outcome, str):
        return {"refused": outcome}
    return dataclasses.asdict(outcome) | {"seconds": outcome.seconds, "fits": outcome.fits}
