"""Training of the CIFAR-10 models from prepared parts, where the data sets are missing.

Example:
  python benchmarks/gpu_training.py prepare --data CIFAR10 --out parts --lpips lpips.safetensors
  python benchmarks/gpu_training.py prepare --codes codes/cifar10 --out parts
  python benchmarks/gpu_day.py --stage 6 --parts parts --out results --budget_s 540
  python benchmarks/gpu_training.py assemble --results results --out runs/gpu/model

"prepare" writes images, or the tokens of a cache, and weights of LPIPS as files of at most 45 MB.
Stage 6 of gpu_day.py trains with the recipes and training steps of the library: "vq" (cifar10_vq),
"vq_full" (cifar10_vq:full, if there are weights of LPIPS) and "aim" (cifar10, on the tokens of the
newest of these tokenizers, of the bundled one, or of the parts). The state is saved every two
minutes and before the time is over, as files of at most 15 MB; the same command resumes exactly. A
finished model is a file of float16 parameters, and "aim" leaves samples too. "assemble" makes a
model directory of them.
"""

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # find aim_jax/ from anywhere

from aim_jax.configs import cifar10, cifar10_vq
from aim_jax.data.datasets import CIFAR10_CLASSES, open_images
from aim_jax.data.loader import EpochOrder
from aim_jax.data.token_cache import TokenCache
from aim_jax.models import AiMConfig, VQConfig, VQModel
from aim_jax.parallel.sharding import create_sharded, replicate, shard_batch
from aim_jax.sampling.generate import generate
from aim_jax.training import aim, loop, tokenizer
from aim_jax.training.state import TrainState
from aim_jax.utils.files import replacing
from aim_jax.utils.images import make_grid, save_png
from aim_jax.weights.directories import save_model
from aim_jax.weights.load import load_pretrained
from aim_jax.weights.pretrained import Pretrained, flatten

RECIPES = {
    "vq": cifar10_vq.get_config,
    "vq_full": lambda: cifar10_vq.get_config("full"),
    "aim": cifar10.get_config,
}
MODELS = tuple(RECIPES)
MOST_PART = 45_000_000  # bytes of a part before compression
MOST_STATE = 15_000_000  # bytes of a file of a state
MARGIN = 30  # seconds before the deadline in which a state is saved, or a finished model evaluated
SAVE_EVERY = 120  # seconds
LPIPS = "lpips.npz"
CONFIG = "__config__"  # entry of a file of parameters


class Unsupported(Exception):
    """A measurement lacks something that is optional."""


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a compressed npz file atomically."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)


# Data


