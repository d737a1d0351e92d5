"""Losses of tokenizer training: LPIPS, PatchGAN, their gradients, dead codes, and a whole run."""

import dataclasses
import functools
import os
import pickle
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from aim_jax.configs.defaults import llamagen_recipe, vq_defaults
from aim_jax.evaluation.distribution import Moments, frechet_distance
from aim_jax.models import VQConfig
from aim_jax.models.codebook import HISTORY_LENGTH, restart_dead_codes
from aim_jax.models.inception import Features
from aim_jax.models.lpips import lpips
from aim_jax.models.patchgan import PatchGAN
from aim_jax.models.vq import VQModel, encoder_params, init_params
from aim_jax.parallel.sharding import make_mesh
from aim_jax.sampling.engine import native_kernels
from aim_jax.training import held_out as vq_held_out
from aim_jax.training import tokenizer as train_vq
from aim_jax.training.losses import LossConfig, gradients, judge, reconstruction_loss
from aim_jax.training.optimizer import make_optimizer
from aim_jax.training.tokenizer import Recipe
from aim_jax.utils.images import to_uint8
from aim_jax.weights.convert.lpips import TORCHVISION, load_lpips
from aim_jax.weights.directories import save_model
from aim_jax.weights.formats.files import WeightsError, save_tensors
from aim_jax.weights.load import load_pretrained
from aim_jax.weights.pretrained import Pretrained, flatten
from tests import lpips_weights
from tests.conftest import ROOT
from tests.training.test_aim import assert_same_run, interrupt, records

pytestmark = pytest.mark.usefixtures("start_once")
GOLDEN = ROOT / "tests" / "golden"
SMALL = VQConfig(
    ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, embed_dim=4, n_embed=16,
)  # fmt: skip
CRITIC = PatchGAN(ch=4, depth=2)


@pytest.fixture(scope="module")
def weights():
    return lpips_weights.seeded_weights()


