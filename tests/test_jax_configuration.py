"""JAX's configuration in the process: results and the API do not depend on it."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from aim_jax import ops
from aim_jax.configs.defaults import aim_defaults
from aim_jax.evaluation import distribution
from aim_jax.evaluation.reconstruction import psnr, ssim
from aim_jax.models import AiM, AiMConfig, VQConfig, VQModel, inception, init_cache, lpips
from aim_jax.models.aim import init_params as init_aim
from aim_jax.models.patchgan import PatchGAN
from aim_jax.models.vq import init_params as init_vq
from aim_jax.sampling.config import SETTINGS as SAMPLING
from aim_jax.sampling.engine import Engine, native_kernels
from aim_jax.sampling.generate import generate
from aim_jax.sampling.grids import with_mixed_classes
from aim_jax.sampling.images import decode_padded
from aim_jax.sampling.token_loop import Request, Series, generate_on_device, make_decoder
from aim_jax.training import aim as train_aim
from aim_jax.training import tokenizer as train_vq
from aim_jax.training.held_out import eval_step as eval_vq
from aim_jax.training.losses import LossConfig
from aim_jax.training.optimizer import learning_rate, make_optimizer
from aim_jax.utils.random import random_key
from tests.compilation import xla_flags
from tests.conftest import ROOT

# Settings that functions meet when they are traced; nothing is compiled for these tests.
WHILE_TRACING = {
    "x64": functools.partial(jax.enable_x64, True),
    "rank_promotion": functools.partial(jax.numpy_rank_promotion, "raise"),
}
BASE = AiMConfig(
    vocab_size=16, num_classes=3, num_tokens=8, d_model=16, n_layer=2, d_state=8, headdim=8,
    adaln="group", num_groups=1, chunk_size=4, token_dropout=0.1,
)  # fmt: skip
AIMS = {
    "mamba2": BASE,
    "mamba1": dataclasses.replace(BASE, mixer="mamba1"),
    "layer": dataclasses.replace(BASE, adaln="layer", num_groups=1, logits_chunk=3),
    "groups": dataclasses.replace(BASE, ngroups=2, remat="full", scan_unroll=2),
    "mlp": dataclasses.replace(BASE, d_intermediate=8, positions=False),
    "bfloat16": dataclasses.replace(BASE, compute_dtype="bfloat16"),
}
VQ = VQConfig(
    ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, embed_dim=4, n_embed=16, dropout=0.1,
    entropy_loss_ratio=0.1,
)  # fmt: skip
IMAGES = jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)
KEY = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
INTS = jax.ShapeDtypeStruct((4,), jnp.int32)

SETTINGS = (
    {"JAX_ENABLE_X64": "1"},
    {"JAX_DEFAULT_PRNG_IMPL": "rbg"},
    {"JAX_NUMPY_RANK_PROMOTION": "raise"},
    {"JAX_DEBUG_NANS": "1"},
)


@pytest.fixture(params=WHILE_TRACING)
def configured(request):
    with WHILE_TRACING[request.param]():
        yield


def shapes(function, *arguments, **options):
    """Abstract results of a function, which are of the library's own types."""
    results = jax.eval_shape(functools.partial(function, **options), *arguments)
    wide = {str(x.dtype) for x in jax.tree.leaves(results)} & {"float64", "complex128"}
    assert not wide, jax.tree.map(lambda x: x.dtype, results)
    return results


def aim_params(config):
    return nn.unbox(shapes(functools.partial(init_aim, config), KEY))


@pytest.mark.parametrize("config", AIMS.values(), ids=AIMS)
def test_models_and_their_gradients_keep_their_types(config, configured):
    params = aim_params(config)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}
    codes = jax.ShapeDtypeStruct((4, 8), jnp.int32)

    def loss(params, codes, labels, key):
        apply = functools.partial(AiM(config).apply, {"params": params}, codes, labels, train=True)
        return apply(rngs={"dropout": key}, method="cross_entropy").mean()

    value, grads = shapes(jax.value_and_grad(loss), params, codes, INTS, KEY)
    assert value.dtype == jnp.float32
    assert jax.tree.map(lambda x: x.dtype, grads) == jax.tree.map(lambda x: x.dtype, params)


