"""Export of a model as programs that run without this library: `jax.export` and StableHLO.

Shapes: b images; 2 b rows, conditional rows before null-class rows.
"""

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from aim_jax.data.text import TEXT_TOKENIZER_FILE, TextTokenizer
from aim_jax.models.aim import AiM
from aim_jax.models.captions import condition_shapes
from aim_jax.sampling.config import SETTINGS, SamplingConfig
from aim_jax.sampling.engine import Engine
from aim_jax.sampling.images import decode_padded
from aim_jax.sampling.token_loop import Request, Series, generate_on_device, make_decoder
from aim_jax.utils.checks import check_arguments
from aim_jax.utils.files import replacing, write_json
from aim_jax.utils.logging import Progress, reminding
from aim_jax.utils.random import random_key
from aim_jax.weights.pretrained import Pretrained

PLATFORMS = ("cpu", "cuda", "tpu")
# Plain XLA runs on any platform; fused kernels would tie the artifact to one.
ENGINE = Engine(form="recurrent", implementation="xla")

RUNNER = Path(__file__).with_name("export_runner.py")


def flat_weights(model: Pretrained, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return all parameters by dotted names that begin with "aim." or "vq."."""
    tree = {"aim": model.aim_params, "vq": model.vq_params}
    # safetensors writes raw memory, so arrays must be contiguous.
    flat = flatten_dict(tree, sep=".")
    return {k: np.ascontiguousarray(v, jnp.dtype(dtype)) for k, v in flat.items()}


def _unflatten(weights: dict) -> dict:
    return unflatten_dict({k: v.astype(jnp.float32) for k, v in weights.items()}, sep=".")


def _condition_shape(model: Pretrained, rows: Any) -> jax.ShapeDtypeStruct:
    """Return the shape of labels (rows,) or tokens of captions (rows, max_caption), both int32."""
    config, _ = model.aim()
    if config.caption_features:
        raise ValueError(f"{model.name} takes features of captions, and export takes tokens.")
    (shape,) = condition_shapes(config, rows).values()
    return shape


def _shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@check_arguments
def export_sampler(model: Pretrained, dtype: str = "float32") -> jax.export.Exported:
    """Export `aim_jax.generate` as one program for any number of images.

    Args:
      model: with an AiM and a tokenizer.
      dtype: dtype of the stored weights.

    Returns:
      `jax.export.Exported` of (weights, labels (b,) int32, seed () uint32, index (b,) int32,
      settings, interval (2,) float32) -> (tokens (b, t) int32, images (b, H, W, c) uint8,
      finite (b,) bool). Images with logits that are not finite are not `finite`, and are nonsense.
      A model of captions takes their tokens (b, max_caption) int32 in place of labels.
      `settings` holds the numeric fields of `SamplingConfig` by name, (b,) float32 or int32, and
      `interval` its `cfg_interval`; they are not validated. The `cfg_schedule` is compiled in: that
      of the model.
    """
    assert model.aim_config is not None and model.vq_config is not None
    config = model.aim_config
    schedule = SamplingConfig(**model.sampling).cfg_schedule

    def sample(weights, condition, seed, index, settings, interval):
        params = _unflatten(weights)
        no_prefix = jnp.zeros((index.shape[0], 0), jnp.int32)
        request = Request(condition, index, settings, no_prefix)
        decoder = make_decoder(params["aim"], config, ENGINE)
        series = Series.of(random_key(seed), schedule, interval)
        tokens, finite = generate_on_device(decoder, request, series, guided=True)
        images = decode_padded(params["vq"], tokens, config=model.vq_config)
        return tokens, images, finite

    (b,) = jax.export.symbolic_shape("b")
    ints = jax.ShapeDtypeStruct((b,), jnp.int32)
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    settings = {k: jax.ShapeDtypeStruct((b,), v.dtype) for k, v in SETTINGS.items()}
    interval = jax.ShapeDtypeStruct((2,), jnp.float32)
    arguments = (_condition_shape(model, b), seed, ints, settings, interval)
    weights = _shapes(flat_weights(model, dtype))
    return jax.export.export(jax.jit(sample), platforms=PLATFORMS)(weights, *arguments)


@check_arguments
def export_decode_step(
    model: Pretrained, rows: int, dtype: str = "float32", platforms: Sequence[str] = PLATFORMS
) -> dict[str, jax.export.Exported]:
    """Export the parts of the token loop, for programs that run their own loop.

    Args:
      model: with an AiM.
      rows: number of sequences; two per image with guidance.
      dtype: dtype of the stored weights.
      platforms: platforms that the programs run on.

    Returns:
      `jax.export.Exported` by name. "prepare": (weights) -> laid out, the weights as the other
      programs read them, to be made once. "begin": (laid out, labels (rows,) int32, or tokens of
      captions (rows, max_caption) int32) -> (x (rows, 1, d), modulation, caches). "step": (laid
      out, x, modulation, caches) -> (logits (rows, v) float32, caches). "embed": (laid out, tokens
      (rows,) int32, position () int32) -> x of the next step.
      Laid out weights, modulation and caches are lists of arrays.
    """
    config = model.aim_config
    assert config is not None
    weights = _shapes({k: v for k, v in flat_weights(model, dtype).items() if k.startswith("aim.")})

    def prepare(weights):
        return make_decoder(_unflatten(weights)["aim"], config, ENGINE)

    def apply(decoder, method, *args):
        return AiM(config).apply({"params": decoder.params}, *args, method=method)

    def begin(decoder, condition):
        x, modulation = apply(decoder, "condition", condition)
        caches = decoder.start(x[:, :-1], modulation, config.num_tokens)
        return x[:, -1:], modulation.after_caption(), caches

    tokens = jax.ShapeDtypeStruct((rows,), jnp.int32)
    labels = _condition_shape(model, rows)
    decoder = jax.eval_shape(prepare, weights)
    x, modulation, caches = jax.eval_shape(begin, decoder, labels)
    values = (decoder, modulation, caches)
    laid_out, *leaves = [jax.tree.leaves(tree) for tree in values]
    decoder_tree, *trees = [jax.tree.structure(tree) for tree in values]

    def of(arrays):
        return jax.tree.unflatten(decoder_tree, arrays)

    def prepare_flat(weights):
        return jax.tree.leaves(prepare(weights))

    def begin_flat(arrays, labels):
        x, *state = begin(of(arrays), labels)
        return x, *(jax.tree.leaves(tree) for tree in state)

    def step(arrays, x, modulation, caches):
        modulation, caches = map(jax.tree.unflatten, trees, (modulation, caches))
        logits, caches = of(arrays).step(x, modulation, caches, jnp.int32(0))
        return logits, jax.tree.leaves(caches)

    def embed(arrays, tokens, position):
        return apply(of(arrays), "embed_codes", tokens[:, None], position[None])

    export = lambda f, *args: jax.export.export(jax.jit(f), platforms=platforms)(*args)  # noqa: E731
    position = jax.ShapeDtypeStruct((), jnp.int32)
    return {
        "prepare": export(prepare_flat, weights),
        "begin": export(begin_flat, laid_out, labels),
        "step": export(step, laid_out, x, *leaves),
        "embed": export(embed, laid_out, tokens, position),
    }


# Names of the arguments and the results of the programs of `export_decode_step`.
STEP = {
    "prepare": (("weights",), ("laid_out",)),
    "begin": (("laid_out", "labels"), ("x", "modulation", "caches")),
    "step": (("laid_out", "x", "modulation", "caches"), ("logits", "caches")),
    "embed": (("laid_out", "tokens", "position"), ("x",)),
}


def describe(name: str, exported: jax.export.Exported) -> dict:
    """Return names, shapes and dtypes of the arguments and results of a program of `STEP`.

    Entries are in the order of the program. Arguments that StableHLO drops, because no result
    depends on them, are omitted.
    """
    takes, returns = STEP[name]
    arguments, _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    results = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    results = results if len(returns) > 1 else (results,)

    def listed(names, values):
        entries = []
        for (first, *path), aval in jax.tree.leaves_with_path(list(values)):
            keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
            entries.append(
                {
                    "name": "/".join([names[first.idx], *keys]),
                    "shape": list(aval.shape),
                    "dtype": str(aval.dtype),
                }
            )
        return entries

    listed_arguments = listed(takes, arguments)
    return {
        "arguments": [listed_arguments[i] for i in exported.module_kept_var_idx],
        "results": listed(returns, results),
    }


@check_arguments
def save_exported(
    model: Pretrained,
    out: str | os.PathLike,
    images: int = 1,
    dtype: str = "float32",
    cfg_schedule: str | None = None,
) -> Path:
    """Write a directory that generates images without this library.

    It holds sampler.jax (`export_sampler`), weights.safetensors and sample.py, which runs them.
    For programs that run their own loop, it also holds prepare, begin, step and embed
    (`export_decode_step`): as .jax, and as StableHLO in portable bytecode (.mlirbc) with a
    description of arguments and results (.json).

    Args:
      model: with an AiM and a tokenizer.
      out: directory to create; it may exist if it is empty.
      images: batch size of begin, step and embed, which have two rows per image.
      dtype: dtype of the stored weights; arithmetic uses the compute dtype of the model.
      cfg_schedule: guidance schedule of the sampler, the only one that it offers; by default that
        of the model.

    Returns:
      The directory.

    Raises:
      ValueError: if the model lacks a part, or the package flatbuffers is missing.
      FileExistsError: if `out` exists and is not empty.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError("export requires flatbuffers; run pip install 'aim_jax[export]'.")
    out = Path(out)
    if model.aim_config is None or model.aim_params is None or model.vq_params is None:
        raise ValueError(f"{model.name}: exporting a sampler requires an AiM and a tokenizer.")
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another directory.")
    sampling = SamplingConfig(**model.sampling).updated({"cfg_schedule": cfg_schedule})
    num_classes = model.aim_config.num_classes
    max_caption = model.aim_config.max_caption
    model = dataclasses.replace(model, sampling=dataclasses.asdict(sampling))
    progress = Progress("exporting", "programs")
    total = 2 * len(STEP) + 1
    with replacing(out) as partial, reminding("exporting"):
        partial.mkdir()
        # Programs for several platforms take a platform index as an extra first argument, so the
        # StableHLO, which is the same for every platform, is exported for one.
        for name, exported in export_decode_step(model, 2 * images, dtype, ("cpu",)).items():
            (partial / f"{name}.mlirbc").write_bytes(exported.mlir_module_serialized)
            write_json(partial / f"{name}.json", describe(name, exported))
        progress(len(STEP), total)
        programs = export_decode_step(model, 2 * images, dtype)
        progress(2 * len(STEP), total)
        programs["sampler"] = export_sampler(model, dtype)
        for name, exported in programs.items():
            (partial / f"{name}.jax").write_bytes(exported.serialize())
        progress(total, total)
        save_file(flat_weights(model, dtype), partial / "weights.safetensors")
        dtypes = {name: np.dtype(setting.dtype).name for name, setting in SETTINGS.items()}
        content = {
            "num_classes": num_classes,
            "max_caption": max_caption,
            "class_names": list(model.class_names),
            "settings": sampling.numbers(),
            "cfg_schedule": sampling.cfg_schedule,
            "cfg_interval": list(sampling.cfg_interval),
            "dtypes": dtypes,
        }
        write_json(partial / "settings.json", content)
        if isinstance(model.text, TextTokenizer):
            model.text.save(partial / TEXT_TOKENIZER_FILE)
        shutil.copyfile(RUNNER, partial / "sample.py")
    return out
