"""The engines of the decode loop against golden vectors and against each other."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from aim_jax import generate
from aim_jax.models import PRESETS, AiMConfig
from aim_jax.models.aim import init_params, param_shapes
from aim_jax.sampling import decoder, token_loop
from aim_jax.sampling.config import SETTINGS, SamplingConfig
from aim_jax.sampling.engine import Engine, native_kernels, resolve
from aim_jax.sampling.fused_decoder import FusedDecoder
from aim_jax.sampling.generate import generate_tokens, prepare_decoder
from aim_jax.sampling.logits import _filter_by_search, apply_cfg, filter_logits, sample
from aim_jax.sampling.token_loop import Request, Series, make_decoder
from aim_jax.utils.random import random_key
from tests import parity
from tests.teacher_forced import teacher_forced_decode
from tests.test_golden import GOLDEN

native_only = pytest.mark.skipif(
    not native_kernels(), reason="needs a C++ compiler (CXX, c++, g++ or clang++)"
)
ENGINES = [
    pytest.param(Engine("recurrent", "xla"), id="recurrent-xla"),
    pytest.param(Engine("dual", "xla"), id="dual-xla"),
    pytest.param(Engine("recurrent", "native"), id="recurrent-native", marks=native_only),
    pytest.param(Engine("dual", "native"), id="dual-native", marks=native_only),
]
MODULES = Engine("recurrent", "xla")


@pytest.fixture(autouse=True, scope="module")
def two_segments():
    """Every segment of a growing cache is a loop to compile; two show what four do."""
    before, decoder.SEGMENTS = decoder.SEGMENTS, 2
    yield
    decoder.SEGMENTS = before


# Golden vectors. The first engine is what test_golden.py decodes with.


@pytest.mark.parametrize("case", ["aim_tiny_adaln", "aim_tiny_mlp_group"])
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_every_engine_matches_golden(case, engine):
    """Logits of every step, convolution windows and states at the end, greedy tokens."""
    golden = parity.Golden(GOLDEN / case / "expected.npz")
    config, params = parity.load_aim(GOLDEN / case)
    lines = []
    report = parity.Report(lines.append, engine=engine)
    model = parity.Subject(golden, params, config, parity.aim_errors(golden))
    with jax.default_matmul_precision("highest"):
        for mode in parity.POSITION_MODES:
            parity.compare_decode(mode, model, report)
        parity.compare_greedy(model, report)
    assert not report.misses, "\n".join(lines)
    assert report.checks == 17, "\n".join(lines)


# Each other


@functools.cache
def random_model(**changes):
    config = AiMConfig(
        vocab_size=37, num_classes=3, num_tokens=6, d_model=24, n_layer=2, d_state=12, headdim=12,
        chunk_size=4, **changes,
    )  # fmt: skip
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(config, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return config, jax.tree.unflatten(tree, noisy)


def tokens_of(config, params, engine, rows=3, first=0, scale=2.0, **options):
    """Tokens of a model, or of the decoder that is given instead of its parameters."""
    labels = (first + jnp.arange(rows)) % 3
    index = first + jnp.arange(rows)
    is_made = isinstance(params, FusedDecoder)
    return np.asarray(
        generate_tokens(
            params if is_made else prepare_decoder(params, config, engine),
            labels,
            3,
            index,
            SamplingConfig(scale, 0.9, 20, 0.95),
            **options,
        )
    )


@pytest.mark.parametrize("changes", [{"ngroups": 2}, {"d_intermediate": 40}], ids=str)
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_every_engine_draws_the_same_tokens(changes, engine):
    """Sizes that fill no vector register, SSM groups, an MLP, a prefix; with guidance."""
    config, params = random_model(**changes)
    expected = tokens_of(config, params, MODULES)
    np.testing.assert_array_equal(tokens_of(config, params, engine), expected)
    if "ngroups" in changes:
        completed = tokens_of(config, params, engine, prefix=jnp.asarray(expected[:, :3]))
        np.testing.assert_array_equal(completed, expected)


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("dual", {"ngroups": 2}),
        ("dual", {}),
        ("recurrent", {"d_intermediate": 40}),
        ("recurrent", {"mixer": "mamba1"}),
    ],
    ids=str,
)
def test_the_loop_of_accelerators_is_the_model(form, changes):
    """Its decoder runs on a CPU too: the same logits, states and tokens, also after a prefix."""
    config, params = random_model(**changes)
    engine = Engine(form, "xla")
    expected = tokens_of(config, params, MODULES)
    loop = make_decoder(params, config, engine, "tpu")
    assert isinstance(loop, FusedDecoder)
    np.testing.assert_array_equal(tokens_of(config, loop, engine), expected)
    completed = tokens_of(config, loop, engine, prefix=jnp.asarray(expected[:, :3]))
    np.testing.assert_array_equal(completed, expected)
    run = functools.partial(teacher_forced_decode, params, expected, jnp.arange(3), 2.0, 0, config)
    actual, modules = run(engine, "tpu"), run(MODULES)
    for name, array in modules.items():
        np.testing.assert_allclose(actual[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_stays_close(engine):
    """The logits of a step in bfloat16, of matrices and caches, are near those in float32."""
    config, params = random_model()
    rounded = dataclasses.replace(config, compute_dtype="bfloat16")
    kept = dataclasses.replace(engine, cache_dtype="float32" if engine == MODULES else "bfloat16")
    codes = jnp.array([[5, 11, 3, 30, 7, 8]])
    run = functools.partial(teacher_forced_decode, params, codes, jnp.array([1]), 2.0, 0)
    exact, near = run(config, engine)["cond"], run(rounded, kept)["cond"]
    error = float(jnp.max(jnp.abs(exact - near)) / jnp.max(jnp.abs(exact)))
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("engine", ENGINES)
def test_an_image_does_not_depend_on_its_batch_or_devices(engine):
    """The same tokens alone, among 64, and with 64 images on 8 devices."""
    config, params = random_model()
    many = tokens_of(config, params, engine, rows=64)
    for number in (0, 63):
        alone = tokens_of(config, params, engine, rows=1, first=number)
        np.testing.assert_array_equal(alone[0], many[number])
    mesh = jax.make_mesh((8,), ("data",))
    everywhere = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    np.testing.assert_array_equal(tokens_of(config, everywhere, engine, rows=64), many)
    # A number of images that the devices do not divide.
    np.testing.assert_array_equal(tokens_of(config, everywhere, engine, rows=3), many[:3])


@pytest.mark.parametrize("engine", [ENGINES[1], ENGINES[3]])
def test_a_callback_sees_the_tokens_grow(engine):
    config, params = random_model()
    expected, seen = tokens_of(config, params, engine), []
    tokens = tokens_of(
        config, params, engine, callback=lambda x: seen.append(np.asarray(x)), every=4
    )
    np.testing.assert_array_equal(tokens, expected)
    assert [x.shape for x in seen] == [(3, 4), (3, 6)]
    for x in seen:
        np.testing.assert_array_equal(x, expected[:, : x.shape[1]])


def test_a_callback_gets_pictures(tiny_model):
    seen = []
    samples = generate(tiny_model, [0, 1], 3, callback=seen.append, every=2)
    plain = generate(tiny_model, [0, 1], 3)
    np.testing.assert_array_equal(samples.images, plain.images)
    np.testing.assert_array_equal(seen[-1].images, plain.images)
    assert seen[0].tokens.shape == (2, 2) and (np.asarray(seen[0].images)[:, 2:] == 128).all()
    mesh = jax.make_mesh((8,), ("data",))
    spread = jax.device_put(tiny_model.aim_params, jax.NamedSharding(mesh, jax.P()))
    with pytest.raises(ValueError, match="the model is on 8 devices"):
        generate(dataclasses.replace(tiny_model, aim_params=spread), [0], callback=seen.append)


# The draw


SAMPLERS = [
    pytest.param(lambda: sample, id="xla"),
    pytest.param(lambda: pytest.importorskip("aim_jax.ops.native").sample, id="native",
                 marks=native_only),
]  # fmt: skip


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_drawn_tokens_follow_the_filtered_softmax(sampler):
    """Chi-square of 20,000 draws, with guidance, temperature, top-k and top-p."""
    n, vocab = 20_000, 12
    cond, uncond = jax.random.normal(jax.random.key(1), (2, 1, vocab))
    logits = jnp.repeat(jnp.stack([cond, uncond]), n, axis=1).reshape(2 * n, vocab)
    uniform = jax.random.uniform(jax.random.key(2), (n,))
    settings = [jnp.full(n, x) for x in (1.5, 0.8)] + [
        jnp.full(n, 8),
        jnp.full(n, 0.95),
        jnp.full(n, 0.02),
    ]
    tokens = np.asarray(jax.jit(sampler())(logits, uniform, *settings))
    guided = apply_cfg(cond, uncond, 1.5) / 0.8
    p = np.asarray(jax.nn.softmax(filter_logits(guided, 8, 0.95, 0.02)[0]), np.float64)
    counts, support = np.bincount(tokens, minlength=vocab), p > 0
    assert counts[~support].sum() == 0 and 2 <= support.sum() <= 8
    chi_square = np.sum((counts - n * p)[support] ** 2 / (n * p[support]))
    assert chi_square < 24.3  # 99.9 % quantile with 7 degrees of freedom; there are at most as many


def test_filters_keep_the_same_with_the_search_of_accelerators():
    """They keep what a sort keeps: ties, infinities, settings that keep everything or one token."""
    rng = np.random.default_rng(0)
    logits = np.round(rng.normal(0, 3, (6, 301)), 1).astype(np.float32)
    logits[0, :5] = -np.inf
    logits[1] = 0.0
    logits[2, 3] = 1e4
    searches = [jax.jit(functools.partial(_filter_by_search, bits=bits)) for bits in (1, 4)]
    for k, p in itertools.product((0, 1, 7, 200, 500), (1.0, 0.9, 0.5, 1e-6)):
        few, many = (np.asarray(search(logits, k, p)) for search in searches)
        np.testing.assert_array_equal(few, many, err_msg=f"k={k}, p={p}")
        if p == 1.0:
            smallest = np.sort(logits, axis=-1)[:, -(k or 301) if k < 301 else 0, None]
            np.testing.assert_array_equal(many, np.where(logits >= smallest, logits, -np.inf))


@native_only
def test_the_native_sampler_is_the_sampler():
    """Per-image settings, odd vocabularies, ties, infinities, and the ends of the random range."""
    from aim_jax.ops import native

    rng = np.random.default_rng(0)
    b, vocab = 400, 203
    logits = rng.standard_normal((2 * b, vocab)).astype(np.float32) * 4
    logits[:100] = np.round(logits[:100])
    logits[b : b + 100] = logits[:100]  # guidance keeps their ties
    logits[7:b:50, ::3] = -np.inf
    logits[b:][7::50, ::3] = 0.0
    uniform = rng.random(b, np.float32)
    uniform[::7], uniform[1::7] = 0.0, np.nextafter(np.float32(1), np.float32(0))
    settings = (
        rng.uniform(1, 4, b).astype(np.float32),
        rng.uniform(0.5, 2, b).astype(np.float32),
        rng.integers(0, 220, b),
        rng.choice([0.05, 0.5, 0.9, 1.0], b).astype(np.float32),
        rng.choice([0.0, 0.0, 0.03, 0.5, 1.0], b).astype(np.float32),
    )
    settings = [jnp.asarray(x) for x in settings]
    expected = np.asarray(jax.jit(sample)(logits, uniform, *settings))
    found = np.asarray(jax.jit(native.sample)(logits, uniform, *settings))
    # Sums are taken in another order, so a number on the border of two tokens may fall to either;
    # at the end of the range that is the last of the tokens that are left.
    assert np.mean(found == expected) > 0.98
    guided = apply_cfg(logits[:b], logits[b:], settings[0]) / settings[1][:, None]
    kept = np.isfinite(filter_logits(guided, *settings[2:]))
    assert kept[np.arange(b), found].all()
    unguided = jax.jit(native.sample)(logits[:b], uniform, *settings)
    plain = jax.jit(sample)(logits[:b], uniform, *settings)
    assert np.mean(np.asarray(unguided) == np.asarray(plain)) > 0.98


# The choice


def test_the_choice_of_an_engine(monkeypatch):
    monkeypatch.setattr("aim_jax.sampling.engine.triton_unavailable_because", lambda: "")
    B, mamba1 = PRESETS["B"], dataclasses.replace(PRESETS["B"], mixer="mamba1")
    tpu = resolve(Engine(), B, 16, "tpu")
    assert (tpu.implementation, tpu.form) == ("xla", "dual")
    long = dataclasses.replace(B, num_tokens=1024)
    assert resolve(Engine(), long, 16, "tpu").form == "recurrent"
    assert resolve(Engine(implementation="xla"), B, 16, "cpu").form == "recurrent"
    assert (
        resolve(Engine(implementation="triton"), B, 16, "cuda").form == "recurrent"
    )  # 384 programs
    assert resolve(Engine(implementation="triton"), B, 32, "cuda").form == "dual"
    assert resolve(Engine(), mamba1, 16, "tpu").form == "recurrent"
    assert resolve(Engine("recurrent", "xla"), B, 2, "tpu") == Engine("recurrent", "xla")
    for engine, config, platform, message in (
        (
            Engine(implementation="native"),
            B,
            "cuda",
            "native.* requires Mamba-2 on a CPU, got mamba2 on",
        ),
        (Engine(implementation="native"), mamba1, "cpu", "got mamba1"),
        (Engine(implementation="triton"), B, "cpu", "NVIDIA GPU, got cpu"),
        (Engine(form="dual"), mamba1, "cpu", "form='dual' requires Mamba-2"),
        (Engine("recurrent", "xla", "bfloat16"), B, "cpu", "requires form='dual' or a fused"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve(engine, config, 2, platform)
    with pytest.raises(ValueError, match="implementation='cuda'; expected one of None, xla"):
        Engine(implementation="cuda")


def test_without_a_compiler_the_modules_decode(monkeypatch, tmp_path, caplog):
    from aim_jax.ops.native import build

    native_kernels.cache_clear()
    build.register.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    try:
        assert resolve(Engine(), PRESETS["B"], 2, "cpu").implementation == "xla"
        assert "no C++ compiler found" in caplog.text
        broken = tmp_path / "c++"
        broken.write_text("#!/bin/sh\necho 'error: no such processor' >&2\nexit 1\n")
        broken.chmod(0o755)
        with pytest.raises(build.BuildError, match=r"could not compile.*no such processor"):
            build.compile_sources()
        assert not list((tmp_path / "aim_jax" / "native").glob("*.s*"))
    finally:
        native_kernels.cache_clear()
        build.register.cache_clear()


# The compiled loop


LOOP_CONFIG = AiMConfig(
    vocab_size=32, num_classes=2, num_tokens=64, d_model=48, n_layer=2, d_state=64, headdim=32,
)  # fmt: skip


def compiled_generation(engine, compute_dtype):
    """Computations of the compiled loop of two images, by name, and the laid out weights."""
    config = dataclasses.replace(LOOP_CONFIG, compute_dtype=compute_dtype)
    params = param_shapes(config)
    ints = jax.ShapeDtypeStruct((2,), jnp.int32)
    settings = {name: jax.ShapeDtypeStruct((2,), s.dtype) for name, s in SETTINGS.items()}
    request = Request(ints, ints, settings, jax.ShapeDtypeStruct((2, 0), jnp.int32))
    decoder = jax.eval_shape(lambda params: make_decoder(params, config, engine), params)
    series = jax.eval_shape(lambda: Series.of(random_key(0), "constant", (0.0, 1.0)))
    begin = functools.partial(token_loop._begin, guided=True)
    modulation, loop = jax.eval_shape(begin, decoder, request, series)
    position = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = token_loop._advance_traced.lower(
        decoder, modulation, loop, settings, series, position, position, guided=True
    )
    return lowered.compile({"xla_backend_optimization_level": 3}).as_text(), decoder


@pytest.mark.parametrize("engine", ENGINES)
def test_the_compiled_loop_copies_no_cache(engine):
    """Inside the loop nothing but the kernels' outputs has the size of a state or cache."""
    text, _ = compiled_generation(engine, "float32")
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    assert bodies
    config = LOOP_CONFIG
    rows, h, p, n, t = 4, config.n_heads, config.headdim, config.d_state, config.num_tokens
    shapes = {"recurrent": [(rows, h, p, n)], "dual": [(rows, t, h, p), (rows, t, 1, n)]}
    shapes = [",".join(map(str, s)) for s in shapes[engine.form]]
    shapes += [f"{config.n_layer},{s}" for s in shapes]
    size = re.compile(r"= f32\[({})\]\S* copy".format("|".join(map(re.escape, shapes))))
    computations = dict(re.findall(r"^%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    lines = [line for name in bodies for line in computations[name].splitlines()]
    assert len(lines) > 20
    copies = [line.strip()[:120] for line in lines if size.search(line)]
    assert not copies, "\n".join(copies)


@pytest.mark.parametrize(
    ("engine", "compute_dtype"),
    [
        pytest.param(MODULES, "float32", id="xla"),
        pytest.param(Engine("recurrent", "native"), "float32", id="native", marks=native_only),
        pytest.param(Engine("dual", "native"), "bfloat16", id="bfloat16", marks=native_only),
    ],
)
def test_the_compiled_loop_makes_no_weights(engine, compute_dtype):
    """They are arguments: no instruction results in a matrix, in any dtype or orientation."""
    text, decoder = compiled_generation(engine, compute_dtype)
    matrices = {x.shape for x in jax.tree.leaves(decoder) if x.ndim == 2 and min(x.shape) > 8}
    assert len(matrices) >= 4
    shapes = {",".join(map(str, order)) for shape in matrices for order in (shape, shape[::-1])}
    made = re.compile(r"= \w+\[({})\]\S* ([\w\-]+)\(".format("|".join(map(re.escape, shapes))))
    assert len(made.findall(text)) >= len(matrices)  # they are there, as parameters
    # Views of a matrix are no work, nor are instructions inside of a fusion.
    views = {"parameter", "get-tuple-element", "bitcast", "while", "transpose"}
    fused = set(re.findall(r"calls=%?([\w.\-]+)", text))
    computations = dict(
        re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S)
    )
    found = [
        line.strip()[:150]
        for name, body in computations.items()
        if name not in fused
        for line in body.splitlines()
        if (match := made.search(line)) and match.group(2) not in views
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_laid_out_weights_in_bfloat16_take_little_more_than_bfloat16(implementation):
    """With the caches of one image, at most 1.25 times bfloat16 parameters and caches."""
    config = dataclasses.replace(PRESETS["XL"], compute_dtype="bfloat16")
    params = param_shapes(config)
    make = functools.partial(
        make_decoder, config=config, engine=Engine("recurrent", implementation)
    )
    laid_out = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(make, params)))
    caches = 2 * config.n_layer * config.d_inner * config.d_state * 4
    weights = 2 * sum(x.size for x in jax.tree.leaves(params))
    assert laid_out + caches <= 1.25 * (weights + caches)
