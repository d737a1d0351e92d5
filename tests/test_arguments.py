"""Arguments of wrong types give an error that names the argument, in the whole API."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aim_jax
from aim_jax import ops
from aim_jax.cli.common import recipes
from aim_jax.configs.defaults import aim_defaults, eval_defaults, vq_defaults
from aim_jax.evaluation.evaluate import evaluate
from aim_jax.evaluation.sweep import sweep
from aim_jax.models import AiMConfig, VQConfig, init_cache
from aim_jax.sampling.config import SamplingConfig
from aim_jax.sampling.export import export_sampler, save_exported
from aim_jax.sampling.generate import generate
from aim_jax.sampling.grids import compare_settings, complete, interpolate, sample_to_directory
from aim_jax.sampling.logits import sample
from aim_jax.training import aim, tokenizer
from aim_jax.training.loop import Every
from aim_jax.training.losses import LossConfig
from aim_jax.training.settings import INTEGERS, NUMBERS, SWITCHES, TEXTS, check_settings
from aim_jax.weights.publish import publish

ONE = np.ones((1, 16, 16, 3), np.uint8)

# (what is called with the tiny model and a directory, the argument that its error names)
CALLS = [
    (lambda m, d: generate(None, [0]), "model"),
    (lambda m, d: generate(m, None), "labels"),
    (lambda m, d: generate(m, 0), "labels"),
    (lambda m, d: generate(m, "boat"), "labels"),
    (lambda m, d: generate(m, [[0], [1, 2]]), "labels"),
    (lambda m, d: generate(m, {"boat": 1}), "labels"),
    (lambda m, d: generate(m, [0], "3"), "seed"),
    (lambda m, d: generate(m, [0], 0, 3), "config"),
    (lambda m, d: generate(m, [0], prefix="a"), "prefix"),
    (lambda m, d: generate(m, [0], prefix=[[1], [1, 2]]), "prefix"),
    (lambda m, d: generate(m, [0], first_index="a"), "first_index"),
    (lambda m, d: generate(m, [0], implementation=3), "implementation"),
    (lambda m, d: generate(m, [0], implementation=["xla"]), "implementation"),
    (lambda m, d: generate(m, [0], form=3), "form"),
    (lambda m, d: generate(m, [0], cache_dtype=np.float32), "cache_dtype"),
    (lambda m, d: generate(m, [0], callback=3), "callback"),
    (lambda m, d: generate(m, [0], every="row"), "every"),
    (lambda m, d: generate(m, [0], cfg_scale="3"), "cfg_scale"),
    (lambda m, d: SamplingConfig(top_k=[None]), "top_k"),
    (lambda m, d: SamplingConfig(cfg_schedule=["linear"]), "cfg_schedule"),
    (lambda m, d: SamplingConfig(cfg_interval=("a", "b")), "cfg_interval"),
    (lambda m, d: SamplingConfig(cfg_interval=[[0.0], [0.5, 1.0]]), "cfg_interval"),
    (lambda m, d: SamplingConfig(cfg_interval=None), "cfg_interval"),
    (lambda m, d: AiMConfig(d_model="768"), "d_model"),
    (lambda m, d: AiMConfig(class_dropout="0.1"), "class_dropout"),
    (lambda m, d: AiMConfig(mixer=2), "mixer"),
    (lambda m, d: AiMConfig(compute_dtype=np.float32), "compute_dtype"),
    (lambda m, d: AiMConfig(logits_chunk=1.5), "logits_chunk"),
    (lambda m, d: AiMConfig(positions="no"), "positions"),
    (lambda m, d: VQConfig(ch_mult=2), "ch_mult"),
    (lambda m, d: VQConfig(ch_mult=(1, "2")), "ch_mult"),
    (lambda m, d: VQConfig(n_embed=16.0), "n_embed"),
    (lambda m, d: VQConfig(l2_norm=None), "l2_norm"),
    (lambda m, d: LossConfig(l1="1"), "l1"),
    (lambda m, d: LossConfig(adversarial_start=0.5), "adversarial_start"),
    (lambda m, d: aim_jax.load_pretrained(5), "name_or_path"),
    (lambda m, d: aim_jax.load_pretrained(None), "name_or_path"),
    (lambda m, d: aim_jax.save_model(5, m), "path"),
    (lambda m, d: aim_jax.save_model(d / "x", "tiny"), "model"),
    (lambda m, d: aim_jax.save_model(d / "x", m, np.float32), "dtype"),
    (lambda m, d: aim_jax.save_model(d / "x", m, files=["a"]), "files"),
    (lambda m, d: aim_jax.data.open_images(5), "name"),
    (lambda m, d: aim_jax.data.open_images("folder", ["train"], d), "split"),
    (lambda m, d: aim_jax.data.open_images("folder", "train", 5), "data_dir"),
    (lambda m, d: publish(5, d / "x"), "checkpoint"),
    (lambda m, d: publish("cifar10", 5), "out"),
    (lambda m, d: publish("cifar10", d / "x", report="report.json"), "report"),
    (lambda m, d: publish("cifar10", d / "x", repository=None), "repository"),
    (lambda m, d: complete(m, ONE[0, 0, 0, 0], [0], 1), "images"),
    (lambda m, d: complete(m, list(ONE), "boat", 1), "classes"),
    (lambda m, d: complete(m, list(ONE), [0], "1"), "count"),
    (lambda m, d: complete("tiny", list(ONE), [0], 1), "model"),
    (lambda m, d: interpolate(m, "boat", 1, 2, 1), "first"),
    (lambda m, d: interpolate(m, 0, 1, 2.0, 1), "steps"),
    (lambda m, d: compare_settings(m, [0], 3, [1.0]), "setting"),
    (lambda m, d: compare_settings(m, [0], "cfg_scale", 2.0), "values"),
    (lambda m, d: sample_to_directory(m, 3, 1, d), "classes"),
    (lambda m, d: sample_to_directory(m, [0], 1, str(d)), "out"),
    (lambda m, d: save_exported("tiny", d / "x"), "model"),
    (lambda m, d: save_exported(m, d / "x", images="1"), "images"),
    (lambda m, d: save_exported(m, d / "x", dtype=np.float32), "dtype"),
    (lambda m, d: export_sampler(None), "model"),
    (lambda m, d: aim.train({"steps": 3}, d), "config"),
    (lambda m, d: aim.train(aim_defaults(), 3), "workdir"),
    (lambda m, d: aim.train(aim_defaults(), d, 3), "callbacks"),
    (lambda m, d: aim.train(aim_defaults(), d, [print]), "callbacks"),
    (lambda m, d: tokenizer.train(None, d), "config"),
    (lambda m, d: tokenizer.train(vq_defaults(), d, Every(1, print)), "callbacks"),
    (lambda m, d: Every("1", print), "steps"),
    (lambda m, d: Every(1, "print"), "callback"),
    (lambda m, d: Every(-1, print), "steps"),
    (lambda m, d: Every(1, print, at_end=None), "at_end"),
    (lambda m, d: evaluate("tiny", "", "x", {}, eval_defaults(), d, d), "model"),
    (lambda m, d: evaluate(m, None, "x", {}, eval_defaults(), d, d), "samples"),
    (lambda m, d: evaluate(m, "", "x", {}, {}, d, d), "config"),
    (lambda m, d: sweep(m, ["cfg_scale"], "x", {}, eval_defaults(), d, d), "grid"),
    (lambda m, d: init_cache("B", 1), "config"),
    (lambda m, d: init_cache(m.aim_config, "1"), "batch"),
]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_arguments_of_wrong_types_are_named(number, tiny_model, tmp_path):
    call, argument = CALLS[number]
    with pytest.raises((TypeError, ValueError), match=rf"(^|[ .]){argument}(:|=| )"):
        call(tiny_model, tmp_path)
    assert not list(tmp_path.iterdir())


X = jnp.ones((1, 2, 4, 3))
DT = jnp.ones((1, 2, 4))
A = -jnp.ones(4)
B = jnp.ones((1, 2, 2, 3))
ROW = jnp.ones((2, 4))

OPS = [
    (lambda: ops.ssd_scan([[1.0]], DT, A, B, B), "x"),
    (lambda: ops.ssd_scan(X, None, A, B, B), "dt"),
    (lambda: ops.ssd_scan(X, DT, A, B, "C"), "C"),
    (lambda: ops.ssd_scan(X, DT, A, B, B, D=1.0), "D"),
    (lambda: ops.ssd_scan(X, DT, A, B, B, chunk_size="64"), "chunk_size"),
    (lambda: ops.ssd_scan(X, DT, A, B, B, implementation=3), "implementation"),
    (lambda: ops.ssd_step(None, X[:, 0], DT[:, 0], A, B[:, 0], B[:, 0]), "state"),
    (lambda: ops.selective_scan(X[..., 0], DT, -jnp.ones((4, 3)), B[:, :, 0], None), "C"),
    (lambda: ops.recurrence(X, DT, 3.0, B, B), "A"),
    (lambda: ops.causal_conv1d(DT, [1.0]), "weight"),
    (lambda: ops.causal_conv1d(DT, jnp.ones((2, 4)), activation=3), "activation"),
    (lambda: ops.conv_ring(None, 0), "window"),
    (lambda: ops.conv_ring(DT, "0"), "position"),
    (lambda: ops.cross_entropy(ROW, None), "labels"),
    (lambda: ops.linear_cross_entropy(DT, ROW, jnp.zeros((1, 2), int), "3"), "chunk_size"),
    (lambda: ops.linear(ROW, [[1.0]]), "weight"),
    (lambda: ops.linear(np.array([["a"]]), ROW), "x"),
    (lambda: ops.init_dual_cache("1", 1, 1, 1, 1, 1), "b"),
    (lambda: ops.grow_dual_cache(X, 3), "cache"),
    (lambda: sample(None, *(jnp.ones(2) for _ in range(6))), "logits"),
    (lambda: sample(ROW, "a", *(jnp.ones(2) for _ in range(5))), "uniform"),
]


@pytest.mark.parametrize("number", range(len(OPS)))
def test_arguments_of_wrong_types_of_ops_are_named(number):
    call, argument = OPS[number]
    with pytest.raises((TypeError, ValueError), match=rf"(^|[ .]){argument}(:|=| )"):
        call()


def test_ops_refuse_integers_where_results_would_be_truncated():
    with pytest.raises(ValueError, match=r"ssd_scan: x is int32, expected floats"):
        ops.ssd_scan(jnp.ones((1, 2, 4, 3), jnp.int32), DT, A, B, B)
    with pytest.raises(ValueError, match=r"causal_conv1d: x is int32, expected floats"):
        ops.causal_conv1d(jnp.ones((1, 2, 4), jnp.int32), jnp.ones((2, 4)))


@pytest.mark.parametrize("defaults", [aim_defaults, vq_defaults])
def test_every_training_setting_is_checked(defaults):
    known = defaults()
    check_settings(known)
    checked = [*NUMBERS, *INTEGERS, *TEXTS, *SWITCHES]
    for name in checked:
        section, _, key = name.rpartition(".")
        config = known.copy_and_resolve_references().unlock()
        part = config.get(section, {}) if section else config
        if key not in part:
            continue
        wrong = 3 if name in (*TEXTS, *SWITCHES) else "3"
        with config.ignore_type():
            part[key] = wrong
        with pytest.raises(ValueError, match=rf"config\.{name}"):
            check_settings(config)
        del part[key]
        if name in ("optimizer.lr", "batch_size"):
            with pytest.raises(ValueError, match=rf"config\.{name} is missing"):
                check_settings(config)


@pytest.mark.parametrize(
    "name, value",
    [
        ("optimizer.lr", 1e39), ("optimizer.lr", 1e-46), ("optimizer.lr", float("nan")),
        ("optimizer.lr", -1.0), ("ema_decay", 0.99999999999), ("ema_decay", 1.0),
        ("optimizer.b1", 1.0), ("optimizer.b2", 0.999999999), ("optimizer.weight_decay", 1e39),
        ("optimizer.clip_norm", -1.0), ("optimizer.clip_norm", 1e-50), ("seed", 2**31),
        ("batch_size", 0), ("accumulate", 0), ("save_every", -1),
    ],
)  # fmt: skip
def test_training_settings_at_the_edge_are_refused(name, value):
    config = aim_defaults()
    section, _, key = name.rpartition(".")
    (config[section] if section else config)[key] = value
    with pytest.raises(ValueError, match=rf"config\.{name}"):
        check_settings(config)


@pytest.mark.parametrize(
    "kind, settings",
    [
        (AiMConfig, {"class_dropout": 1.5}), (AiMConfig, {"token_dropout": 0.9999999999}),
        (AiMConfig, {"norm_eps": 1e-50}), (AiMConfig, {"norm_eps": 1e39}),
        (AiMConfig, {"compute_dtype": "float8"}), (AiMConfig, {"d_intermediate": -1}),
        (VQConfig, {"beta": 1e39}), (VQConfig, {"beta": -0.1}), (VQConfig, {"dropout": 1.0}),
        (VQConfig, {"entropy_loss_ratio": 1e-50}), (VQConfig, {"n_embed": 0}),
        (LossConfig, {"l1": 1e39}), (LossConfig, {"perceptual": float("nan")}),
        (LossConfig, {"adversarial": 1e-50}), (LossConfig, {"adversarial_start": -1}),
        (SamplingConfig, {"cfg_scale": 1e39}), (SamplingConfig, {"cfg_scale": -1e38}),
        (SamplingConfig, {"temperature": 1e-46}), (SamplingConfig, {"temperature": 1e-38}),
        (SamplingConfig, {"top_p": 1e-46}),
        (SamplingConfig, {"cfg_interval": (0.5, 0.5 + 1e-10)}),
        (SamplingConfig, {"cfg_interval": (0.0, float("nan"))}),
    ],
)  # fmt: skip
def test_settings_of_models_losses_and_sampling_at_the_edge_are_refused(kind, settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        kind(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"cfg_scale": 1e15}, {"cfg_scale": -1e15}, {"temperature": 1e-15},
        {"cfg_scale": 1e15, "temperature": 1e-15}, {"temperature": 3e38},
    ],
)  # fmt: skip
def test_settings_at_the_edge_that_are_accepted_sample_tokens(settings):
    logits = jax.random.normal(jax.random.key(0), (8, 50)) * 10
    uniform = jnp.linspace(0, 0.99, 4)
    arrays = SamplingConfig(**settings).arrays(4)
    from aim_jax.sampling.logits import apply_cfg, filter_logits

    guided = apply_cfg(logits[:4], logits[4:], arrays["cfg_scale"])
    scaled = guided / arrays["temperature"][:, None]
    assert np.isfinite(scaled).all()
    kept = filter_logits(scaled, arrays["top_k"], arrays["top_p"], arrays["min_p"])
    tokens = np.asarray(sample(logits, uniform, **arrays))
    assert np.isfinite(np.take_along_axis(np.asarray(kept), tokens[:, None], 1)).all()


def test_settings_of_every_recipe_pass(picture_folder):
    import importlib.util

    for file in recipes().values():
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        needed = [str(picture_folder)] if file.stem.startswith("folder") else []
        config = module.get_config(*needed)
        if config.stage != "eval":
            check_settings(config)


@pytest.mark.parametrize("name", ["num_samples", "batch_size", "seed", "neighbour_images"])
def test_evaluation_settings_are_checked(name, tiny_model, tmp_path):
    config = eval_defaults()
    with config.ignore_type():
        config[name] = "3"
    with pytest.raises(ValueError, match=rf"config\.{name}"):
        evaluate(tiny_model, "", "x", {}, config, tmp_path / "out", tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_configurations_stay_plain_values():
    assert dataclasses.asdict(AiMConfig()) == dataclasses.asdict(AiMConfig(**vars(AiMConfig())))
    assert VQConfig(ch_mult=[1, 2]).ch_mult == (1, 2)