@pytest.mark.parametrize(
    ("implementation", "platform"), [("xla", "cpu"), ("xla", "tpu"), ("native", "cpu")]
)
@pytest.mark.parametrize("form", ["recurrent", "dual"])
@pytest.mark.parametrize("config", AIMS.values(), ids=AIMS)
def test_the_loops_of_sampling_keep_their_types(config, form, implementation, platform, configured):
    if config.mixer == "mamba1" and (form, implementation) != ("recurrent", "xla"):
        pytest.skip("Mamba-1 has no dual form and no native kernels")
    if implementation == "native" and not native_kernels():
        pytest.skip("needs a C++ compiler")
    settings = {name: jax.ShapeDtypeStruct((4,), s.dtype) for name, s in SAMPLING.items()}
    prefix = jax.ShapeDtypeStruct((4, 3), jnp.int32)
    request = Request(INTS, INTS, settings, prefix)

    def sampled(params, request):
        decoder = make_decoder(params, config, Engine(form, implementation), platform)
        series = Series.of(random_key(0), "cosine", (0.0, 1.0))
        return generate_on_device(decoder, request, series, guided=True)

    tokens, finite = shapes(sampled, aim_params(config), request)
    assert finite.dtype == jnp.bool_ and finite.shape == (4,)
    assert tokens.dtype == jnp.int32 and tokens.shape == (4, 8)


def vq_state(recipe):
    return jax.eval_shape(functools.partial(train_vq.create_train_state, recipe, 0, 16))


def test_the_tokenizer_and_its_training_keep_their_types(configured):
    params = shapes(functools.partial(init_vq, VQ), KEY)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}
    apply = lambda params, x, **how: VQModel(VQ).apply({"params": params}, x, **how)  # noqa: E731
    tokens = shapes(apply, params, IMAGES, method="encode_to_tokens")
    assert tokens.dtype == jnp.int32
    shapes(decode_padded.__wrapped__, params, tokens, config=VQ)
    optimizer = make_optimizer(aim_defaults().optimizer, 100)
    losses = LossConfig(l1=1.0, perceptual=1.0, adversarial=0.5)
    recipe = train_vq.Recipe(
        VQ, optimizer, losses, PatchGAN(ch=4, depth=2), accumulate=2, ema_decay=0.9,
        restart_codes=2,
    )  # fmt: skip
    state = nn.unbox(vq_state(recipe))
    networks = lpips.shapes()
    batch = {"images": IMAGES, "labels": INTS, "weights": jax.ShapeDtypeStruct((4,), jnp.float32)}
    new, _ = shapes(train_vq.train_step, state, batch, networks, recipe=recipe)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    shapes(eval_vq, params, batch, networks, config=VQ, accumulate=2)


