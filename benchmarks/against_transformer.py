r"""Compare AiM with an equally trained transformer of LlamaGen's shape: loss, samples, speed.

Example:
  python benchmarks/against_transformer.py --config cifar10 --tokenizer cifar10 \
      --codes codes/cifar10 --work runs/against --steps 800

Both models train on the same tokens in the same order, with the same optimizer, schedule, steps and
class dropout; their numbers of parameters differ by at most 5 %. The validation losses are written
to WORK/result.json, and samples to WORK/NAME.npz (same labels, seeds and settings), which aim-jax
evaluate --samples scores. Sampling is timed with guidance in one process, alternating between the
models.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from aim_jax.cli.common import config_path, errors_in_one_line
from aim_jax.evaluation import evaluate
from aim_jax.evaluation.image_sets import ImageParts
from aim_jax.evaluation.prompts import balanced_labels
from aim_jax.models import AiM, AiMConfig
from aim_jax.models.aim import init_params
from aim_jax.parallel.sharding import make_mesh
from aim_jax.sampling.config import SamplingConfig
from aim_jax.sampling.generate import generate_tokens, prepare_decoder
from aim_jax.sampling.images import decode_images
from aim_jax.training import loop
from aim_jax.training.aim import EvalMetrics
from aim_jax.training.inputs import open_codes
from aim_jax.training.optimizer import accumulated_grads, apply_gradients, make_optimizer
from aim_jax.training.state import TrainState
from aim_jax.utils.files import write_json
from aim_jax.utils.logging import Progress
from aim_jax.weights.tokenizer import open_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # find benchmarks/ from anywhere

from benchmarks import transformer


def contestants(model: AiMConfig) -> dict:
    """Return module, initializer and maker of a token sampler of each model, by name."""
    count = parameters(nn.unbox(jax.eval_shape(lambda: init_params(model, jax.random.key(0)))))
    peer = matching_transformer(model, count)
    return {
        "aim": (
            AiM(model),
            lambda key: nn.unbox(init_params(model, key)),
            lambda params: functools.partial(generate_tokens, prepare_decoder(params, model)),
        ),
        "transformer": (
            transformer.Transformer(peer),
            lambda key: transformer.init_params(peer, key),
            lambda params: functools.partial(transformer.generate_tokens, params, config=peer),
        ),
    }


def parameters(params) -> int:
    """Return the number of parameters of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def matching_transformer(model: AiMConfig, count: int) -> transformer.TransformerConfig:
    """Return a transformer with half of AiM's layers and a width that matches its parameters.

    Half of the layers, because each block has two branches, attention and SwiGLU.

    Raises:
      ValueError: if no width matches the number of parameters within 5 %.
    """
    candidates = []
    for width, multiple in itertools.product(range(32, 8192, 32), (32, 64, 128, 256)):
        config = transformer.TransformerConfig(
            model.vocab_size, model.num_classes, model.num_tokens, width,
            max(1, model.n_layer // 2), width // 32, multiple, model.class_dropout,
        )  # fmt: skip
        candidates.append((abs(config.parameters / count - 1), config))
    deviation, best = min(candidates, key=lambda pair: pair[0])
    if deviation > 0.05:
        raise ValueError(f"no transformer of this shape has {count:,} parameters within 5 %.")
    return best


def train(module, new_params, config, data, steps: int, name: str):
    """Train a model.

    Returns:
      The trained (averaged) parameters, the validation loss, and the median seconds per step.
    """
    optimizer = make_optimizer(config.optimizer, steps)
    rng = jax.random.PRNGKey(config.seed)
    params = jax.jit(new_params)(jax.random.fold_in(rng, 1))
    state = TrainState(
        step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if config.ema_decay else None, rng=rng,
    )  # fmt: skip

    def nats(params, batch, **options):
        return module.apply(
            {"params": params}, batch["codes"], batch["labels"], method="cross_entropy", **options
        )

    def loss(params, batch, key):
        value = nats(params, batch, train=True, rngs={"dropout": key}).mean()
        return value, ({"loss": value}, None)

    @jax.jit
    def step(state, batch):
        key = jax.random.fold_in(state.rng, state.step)
        grads, metrics, _ = accumulated_grads(
            jax.grad(loss, has_aux=True), state.params, batch, key, 1
        )
        state, _ = apply_gradients(state, grads, optimizer, config.ema_decay)
        return state, metrics

    @jax.jit
    def eval_step(params, batch):
        losses = nats(params, batch).mean(axis=-1)
        return EvalMetrics.single_from_model_output(val_loss=losses, mask=batch["weights"])

    batches = iter(data.train_batches())
    progress = Progress(f"training {name}", "steps")
    seconds = []
    for number in range(steps):
        batch = next(batches)
        start = time.perf_counter()
        state, metrics = step(state, batch)
        metrics["loss"].block_until_ready()
        seconds.append(time.perf_counter() - start)
        progress(number + 1, steps)
    means = loop.weighted_means(
        lambda batch: eval_step(state.eval_params, batch), data.validation_batches(),
        config.batch_size, make_mesh(devices=jax.devices()[:1]),
    )  # fmt: skip
    return state.eval_params, means["val_loss"], statistics.median(seconds)


def main():
    """Train both models, time them, and write results and samples."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="recipe for AiM: its name or a file")
    parser.add_argument("--tokenizer", required=True, help="bundled model or model directory")
    parser.add_argument("--codes", required=True, help="token caches, as in config.codes")
    parser.add_argument("--work", type=Path, required=True, help="directory for the results")
    parser.add_argument(
        "--steps", type=int, default=0, help="training steps (default: those of the configuration)"
    )
    parser.add_argument("--samples", type=int, default=10_000, help="images per model in the npz")
    parser.add_argument("--cfg_scale", type=float, default=2.0)
    parser.add_argument("--sizes", default="1,16,64", help="batch sizes of the timed sampling")
    args = parser.parse_args()
    spec = importlib.util.spec_from_file_location("config", config_path(args.config))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.tokenizer = args.tokenizer
    config.codes = args.codes
    steps = args.steps or config.steps
    tokenizer = open_tokenizer(args.tokenizer)
    model = AiMConfig(**config.model)
    args.work.mkdir(parents=True, exist_ok=True)
    results = {}
    samplers = {}
    for name, (network, new_params, sampler) in contestants(model).items():
        data = open_codes(config, tokenizer, (0, 1))
        params, loss, seconds = train(network, new_params, config, data, steps, name)
        results[name] = {"parameters": parameters(params), "val_loss": loss, "step": seconds}
        results[name]["config"] = str(network.config)
        sample = sampler(params)

        def draw(labels, index, sample=sample):
            sampling = SamplingConfig(args.cfg_scale)
            tokens = sample(jnp.asarray(labels), 0, jnp.asarray(index), sampling)
            return decode_images(tokenizer.vq_params, tokens, config=tokenizer.vq_config)

        samplers[name] = draw
    sizes = [int(size) for size in args.sizes.split(",")]
    for size in sizes:
        labels = balanced_labels(size, model.num_classes)
        times = {name: [] for name in samplers}
        for turn in range(4):
            for name, draw in samplers.items():
                start = time.perf_counter()
                jax.block_until_ready(draw(labels, np.arange(size)))
                if turn:  # the first call compiles
                    times[name].append(time.perf_counter() - start)
        for name, seconds in times.items():
            results[name][f"images/s, {size} at once"] = size / statistics.median(seconds)
    results["environment"] = evaluate.provenance() | {"steps": steps}
    write_json(args.work / "result.json", results)
    print(json.dumps(results, indent=1))
    labels = balanced_labels(args.samples, model.num_classes)
    size = sizes[-1]
    for name, draw in samplers.items():
        settings = {"config": results[name]["config"], "steps": steps, "cfg_scale": args.cfg_scale}
        shutil.rmtree(args.work / f"{name}_parts", ignore_errors=True)
        file = args.work / f"{name}.npz"
        file.unlink(missing_ok=True)
        parts = ImageParts(args.work / f"{name}_parts", file, settings)
        progress = Progress(f"sampling {name}", "batches")
        count = -(-len(labels) // size)
        for i in range(count):
            part = labels[i * size : (i + 1) * size]
            images = np.asarray(draw(np.resize(part, size), i * size + np.arange(size)))
            parts.add(i, images[: len(part)])
            progress(i + 1, count)
        parts.join(count, labels=labels)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
