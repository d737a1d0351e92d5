"""From images to scores in one process, with tiny models; for tests/test_jax_configuration.py.

python -m tests.end_to_end OUT

It prints the sampled tokens as JSON; they do not depend on JAX's configuration.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

import aim_jax
from aim_jax.configs.defaults import eval_defaults
from aim_jax.evaluation import evaluate
from aim_jax.models import AiMConfig, VQConfig, inception
from aim_jax.models.aim import init_params as init_aim
from aim_jax.models.vq import init_params as init_vq
from aim_jax.ops.native import register
from aim_jax.sampling.generate import generate
from aim_jax.weights.load import load_pretrained
from aim_jax.weights.pretrained import Pretrained
from tests.programs import run
from tests.scoring import distance, features

SHORT = (
    "--config.steps=2", "--config.batch_size=4", "--config.optimizer.warmup_steps=0",
    "--config.ema_decay=0.5", "--config.accumulate=2",
)  # fmt: skip
SMALL = (
    "--config.model.n_layer=2", "--config.model.d_model=64", "--config.model.d_state=16",
    "--config.model.token_dropout=0.1", "--config.sample.per_class=1",
)  # fmt: skip
AIM = AiMConfig(
    vocab_size=16, num_classes=3, num_tokens=4, d_model=16, n_layer=2, d_state=8, headdim=8,
    adaln="group", num_groups=1, chunk_size=4,
)  # fmt: skip
VQ = VQConfig(
    in_channels=1, out_channels=1, ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8,
    embed_dim=4, n_embed=16, entropy_loss_ratio=0.1,
)  # fmt: skip


def write_images(root: Path) -> Path:
    """Class folders of 16 x 16 images: two classes of 12."""
    rng = np.random.default_rng(0)
    for shade, name in enumerate(("boat", "old tree")):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 90, (16, 16)) + 90 * shade
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def succeed(*arguments) -> None:
    done = run(*arguments)
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def random_model() -> Pretrained:
    """Random parameters, the same whatever the default generator."""
    key = jax.random.key(0, impl="threefry2x32")
    aim = nn.unbox(jax.jit(init_aim, static_argnums=0)(AIM, key))
    vq = jax.jit(init_vq, static_argnums=0)(VQ, key)
    rng = np.random.default_rng(0)
    noise = lambda x: jax.device_put(x + rng.normal(scale=0.1, size=x.shape).astype(x.dtype))  # noqa: E731
    aim, vq = (jax.tree.map(noise, jax.device_get(tree)) for tree in (aim, vq))
    return Pretrained("random", AIM, aim, VQ, vq)


def dtypes(tree) -> set[str]:
    return {str(x.dtype) for x in jax.tree.leaves(tree)}


def sampled_tokens() -> dict[str, list]:
    """Tokens of both implementations for CPUs, with guidance and all filters."""
    settings = dict(cfg_scale=3.0, temperature=0.9, top_k=12, top_p=0.95, min_p=0.01)
    model = random_model()
    assert dtypes((model.aim_params, model.vq_params)) == {"float32"}
    found = {}
    for implementation, form in (("xla", "recurrent"), ("native", "dual")):
        options = dict(implementation=implementation, form=form, cfg_schedule="cosine")
        samples = generate(model, [0, 2, 3], 5, **settings, **options)
        assert samples.tokens.dtype == jnp.int32 and samples.images.dtype == jnp.uint8
        found[f"{implementation} {form}"] = np.asarray(samples.tokens).tolist()
    return found


def same_alone() -> None:
    """Image i of a seed is the same in any batch, also for keys of other generators."""
    model = random_model()
    for seed in (3, jax.random.key(3, impl="rbg")):
        many = np.asarray(generate(model, [1] * 4, seed).tokens)
        alone = np.asarray(generate(model, [1], seed, first_index=2).tokens)
        np.testing.assert_array_equal(many[2], alone[0])


def trained_and_scored(out: Path) -> None:
    """The programs of both stages, and the evaluation with cheap features."""
    images = write_images(out / "images")
    vq, codes, aim = (str(out / name) for name in ("vq", "codes", "aim"))
    more = (
        "--config.sample.images=4", "--config.model.ch_mult=(1,1)",
        "--config.model.ch=32", "--config.model.num_res_blocks=1",
    )  # fmt: skip
    succeed("train_vq", "--config", f"folder_vq:{images}", "--workdir", vq, *SHORT, *more)
    succeed(
        "extract_codes", "--tokenizer", vq, "--out", codes, "--data", images, "--views", "centre"
    )
    given = (f"--config.tokenizer={vq}", f"--config.codes={codes}")
    succeed("train", "--config", f"folder:{images}", "--workdir", aim, *given, *SHORT, *SMALL)
    succeed("sample", "--checkpoint", aim, "--out", out / "samples", "--per_class", "1")
    records = [json.loads(line) for line in Path(aim, "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(list(record.values())).all() for record in records)
    model = load_pretrained(aim)
    assert dtypes((model.aim_params, model.vq_params)) == {"float32"}
    inception.extract = jax.jit(features)
    evaluate.frechet_distance = distance
    config = eval_defaults()
    config.num_samples = config.neighbour_images = 8
    config.batch_size = 4
    reference = f"{images}:train"
    for name, reconstructions in (("samples", False), ("reconstructions", True)):
        report = evaluate.evaluate(
            model, "", reference, {"softmax": {}}, config, out / name, out / "cache",
            reconstructions,
        )  # fmt: skip
        assert report is not None


def main(out: Path) -> None:
    register()
    found = {"tokens": sampled_tokens()}
    same_alone()
    trained_and_scored(out)
    print(json.dumps(found))


if __name__ == "__main__":
    assert Path(aim_jax.__file__).is_relative_to(Path(__file__).parents[1])
    main(Path(sys.argv[1]))