@pytest.mark.parametrize("schedule, warmup", [("constant", 0), ("linear", 10), ("cosine", 10)])
def test_training_steps_keep_their_types(schedule, warmup, configured):
    config = aim_defaults().optimizer
    config.schedule, config.warmup_steps, config.spike_factor = schedule, warmup, 3.0
    optimizer = make_optimizer(config, 100)
    create = functools.partial(train_aim.create_train_state, BASE, optimizer, 0, ema=True)
    state = nn.unbox(jax.eval_shape(create))
    assert not {x.dtype for x in jax.tree.leaves(state)} & {jnp.dtype("float64")}
    batch = {"codes": jax.ShapeDtypeStruct((4, 8), jnp.int32), "labels": INTS}
    new, report = shapes(
        train_aim.train_step, state, batch, config=BASE, optimizer=optimizer, accumulate=2,
        ema_decay=0.9,
    )  # fmt: skip
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert report["loss"].dtype == report["grad_norm"].dtype == jnp.float32
    batch["weights"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    shapes(train_aim.eval_step, state.params, batch, config=BASE, accumulate=2)


def test_ops_keep_their_types(configured):
    f = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    x, dt, A, B = f(2, 5, 4, 3), f(2, 5, 4), f(4), f(2, 5, 2, 3)
    options = dict(D=A, z=x, dt_bias=A)
    call = lambda op, *arrays, **named: shapes(  # noqa: E731
        lambda arrays, named: op(*arrays, **named), arrays, named
    )
    call(functools.partial(ops.ssd_scan, chunk_size=2), x, dt, A, B, B, **options)
    call(ops.recurrence, x, dt, f(4, 1, 1), B, B, **options)
    call(ops.ssd_step, f(2, 4, 3, 3), f(2, 4, 3), f(2, 4), A, f(2, 2, 3), f(2, 2, 3), D=A,
         z=f(2, 4, 3), dt_bias=A)  # fmt: skip
    wide = dict(D=f(6), dt_bias=f(6))
    call(functools.partial(ops.selective_scan, chunk_size=2), f(2, 5, 6), f(2, 5, 6), f(6, 3),
         f(2, 5, 3), f(2, 5, 3), z=f(2, 5, 6), **wide)  # fmt: skip
    call(ops.selective_scan_step, f(2, 6, 3), f(2, 6), f(2, 6), f(6, 3), f(2, 3), f(2, 3),
         z=f(2, 6), **wide)  # fmt: skip
    call(ops.causal_conv1d, f(2, 5, 6), f(4, 6), f(6), initial_state=f(2, 3, 6))
    shapes(lambda w: ops.conv_ring(w, 3), f(2, 3, 6))
    call(ops.cross_entropy, f(2, 5, 7), jax.ShapeDtypeStruct((2, 5), jnp.int32))
    step = dict(conv_weight=f(1, 4, 24), conv_bias=f(1, 24))
    ssm = dict(dt_bias=f(1, 4), A=f(1, 4), D=f(1, 4), norm_scale=f(1, 12))
    i = jax.ShapeDtypeStruct((), jnp.int32)
    call(ops.mamba2_step, f(2, 40), f(1, 2, 4, 24), f(1, 2, 4, 3, 3), i, i, **step, **ssm)
    call(ops.dual_step, f(2, 40), f(1, 2, 4, 24), f(1, 2, 8, 4, 3), f(1, 2, 8, 2, 3),
         f(1, 2, 8, 4), i, i, **step, **ssm)  # fmt: skip
    call(ops.conv_step, f(2, 24), f(1, 2, 4, 24), i, i, **step)
    call(ops.mamba1_step, f(2, 6), f(2, 6), f(2, 8), f(2, 12), f(1, 2, 6, 3), i, dt_bias=f(1, 6),
         A=f(1, 6, 3), D=f(1, 6))  # fmt: skip
    call(functools.partial(ops.add_norm_modulate, inner=12), f(2, 6), f(2, 6), f(1, 6),
         f(1, 2, 3, 6), i, sum_squares=f(2, 4))  # fmt: skip
    for form in (None, 8):
        shapes(lambda form=form: init_cache(BASE, 2, dual=form))


def test_networks_and_metrics_keep_their_types(configured):
    pixels = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8)
    shapes(inception.extract.__wrapped__, inception.shapes(True), pixels)
    shapes(lpips.lpips, lpips.shapes(), IMAGES, IMAGES)
    for metric in (psnr, ssim):
        assert shapes(metric.__wrapped__, pixels, pixels).dtype == jnp.float32
    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(2, 9, 3)).astype(np.float32)
    found = distribution.precision_recall(real, made) | distribution.density_coverage(real, made)
    assert all(np.isfinite(x) for x in found.values())
    assert distribution.nearest(real, made, 2).shape == (9, 2)


def test_mixed_classes_keep_their_types(tiny_model, configured):
    mixed = with_mixed_classes(tiny_model, 0, 2, np.linspace(0, 1, 3))
    assert {str(x.dtype) for x in jax.tree.leaves(mixed.aim_params)} == {"float32"}


def test_schedules_count_steps_in_float32():
    config = aim_defaults().optimizer
    config.schedule, config.warmup_steps = "cosine", 10
    schedule = learning_rate(config, 1000)
    warm = optax.linear_schedule(0.0, config.lr, 10)
    np.testing.assert_array_equal(schedule(3), warm(jnp.int32(3)))


def test_seeds_of_another_generator_are_those_of_the_named_one(tiny_model):
    """Image i of a seed is the same in any batch, for keys of any generator."""
    for seed in (3, jax.random.key(3, impl="rbg"), jax.random.key(3, impl="unsafe_rbg")):
        assert str(jax.random.key_impl(random_key(seed))) == "threefry2x32"
        many = np.asarray(generate(tiny_model, [1] * 4, seed).tokens)
        alone = np.asarray(generate(tiny_model, [1], seed, first_index=2).tokens)
        np.testing.assert_array_equal(many[2], alone[0])


def end_to_end(out, **settings) -> dict:
    environment = os.environ | {"XLA_FLAGS": xla_flags(1), "JAX_PLATFORMS": "cpu", **settings}
    done = subprocess.run(
        [sys.executable, "-m", "tests.end_to_end", str(out)],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict:
    return end_to_end(tmp_path_factory.mktemp("default"))


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "".join(settings))
def test_from_images_to_scores_under_every_configuration(settings, expected, tmp_path):
    assert end_to_end(tmp_path, **settings) == expected


@pytest.mark.parametrize("platform", ["cuda", "tpu", "no_such_platform"])
@pytest.mark.parametrize("arguments", [
    ("sample", "--out", "OUT"), ("describe",), ("train", "--config", "cifar10", "--workdir", "OUT"),
])  # fmt: skip
def test_a_platform_that_is_not_there_is_one_line(platform, arguments, tmp_path):
    command = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "aim_jax", *command],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": platform},
    )  # fmt: skip
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and platform in lines[0] and "Traceback" not in done.stderr