@pytest.fixture(scope="module")
def lpips_file(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    save_tensors(weights, folder / "seeded.safetensors")
    return save_tensors(load_lpips(folder / "seeded.safetensors"), folder / "lpips.safetensors")


@pytest.fixture(scope="module")
def lpips_params(lpips_file):
    return load_lpips(lpips_file)


# ------------------------------------------------------------------------------------------ LPIPS


def test_lpips_is_that_of_the_public_implementation(lpips_params):
    @jax.jit
    def measure(params, a, b):
        total = lambda a: (lambda d: (d.sum(), d))(lpips(params, a, b))  # noqa: E731
        (_, distances), gradient = jax.value_and_grad(total, has_aux=True)(a)
        return distances, gradient

    a, b = lpips_weights.seeded_pictures()
    golden = np.load(GOLDEN / "lpips.npz")
    with jax.default_matmul_precision("highest"):
        distances, gradient = measure(lpips_params, a, b)
    np.testing.assert_allclose(distances, golden["distance"], rtol=2e-5)
    worst = np.abs(gradient - golden["gradient"]).max()
    assert worst < 1e-4 * np.abs(golden["gradient"]).max()
    # Where lengths and differences are zero the public one's gradient is not finite.
    grey = np.zeros_like(a)
    distances, gradient = measure(lpips_params, grey, grey)
    assert not np.any(distances) and np.all(np.isfinite(gradient))


def test_lpips_takes_grey_pictures_and_no_small_ones(lpips_params):
    grey = jax.ShapeDtypeStruct((2, 16, 20, 1), jnp.float32)
    assert jax.eval_shape(lpips, lpips_params, grey, grey).shape == (2,)
    with pytest.raises(ValueError, match="15 x 20 are too small"):
        lpips(lpips_params, jnp.zeros((1, 15, 20, 1)), jnp.zeros((1, 15, 20, 1)))


def test_every_file_of_lpips_gives_the_same_parameters(weights, lpips_params, tmp_path):
    convolutions = {k: v for k, v in weights.items() if k.startswith("features")}
    heads = {k: v for k, v in weights.items() if k.startswith("lin")}
    # The public package's state dict: slices of the network, and what is not of it.
    public = {f"net.slice1.{k.removeprefix('features.')}": v for k, v in convolutions.items()}
    public |= heads | {"scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32)}
    classifier = {"classifier.0.weight": np.zeros((2, 3), np.float32)}
    save_tensors(convolutions | classifier, tmp_path / "vgg16.safetensors")
    save_tensors(heads, tmp_path / "heads.safetensors")
    save_tensors(public, tmp_path / "public.safetensors")
    numpy = {"VGG16_0": {}}
    for i, number in enumerate(TORCHVISION):
        kernel = weights[f"features.{number}.weight"].transpose(2, 3, 1, 0)
        numpy["VGG16_0"][f"Conv_{i}"] = {
            "kernel": kernel, "bias": weights[f"features.{number}.bias"],
        }  # fmt: skip
    for i in range(5):
        head = heads[f"lin{i}.model.1.weight"].transpose(2, 3, 1, 0)
        numpy[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": head}}
    (tmp_path / "vgg16.ckpt").write_bytes(pickle.dumps(numpy))
    for files in (
        ("vgg16.safetensors", "heads.safetensors"), ("public.safetensors",), ("vgg16.ckpt",),
    ):  # fmt: skip
        found = load_lpips(*(tmp_path / name for name in files))
        chex.assert_trees_all_equal(found, lpips_params)
    with pytest.raises(WeightsError, match="missing head_0"):
        load_lpips(tmp_path / "vgg16.safetensors")
    with pytest.raises(FileNotFoundError, match="linear heads"):
        load_lpips(tmp_path / "nothing.pth")
    heads["lin1.model.1.weight"] = np.full((1, 64, 1, 1), np.nan, np.float32)
    save_tensors(heads, tmp_path / "heads.safetensors")
    with pytest.raises(WeightsError, match=r"head_1 has the shape \(64,\), not \(128,\)"):
        load_lpips(tmp_path / "vgg16.safetensors", tmp_path / "heads.safetensors")


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


class _Reduced:
    """Pickles as the calls that it is given."""

    def __init__(self, *calls):
        self.calls = calls

    def __reduce__(self):
        return self.calls


def test_no_bytes_of_a_pickle_become_addresses(tmp_path):
    """An array of Python objects whose type denies that it holds any: NumPy would follow them."""
    state = (3, "|", None, None, None, -1, -1, 0)
    objects = _Reduced(np.dtype, ("O8", False, True), state)
    empty = (np.ndarray, (0,), b"b")
    make = np._core.multiarray._reconstruct
    forged = _Reduced(make, empty, (1, (1,), objects, False, b"A" * 8))
    (tmp_path / "vgg16.ckpt").write_bytes(pickle.dumps({"a": forged}))
    with pytest.raises(WeightsError, match="torch"):
        load_lpips(tmp_path / "vgg16.ckpt")


def test_nothing_of_a_pickle_is_run(tmp_path):
    hostile = pickle.dumps({"VGG16_0": _Touch(tmp_path / "was_run")})
    (tmp_path / "vgg16.ckpt").write_bytes(hostile)
    with pytest.raises(WeightsError, match="torch"):  # refuses it, or is not installed
        load_lpips(tmp_path / "vgg16.ckpt")
    (tmp_path / "vgg16.ckpt").write_bytes(pickle.dumps({"a": np.ones(3)})[:-9])
    with pytest.raises(WeightsError, match="damaged"):
        load_lpips(tmp_path / "vgg16.ckpt")
    assert not (tmp_path / "was_run").exists()


# --------------------------------------------------------------------------------------- PatchGAN


def test_discriminator_is_that_of_the_public_implementation():
    golden = np.load(GOLDEN / "patchgan.npz")
    params, grads = (
        unflatten_dict(
            {tuple(k.split(".")[1:]): golden[k] for k in golden.files if k.startswith(kind)}
        )
        for kind in ("param.", "grad.")
    )
    module = PatchGAN(ch=2, depth=3)
    judged = jax.jit(functools.partial(judge, module))
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(module.apply)({"params": params}, golden["real"])
        found = judged(params, golden["fake"], golden["real"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.hinge, golden["loss"], rtol=1e-5)
    for name, expected in flatten_dict(grads).items():
        worst = np.abs(flatten_dict(found.grads)[name] - expected).max()
        assert worst < 1e-4 * max(np.abs(expected).max(), 1), name
    # The tokenizer's side: minus the mean logit, differentiated with respect to the pictures.
    np.testing.assert_allclose(found.loss, -found.fake, rtol=1e-6)
    step = 1e-2 * np.asarray(found.pull) / np.linalg.norm(found.pull)
    with jax.default_matmul_precision("highest"):
        there, back = (judged(params, golden["fake"] + s, golden["real"]) for s in (step, -step))
    slope = (there.loss - back.loss) / 2e-2
    np.testing.assert_allclose(slope, np.linalg.norm(found.pull), rtol=2e-2)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_smallest_pictures_of_the_discriminator(depth):
    module = PatchGAN(ch=4, depth=depth)
    side = module.min_side
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    assert set(params["params"]) >= {"conv_0", "logits", f"norm_{depth}"}
    with pytest.raises(ValueError, match="too small"):
        module.init(jax.random.key(0), jnp.zeros((1, side - 1, side, 3)))


# -------------------------------------------------------------------------------------- gradients


@pytest.fixture(scope="module")
def start():
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    params = {
        "vq": jax.jit(init_params, static_argnums=0)(SMALL, jax.random.key(0)),
        "discriminator": jax.jit(CRITIC.init)(jax.random.key(1), images[:1])["params"],
    }
    return params, {"images": images}


def by_hand(params, images, losses, lpips_params, weight):
    """Loss of the tokenizer as one function of its parameters, and of the discriminator."""
    tokenizer, critic = params["vq"], params["discriminator"]

    def loss(tokenizer):
        recon, found = VQModel(SMALL).apply({"params": tokenizer}, images)
        total = reconstruction_loss(recon, images, losses.l1, losses.l2)
        total += losses.perceptual * lpips(lpips_params, recon, images).mean()
        total += found.vq_loss + found.commit_loss + found.entropy_loss
        return total - weight * CRITIC.apply({"params": critic}, recon).mean()

    def hinge(critic):
        recon, _ = VQModel(SMALL).apply({"params": tokenizer}, images)
        real, fake = (CRITIC.apply({"params": critic}, x) for x in (images, recon))
        return (
            losses.adversarial * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()) / 2
        )

    return {"vq": jax.grad(loss)(tokenizer), "discriminator": jax.grad(hinge)(critic)}


def assert_same(found, expected, tolerance=1e-4):
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    largest = max(float(jnp.abs(x).max()) for x in expected.values())
    for name, x in expected.items():
        assert float(jnp.abs(found[name] - x).max()) < tolerance * largest, name


@pytest.mark.skipif(not native_kernels(), reason="needs a C++ compiler")
def test_native_kernels_give_the_same_gradients(start):
    params, batch = start

    def at(implementation):
        grads, (metrics, _) = jax.jit(
            functools.partial(
                gradients, model=SMALL, losses=LossConfig(adversarial=0.5),
                discriminator=dataclasses.replace(CRITIC, implementation=implementation),
                lpips_params=None, step=jnp.zeros((), jnp.int32), implementation=implementation,
            )
        )(params, batch, jax.random.key(2))  # fmt: skip
        return grads, float(metrics["loss"])

    (expected, loss), (actual, same_loss) = at("xla"), at("native")
    assert same_loss == pytest.approx(loss, rel=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=1e-5 * largest)


def test_gradients_of_all_losses_at_once(start, lpips_params):
    params, batch = start
    losses = LossConfig(
        l1=0.3, l2=0.5, perceptual=0.7, adversarial=0.4, adversarial_start=5, adaptive=True
    )

    @jax.jit
    def at(params, lpips_params, step):
        return gradients(
            params, batch, jax.random.key(2), model=SMALL, losses=losses, discriminator=CRITIC,
            lpips_params=lpips_params, step=step,
        )  # fmt: skip

    hand = jax.jit(lambda params, *rest: by_hand(params, batch["images"], losses, *rest))
    faithful, both = (hand(params, lpips_params, weight) for weight in (0.0, 1.0))
    adversarial = jax.tree.map(jnp.subtract, both["vq"], faithful["vq"])
    # Before its start the discriminator has no part in anything.
    grads, (metrics, indices) = at(params, lpips_params, 4)
    assert_same(grads["vq"], faithful["vq"])
    assert all(not np.any(g) for g in jax.tree.leaves(grads["discriminator"]))
    assert metrics["gan_weight"] == 0 and indices.shape == (2, 64)

    grads, (metrics, _) = at(params, lpips_params, 5)
    weight = metrics["gan_weight"]
    expected = jax.tree.map(lambda f, a: f + weight * a, faithful["vq"], adversarial)
    assert_same(grads["vq"], expected)
    assert_same(grads["discriminator"], both["discriminator"])
    # The weight makes both pulls at the last layer equally strong, but for the constant 0.4.
    norm = lambda grads: np.linalg.norm(grads["decoder"]["conv_out"]["kernel"])  # noqa: E731
    ratio = norm(faithful["vq"]) / (norm(adversarial) + 1e-4)
    assert 0.4 * ratio == pytest.approx(float(weight), rel=1e-3)


@pytest.mark.parametrize("ratio", [0.0, 0.05, 10.0])
def test_a_run_tells_all_parts_of_its_loss(start, ratio):
    """Also the one that makes it negative."""
    params, batch = start
    losses = LossConfig(l2=0.5, adversarial=0.4)
    model = dataclasses.replace(SMALL, entropy_loss_ratio=ratio)
    compute = functools.partial(
        gradients, model=model, losses=losses, discriminator=CRITIC, lpips_params=None
    )
    _, (metrics, _) = jax.jit(compute)(params, batch, jax.random.key(2), step=jnp.int32(0))
    parts = [metrics[name] for name in ("rec_loss", "vq_loss", "commit_loss", "entropy_loss")]
    expected = sum(parts) + metrics["gan_weight"] * metrics["gan_loss"]
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert (float(metrics["entropy_loss"]) < 0) == (ratio > 0)


def test_impossible_losses_are_refused():
    with pytest.raises(ValueError, match="all 0"):
        LossConfig(l2=0.0, adversarial=1.0)
    with pytest.raises(ValueError, match=r"config.loss.l1=-1"):
        LossConfig(l1=-1)
    with pytest.raises(ValueError, match="perceptual needs images of 16"):
        LossConfig(perceptual=1.0).check_size(12, CRITIC)
    with pytest.raises(ValueError, match="depth=3 needs images of 24"):
        LossConfig(adversarial=1.0).check_size(16, PatchGAN())


# -------------------------------------------------------------------------------------- dead codes


def test_dead_codes_begin_anew_from_what_pictures_are_encoded_to(start):
    book = jnp.arange(24.0).reshape(12, 2)
    vectors = 100 + jnp.arange(16.0).reshape(8, 2)
    used = jnp.array([3, 5, 7, 3, 5])
    new = np.asarray(restart_dead_codes(book, used, vectors, jax.random.key(0)))
    alive = [3, 5, 7]
    np.testing.assert_array_equal(new[alive], book[jnp.array(alive)])
    mended = np.delete(new, alive, axis=0)
    assert {tuple(row) for row in mended} <= {tuple(row) for row in np.asarray(vectors)}
    assert len({tuple(row) for row in mended}) == 8  # none twice before all were taken

    # In training: only at the steps named, once the history is full, and in the average too.
    _, batch = start
    optimizer = make_optimizer(vq_defaults().optimizer, 10)
    recipe = Recipe(SMALL, optimizer, ema_decay=0.9, restart_codes=3)
    step = jax.jit(lambda state: train_vq.train_step(state, batch, None, recipe=recipe)[0])
    state = jax.jit(
        lambda: train_vq.nn.unbox(train_vq.create_train_state(recipe, 1, 16))
    )()  # leaves codes unused
    state = state.replace(history=jnp.full(HISTORY_LENGTH, 9, jnp.int32))
    books = lambda s: np.asarray(s.params["quantize"]["embedding"])  # noqa: E731
    filled = HISTORY_LENGTH // (2 * 64)
    last = filled - filled % 3  # the last third step before it is full
    late = 3 * 2**24 - 1  # steps x codes no longer fit into 32 bits
    for before, restarted in ((last - 1, False), (last, False), (last + 2, True), (late, True)):
        at = state.replace(step=jnp.int32(before))
        after = step(at)
        moved = np.abs(books(after) - books(at)).max(axis=1)
        unused = np.setdiff1d(np.arange(16), np.unique(after.history))
        assert len(unused) and (moved[unused] > 0.01).all() == restarted
        if restarted:
            ema = np.asarray(after.ema["quantize"]["embedding"])
            np.testing.assert_array_equal(ema[unused], books(after)[unused])

    # In micro-batches, as everything else of a step: the same codes, in less memory.
    images = jnp.resize(batch["images"], (16, 16, 16, 3))
    found = []
    for accumulate in (1, 8):
        parts = dataclasses.replace(recipe, accumulate=accumulate)
        again = jax.jit(functools.partial(train_vq.restart, recipe=parts))
        compiled = again.lower(state, images, state.params, jax.random.key(0)).compile()
        after = compiled(state, images, state.params, jax.random.key(0))
        found.append((books(after), compiled.memory_analysis().temp_size_in_bytes))
    np.testing.assert_allclose(found[1][0], found[0][0], atol=1e-5)
    assert found[1][1] < found[0][1] / 2


# --------------------------------------------------------------------------------------- whole run


def on_devices(monkeypatch, count):
    """Programs for one device compile in half the time."""
    mesh = functools.partial(make_mesh, devices=jax.devices()[:count])
    monkeypatch.setattr(train_vq, "make_mesh", mesh)


@pytest.fixture
def config(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    for split, count in (("train", 16), ("validation", 5)):
        for name in ("dark", "light"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (16, 16, 3)) + 127 * (name == "light")
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    config = vq_defaults()
    config.steps, config.batch_size, config.log_every = 4, 8, 1
    config.eval_every = config.save_every = config.sample_every = 2
    config.optimizer.lr, config.ema_decay = 1e-3, 0.5
    config.data.update(name="folder", dir=str(tmp_path / "pictures"), image_size=16)
    config.model.update({k: v for k, v in vars(SMALL).items()})
    config.loss.update(adversarial=0.5, adversarial_start=1)
    config.discriminator.update(ch=4, depth=2)
    config.sample.images = 4
    on_devices(monkeypatch, 1)
    return config


@pytest.mark.slow
def test_run_leaves_everything_resumes_exactly_and_can_be_sharded(config, tmp_path, monkeypatch):
    whole = train_vq.train(config, tmp_path / "a")
    for name in ("metrics.jsonl", "samples/step_0000002.png", "checkpoints/4", "model/model.json"):
        assert (tmp_path / "a" / name).exists(), name
    assert list((tmp_path / "a" / "tensorboard").iterdir())
    rows = records(tmp_path / "a")
    steps = [row for row in rows if "loss" in row]
    assert steps[0]["gan_weight"] == 0 and steps[1]["gan_weight"] > 0
    assert {"hinge_loss", "logits_real", "logits_fake"} <= steps[1].keys()
    assert whole.discriminator.opt_state.used == 3  # it stands still until its start
    held_out = [row["val_rec_l2"] for row in rows if "val_rec_l2" in row]
    assert held_out[-1] < held_out[0]

    # SIGTERM while step 2 is prepared: step 2 is finished, saved, and the run ends by itself.
    with monkeypatch.context() as patch:
        interrupt(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stopped = train_vq.train(config, tmp_path / "b")
    assert int(stopped.step) == 2 and (tmp_path / "b" / "checkpoints" / "2").is_dir()
    again = train_vq.train(config, tmp_path / "b")
    assert_same_run(tmp_path / "a", whole, tmp_path / "b", again)
    model = load_pretrained(tmp_path / "b")
    chex.assert_trees_all_equal(model.vq_params, whole.ema)
    assert model.class_names == ("dark", "light")

    half = config.copy_and_resolve_references()
    half.steps = 2
    half.mesh.fsdp = True
    on_devices(monkeypatch, 4)
    split = train_vq.train(half, tmp_path / "c")
    kernel = split.params["decoder"]["conv_in"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, None, None, "data")
    moment = split.discriminator.opt_state.inner[1][0].mu["conv_1"]["kernel"]
    assert moment.sharding.spec == kernel.sharding.spec
    for row, other in zip(steps, [r for r in records(tmp_path / "c") if "loss" in r], strict=False):
        for name in ("loss", "hinge_loss", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-3), name


def test_decoder_alone(config, tmp_path):
    config.loss.adversarial, config.optimizer.weight_decay = 0.0, 0.1
    config.steps = config.eval_every = config.save_every = config.sample_every = 2
    start = jax.jit(init_params, static_argnums=0)(SMALL, jax.random.key(5))
    save_model(tmp_path / "start", Pretrained("start", vq_config=SMALL, vq_params=start))
    config.init, config.decoder_only = str(tmp_path / "start"), True
    state = train_vq.train(config, tmp_path / "run")
    chex.assert_trees_all_equal(encoder_params(state.params), encoder_params(start))
    same = jax.tree.map(np.array_equal, state.params["decoder"], start["decoder"])
    assert not any(jax.tree.leaves(same))
    old, new = load_pretrained(tmp_path / "start"), load_pretrained(tmp_path / "run")
    model = old.with_tokenizer(new)
    chex.assert_trees_all_equal(model.vq_params["decoder"], state.ema["decoder"])
    new.vq_params["quantize"]["embedding"] += 1
    with pytest.raises(ValueError, match="has another encoder, codebook or compute dtype"):
        old.with_tokenizer(new)
    for name, value, message in (
        ("model.compute_dtype", "bfloat16", "set config.model.compute_dtype=float32"),
        ("export_dtype", "float16", "set config.export_dtype=float32"),
    ):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict({name: value})
        with pytest.raises(ValueError, match=message):
            train_vq.train(other, tmp_path / "other")


def test_what_is_missing_is_said_before_the_run(config, tmp_path, monkeypatch):
    monkeypatch.delenv("AIM_JAX_LPIPS", raising=False)
    on_devices(monkeypatch, 8)
    for change, message in (
        ({"loss.perceptual": 1.0}, "needs the weights of LPIPS"),
        ({"lpips": str(tmp_path / "none.pth")}, "no such file"),
        ({"mesh.model": 2}, "set config.mesh.model=1"),
        ({"discriminator.depth": 3}, "needs images of 24"),
        ({"decoder_only": True}, "name one in config.init"),
        ({"decoder_only": True, "init": "cifar10", "restart_codes": 5}, "set config.restart_codes"),
        ({"inception": str(tmp_path / "none.pt")}, "Inception"),
    ):
        broken = config.copy_and_resolve_references()
        broken.update_from_flattened_dict(change)
        with pytest.raises((ValueError, OSError), match=message):
            train_vq.train(broken, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    recipe = llamagen_recipe()
    assert recipe.loss.perceptual == 1.0 and recipe.loss.adversarial_start == 20_000


@pytest.mark.slow
def test_lpips_and_rfid_of_held_out_pictures(config, lpips_params, tmp_path, monkeypatch):
    seen = []

    def extractor(params):
        """Four numbers of a picture in place of the network, which has tests of its own."""

        def extract(pictures):
            seen.append(pictures)
            corners = pictures[:, ::15, ::15, 0].reshape(len(pictures), 4)
            return Features(corners.astype(np.float32), None, None)

        return extract

    monkeypatch.setattr(train_vq, "FeatureExtractor", extractor)
    monkeypatch.setattr(vq_held_out, "NUM_FEATURES", 4)
    monkeypatch.setattr("aim_jax.weights.convert.inception.load_inception", lambda path: {})
    monkeypatch.setattr(train_vq, "open_lpips", lambda path, losses, size: lpips_params)
    l1 = lambda params, a, b: jnp.abs(a - b).sum(axis=(1, 2, 3))  # noqa: E731
    monkeypatch.setattr(vq_held_out, "lpips", l1)
    config.inception, config.loss.adversarial = "seeded", 0.0
    config.accumulate = 2
    config.steps = config.eval_every = config.save_every = config.sample_every = 1
    state = train_vq.train(config, tmp_path / "run")
    (row,) = (row for row in records(tmp_path / "run") if "val_rfid" in row)
    pictures = np.concatenate(seen)
    made, real = pictures[:10], pictures[10:]
    recon = VQModel(SMALL).apply({"params": state.ema}, real.astype(np.float32) / 127.5 - 1)[0]
    np.testing.assert_array_equal(made, to_uint8(recon))
    moments = [Moments(4), Moments(4)]
    for side, of in zip(moments, (made, real), strict=True):
        side.add(extractor(None)(of).pool)
    expected = frechet_distance(*(side.gaussian() for side in moments))
    assert row["val_rfid"] == pytest.approx(expected, rel=1e-5)
    distance = np.abs(np.clip(recon, -1, 1) - (real / 127.5 - 1)).sum(axis=(1, 2, 3)).mean()
    assert row["val_lpips"] == pytest.approx(distance, rel=1e-4)