def write_parts(out: Path, split: str, name: str, values: np.ndarray, labels: np.ndarray) -> None:
    """Write the parts of a split.

    Args:
      out: folder of the parts.
      split: "train" or "validation".
      name: "images", uint8 (n, H, W, c), or "codes", uint16 (n, views, t).
      values: of all examples.
      labels: int (n,).
    """
    count = -(-values.nbytes // MOST_PART)
    if name == "images":  # differences of neighbours compress better
        values = np.diff(values, axis=2, prepend=np.uint8(0))
    for number, rows in enumerate(np.array_split(np.arange(len(labels)), count)):
        arrays = {name: values[rows], "labels": labels[rows].astype(np.int32)}
        write_arrays(out / f"{split}-{number}of{count}.npz", arrays)


def read_parts(folder: Path, split: str) -> dict[str, np.ndarray]:
    """Return images or codes, and labels, of a split.

    Raises:
      FileNotFoundError: parts are missing.
    """
    files = sorted(folder.glob(f"{split}-*of*.npz"))
    if not files or len(files) != int(re.findall(r"of(\d+)", files[0].name)[0]):
        raise FileNotFoundError(
            f"{folder}: {len(files)} parts of {split}, expected all that gpu_training.py prepare "
            "has written."
        )
    parts = [dict(np.load(file)) for file in files]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if "images" in arrays:
        arrays["images"] = np.cumsum(arrays["images"], axis=2, dtype=np.uint8)
    return arrays


def to_float(images: np.ndarray) -> np.ndarray:
    """Convert uint8 images to float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


def with_codes(arrays: dict, vq: Pretrained) -> dict[str, np.ndarray]:
    """Return labels and codes (n, 2, t) of images and their mirror images, by a tokenizer."""
    if "codes" in arrays:
        return arrays
    config, params = vq.vq()
    encode = jax.jit(
        lambda images: VQModel(config).apply({"params": params}, images, method="encode_to_tokens")
    )
    views = []
    for images in (arrays["images"], arrays["images"][:, :, ::-1]):
        starts = range(0, len(images), 1000)
        codes = [np.asarray(encode(to_float(images[i : i + 1000]))) for i in starts]
        views.append(np.concatenate(codes).astype(np.uint16))
    return {"codes": np.stack(views, axis=1), "labels": arrays["labels"]}


def training_batch(arrays: dict, order: EpochOrder, step: int, size: int, seed: int) -> dict:
    """Return the batch of a step, shuffled anew in each epoch; a function of seed and step."""
    rows = np.array([order(step * size + i) for i in range(size)])
    flip = np.random.default_rng([seed, step]).integers(2, size=size)
    labels = arrays["labels"][rows]
    if "codes" in arrays:
        view = flip % arrays["codes"].shape[1]
        return {"codes": arrays["codes"][rows, view].astype(np.int32), "labels": labels}
    images = arrays["images"][rows]
    images = np.where(flip[:, None, None, None] == 1, images[:, :, ::-1], images)
    return {"images": to_float(images), "labels": labels}


# Files of a training


def save_state(out: Path, name: str, step: int, state: TrainState) -> None:
    """Write all arrays of a state, and remove the files of older ones."""
    groups: list[dict[str, np.ndarray]] = [{}]
    for index, leaf in enumerate(jax.tree.leaves(state)):
        array = np.asarray(leaf)
        if sum(x.nbytes for x in groups[-1].values()) + array.nbytes > MOST_STATE and groups[-1]:
            groups.append({})
        groups[-1][str(index)] = array
    older = list(out.glob(f"{name}-step*.npz"))
    for number, arrays in enumerate(groups):
        path = out / f"{name}-step{step}-{number}of{len(groups)}.npz"
        write_arrays(path, arrays)
        older = [file for file in older if file != path]
    for file in older:
        file.unlink()


def restore_state(out: Path, name: str, state: TrainState) -> tuple[int, TrainState]:
    """Return step and arrays of the newest state with all its files, or 0 and the argument."""
    sets: dict[tuple[int, int], list[Path]] = {}
    for file in out.glob(f"{name}-step*.npz"):
        step, _, count = map(int, re.findall(r"\d+", file.name.removeprefix(name)))
        sets.setdefault((step, count), []).append(file)
    complete = [key for key, files in sets.items() if len(files) == key[1]]
    if not complete:
        return 0, state
    arrays = {k: v for file in sets[max(complete)] for k, v in np.load(file).items()}
    leaves, tree = jax.tree.flatten(state)
    restored = [jax.device_put(arrays[str(i)], x.sharding) for i, x in enumerate(leaves)]
    return max(complete)[0], jax.tree.unflatten(tree, restored)


def save_weights(path: Path, config: AiMConfig | VQConfig, params: dict) -> None:
    """Write parameters as float16, and their configuration."""
    arrays = {k: np.asarray(v, np.float16) for k, v in flatten(params).items()}
    text = json.dumps(dataclasses.asdict(config))
    write_arrays(path, arrays | {CONFIG: np.array(text)})


def load_weights(path: Path) -> tuple[dict, dict]:
    """Return the fields of the configuration, and the parameters as float32."""
    arrays = dict(np.load(path))
    config = json.loads(str(arrays.pop(CONFIG, "{}")))
    return config, unflatten_dict({k: v.astype(np.float32) for k, v in arrays.items()}, sep=".")


def trained_tokenizer(out: Path) -> Pretrained:
    """Return the newest tokenizer of the results, or else the bundled one."""
    for name in ("vq_full", "vq"):
        if (out / f"{name}.npz").is_file():
            config, params = load_weights(out / f"{name}.npz")
            return Pretrained(name, vq_config=VQConfig(**config), vq_params=params)
    return load_pretrained("cifar10")


# Training


@dataclasses.dataclass
class Training:
    """A model being trained.

    Attributes:
      setup: mesh, rules, `new_state` and `train_step`.
      step: maps (state, batch) to (state, metrics).
      arrays: the training examples.
      evaluate: given the state, measures held-out examples and writes samples.
      config: configuration of the model.
      init: parameters to start from, or None.
    """

    setup: Any
    step: Callable
    arrays: dict
    evaluate: Callable[[TrainState], dict]
    config: AiMConfig | VQConfig
    init: dict | None = None


def tokenizer_training(name: str, config: Any, parts: Path, out: Path) -> Training:
    """Prepare the training of a tokenizer."""
    setup = tokenizer.Setup(config)
    lpips = None
    init = None
    if name == "vq_full":
        if not (parts / LPIPS).is_file():
            raise Unsupported(f"{parts} holds no {LPIPS}; prepare it with --lpips.")
        lpips = replicate(load_weights(parts / LPIPS)[1], setup.mesh)
        init = load_weights(out / "vq.npz")[1]
    model = setup.recipe.model
    held_out = to_float(read_parts(parts, "validation")["images"][:1000])

    @jax.jit
    def error(params: dict, images: jax.Array) -> jax.Array:
        return ((VQModel(model).apply({"params": params}, images)[0] - images) ** 2).mean()

    def evaluate(state: TrainState) -> dict:
        return {"val_mse": float(error(state.eval_params, held_out))}

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        return setup.train_step(state, batch, lpips)

    return Training(setup, step, read_parts(parts, "train"), evaluate, model, init)


def aim_training(config: Any, parts: Path, out: Path) -> Training:
    """Prepare the training of an AiM."""
    if unfinished := sorted(out.glob("vq*-step*.npz")):
        raise ValueError(f"{unfinished[0]}: this tokenizer is not finished; train it first.")
    setup = aim.Setup(config, jax.devices()[:1])
    vq = dataclasses.replace(
        trained_tokenizer(out), aim_config=setup.model, aim_params=None, class_names=CIFAR10_CLASSES
    )
    size = config.batch_size
    held_out = with_codes(read_parts(parts, "validation"), vq)

    def batches() -> Iterator[dict]:
        for start in range(0, len(held_out["labels"]), size):
            codes = held_out["codes"][start : start + size, 0].astype(np.int32)
            yield {"codes": codes, "labels": held_out["labels"][start : start + size]}

    def evaluate(state: TrainState) -> dict:
        model = dataclasses.replace(vq, aim_params=state.eval_params)
        labels = np.repeat(np.arange(min(10, setup.model.num_classes)), 8)
        images = np.asarray(generate(model, labels, config.seed, cfg_scale=2.0).images)
        save_png(make_grid(images, 8, list(CIFAR10_CLASSES)), out / "samples.png")
        step = lambda batch: setup.eval_step(state.eval_params, batch)  # noqa: E731
        means = loop.weighted_means(step, batches(), size, setup.mesh)
        return {k: float(v) for k, v in means.items()}

    arrays = with_codes(read_parts(parts, "train"), vq)
    return Training(setup, setup.train_step, arrays, evaluate, setup.model)


def configuration(name: str, overrides: list[str]) -> Any:
    """Return the recipe of a model with settings of the form MODEL.FIELD=VALUE."""
    config = RECIPES[name]()
    for override in overrides:
        field, _, value = override.partition("=")
        if field.startswith(f"{name}."):
            config.update_from_flattened_dict({field.removeprefix(f"{name}."): json.loads(value)})
    return config


def train(name: str, parts: Path, out: Path, deadline: float, overrides: list[str]) -> dict:
    """Train a model from its newest state to the end of its recipe, or to the deadline.

    Args:
      name: one of `MODELS`.
      parts: folder of the data.
      out: folder of states, parameters and samples.
      deadline: in seconds since the epoch.
      overrides: settings, see `configuration`.

    Returns:
      `complete`, `step`, the last training loss, images/s and, at the end, held-out metrics.

    Raises:
      FileNotFoundError: parts are missing.
      Unsupported: the parts hold no weights of LPIPS.
    """
    config = configuration(name, overrides)
    if name == "aim":
        training = aim_training(config, parts, out)
    else:
        training = tokenizer_training(name, config, parts, out)
    setup = training.setup
    state = create_sharded(setup.new_state, setup.mesh, setup.rules)
    if training.init is not None:
        state = state.with_params(training.init)
    first, state = restore_state(out, name, state)
    order = EpochOrder(0, len(training.arrays["labels"]), (config.seed, 0))
    step = first
    losses = {}
    begun = saved = time.time()
    while step < config.steps and time.time() < deadline - MARGIN:
        batch = training_batch(training.arrays, order, step, config.batch_size, config.seed)
        state, metrics = training.step(state, shard_batch(batch, setup.mesh))
        step += 1
        if step % config.log_every == 0 or step in (first + 1, config.steps):
            losses[step] = float(metrics["loss"])
            print(f"{name}: step {step}, loss {losses[step]:.4f}", flush=True)
        if time.time() > saved + SAVE_EVERY:
            save_state(out, name, step, state)
            saved = time.time()
    rate = (step - first) * config.batch_size / (time.time() - begun)
    save_state(out, name, step, state)
    result = {"complete": step == config.steps, "step": step, "images/s": rate, "losses": losses}
    if step == config.steps:
        save_weights(out / f"{name}.npz", training.config, state.eval_params)
        result |= training.evaluate(state)
        for file in out.glob(f"{name}-step*.npz"):
            file.unlink()
    return result


# Commands


def prepare(args: argparse.Namespace) -> None:
    """Write the parts."""
    args.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        if args.codes:
            cache = TokenCache.open(args.codes / split)
            codes, labels = cache.take(np.arange(len(cache)))
            write_parts(args.out, split, "codes", codes.astype(np.uint16), labels)
        else:
            source = open_images("cifar10", split, args.data)
            images = np.stack([source[i]["image"] for i in range(len(source))])
            labels = np.array([source[i]["label"] for i in range(len(source))])
            write_parts(args.out, split, "images", images, labels)
    if args.lpips:
        from aim_jax.weights.convert.lpips import load_lpips

        params = flatten(load_lpips(args.lpips))
        arrays = {k: np.asarray(v, np.float16) for k, v in params.items()}
        write_arrays(args.out / LPIPS, arrays)


def assemble(args: argparse.Namespace) -> None:
    """Write a model directory with the trained AiM and its tokenizer."""
    config, params = load_weights(args.results / "aim.npz")
    vq = load_pretrained(args.tokenizer) if args.tokenizer else trained_tokenizer(args.results)
    model = Pretrained(
        "cifar10", AiMConfig(**config), params, vq.vq_config, vq.vq_params, CIFAR10_CLASSES
    )
    save_model(args.out, model, "float16")


def main(argv: list[str] | None = None) -> int:
    """Run a command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("prepare", help="write the parts")
    source = make.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder of CIFAR-10")
    source.add_argument("--codes", type=Path, help="token cache with train/ and validation/")
    make.add_argument("--lpips", help="weights of LPIPS, for vq_full")
    make.add_argument("--out", type=Path, required=True, help="folder of the parts")
    make.set_defaults(run=prepare)
    join = commands.add_parser("assemble", help="write a model directory")
    join.add_argument("--results", type=Path, required=True, help="folder of gpu_day.py")
    join.add_argument("--tokenizer", help="model with the tokenizer (that of the results)")
    join.add_argument("--out", type=Path, required=True, help="model directory to write")
    join.set_defaults(run=assemble)
    args = parser.parse_args(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
