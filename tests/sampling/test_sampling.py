"""Guidance, filters, the draw, and whole generated images."""

import contextlib
import dataclasses
import json
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_jax import generate, keep_compiled_programs
from aim_jax.models import AiM
from aim_jax.sampling import token_loop
from aim_jax.sampling.config import SETTINGS, SamplingConfig
from aim_jax.sampling.generate import NonFiniteError, generate_tokens, prepare, prepare_decoder
from aim_jax.sampling.images import encode_rows
from aim_jax.sampling.logits import (
    _invert,
    apply_cfg,
    draw,
    filter_logits,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    guidance_at,
)
from aim_jax.sampling.padding import pad_rows, padded_count
from aim_jax.utils.images import to_uint8


def kept(logits):
    return np.asarray(logits) > -np.inf


def test_apply_cfg_mixes_logits():
    cond, uncond = jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]])
    np.testing.assert_allclose(apply_cfg(cond, uncond, 3.0), [[3.0, -2.0]])
    np.testing.assert_allclose(apply_cfg(cond, uncond, 1.0), cond)
    both = apply_cfg(jnp.tile(cond, (2, 1)), jnp.tile(uncond, (2, 1)), jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(both, jnp.concatenate([cond, uncond]))


def test_top_k_keeps_ties_and_zero_is_off():
    logits = jnp.array([[3.0, 1.0, 2.0, 2.0, 0.0]])
    np.testing.assert_array_equal(kept(filter_top_k(logits, 2)), [[1, 0, 1, 1, 0]])
    np.testing.assert_array_equal(kept(filter_top_k(logits, 1)), [[1, 0, 0, 0, 0]])
    for off in (0, 5, 99):
        assert kept(filter_top_k(logits, off)).all()


def test_top_p_drops_the_small_tail():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    for p, expected in ((0.4, 1), (0.6, 2), (0.9, 3), (0.97, 4), (1.0, 4), (1e-6, 1)):
        assert kept(filter_top_p(logits, p)).sum() == expected, p


def test_min_p_drops_what_is_far_below_the_most_likely():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    for p, expected in ((0.0, 4), (0.05, 4), (0.2, 3), (0.5, 2), (0.7, 1), (1.0, 1)):
        assert kept(filter_min_p(logits, p)).sum() == expected, p
    ties = filter_min_p(jnp.array([[2.0, 2.0, 1.0]]), jnp.array([1.0]))
    np.testing.assert_array_equal(kept(ties), [[1, 1, 0]])
    off = jnp.array([[3.0, -jnp.inf, -80.0, 0.0]])
    np.testing.assert_array_equal(filter_min_p(off, 0.0), off)


def test_min_p_acts_after_temperature_and_the_other_filters():
    logits = jax.random.normal(jax.random.key(0), (3, 40)) * 2
    k, p, min_p = jnp.array([5, 0, 17]), jnp.array([0.7, 0.5, 1.0]), jnp.array([0.3, 0.0, 0.1])
    together = filter_logits(logits, k, p, min_p)
    one_by_one = filter_min_p(filter_top_p(filter_top_k(logits, k), p), min_p)
    np.testing.assert_array_equal(kept(together), kept(one_by_one))
    probs = np.asarray(jax.nn.softmax(logits, axis=-1))
    expected = kept(filter_logits(logits, k, p)) & (
        probs >= np.asarray(min_p)[:, None] * probs.max(-1, keepdims=True)
    )
    np.testing.assert_array_equal(kept(together), expected)


def test_min_p_of_one_is_greedy(tiny_model):
    labels = [0, 1, 2, 1]
    greedy = generate(tiny_model, labels, 3, top_k=1).tokens
    for implementation in ("xla", None):  # None: the fused kernels where there is a compiler
        found = generate(tiny_model, labels, 3, min_p=1.0, implementation=implementation).tokens
        np.testing.assert_array_equal(found, greedy)
    free = generate(tiny_model, labels, 3).tokens
    np.testing.assert_array_equal(generate(tiny_model, labels, 3, min_p=0.0).tokens, free)


def test_filters_compose_and_take_one_setting_per_image():
    logits = jax.random.normal(jax.random.key(0), (3, 40)) * 2
    k, p = jnp.array([5, 0, 17]), jnp.array([0.7, 0.5, 1.0])
    together = filter_logits(logits, k, p)
    one_by_one = filter_top_p(filter_top_k(logits, k), p)
    np.testing.assert_array_equal(kept(together), kept(one_by_one))
    assert kept(together)[2].sum() == 17
    np.testing.assert_array_equal(
        np.where(kept(together), logits, 0), np.where(kept(together), together, 0)
    )


def test_drawn_tokens_follow_the_filtered_softmax():
    n, vocab = 20_000, 12
    logits = jax.random.normal(jax.random.key(1), (1, vocab)) * 1.5
    filtered = filter_logits(logits / 0.8, jnp.array(8), jnp.array(0.95))
    uniform = jax.random.uniform(jax.random.key(2), (n,))
    tokens = np.asarray(jax.jit(draw)(jnp.broadcast_to(filtered, (n, vocab)), uniform))
    p = np.asarray(jax.nn.softmax(filtered[0]), np.float64)
    counts = np.bincount(tokens, minlength=vocab)
    assert counts[p == 0].sum() == 0
    support = p > 0
    chi_square = np.sum((counts - n * p)[support] ** 2 / (n * p[support]))
    # 99.9 % quantile of chi-square with 7 degrees of freedom; fewer survive the filters.
    assert 2 <= support.sum() <= 8 and chi_square < 24.3


def sorted_filter(logits, ks, ps):
    """Both filters as their definition says, with a sort, in float64."""
    kept = np.zeros(logits.shape, bool)
    for row, (x, k, p) in enumerate(zip(logits.astype(np.float64), ks, ps, strict=True)):
        kth = np.sort(x)[::-1][k - 1] if 0 < k < x.size else -np.inf
        probs = np.where(x >= kth, np.exp(x - x.max()), 0)
        probs /= probs.sum()
        at_most = np.array([probs[x <= value].sum() for value in x])  # ties go together
        kept[row] = (x >= kth) & ((at_most > 1 - p) | (x == x.max()) | (p == 1))
    return kept


def test_filters_are_those_of_the_definition():
    """Random rows with ties, infinities, negative zeros and extreme magnitudes."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((60, 97)).astype(np.float32) * 4
    logits[:20] = np.round(logits[:20])  # many ties
    logits[5, ::2] = -np.inf
    logits[6] = np.where(rng.random(97) < 0.5, 0.0, -0.0)
    logits[7] *= 1e30
    logits[8] = logits[8] * 1e-40
    k, p = rng.integers(0, 100, 60), rng.choice([0.05, 0.3, 0.77, 0.95, 1.0], 60)
    found = filter_logits(jnp.asarray(logits), jnp.asarray(k), jnp.asarray(p, jnp.float32))
    expected = sorted_filter(logits, k, p) & (logits > -np.inf)
    # A negative zero counts as smaller than a zero, so a tie between the two may be cut.
    rows = np.arange(60) != 6
    np.testing.assert_array_equal(kept(found)[rows], expected[rows])
    np.testing.assert_array_equal(np.asarray(found)[kept(found)], logits[kept(found)])


def test_the_draw_never_leaves_the_filter():
    """Also where all but a few of many tokens are gone, and at the ends of the random range."""
    rng = np.random.default_rng(1)
    logits = np.full((4000, 1000), -np.inf, np.float32)
    for row, count in enumerate(rng.integers(1, 5, 4000)):
        logits[row, rng.choice(1000, count, replace=False)] = rng.standard_normal(count) * 9
    uniform = jax.random.uniform(jax.random.key(0), (4000,))
    uniform = uniform.at[:20].set(0.0).at[20:40].set(np.nextafter(np.float32(1), np.float32(0)))
    tokens = np.asarray(jax.jit(draw)(jnp.asarray(logits), uniform))
    assert np.isfinite(logits[np.arange(4000), tokens]).all()
    weights = jnp.array([[0.0, 2.0, 0.0, 1.0, 0.0]])
    for target, index in ((0.0, 1), (1.999, 1), (2.0, 3), (2.999, 3), (3.0, 3), (99.0, 3)):
        assert int(_invert(weights, jnp.array([target]))[0][0]) == index, target


def tokens_of(model, labels, first=0, cfg_scale=2.0, k=0, guided=True, seed=3):
    labels = jnp.asarray(labels, jnp.int32)
    index = first + jnp.arange(len(labels))
    sampling = SamplingConfig(cfg_scale, top_k=k)
    return np.asarray(
        generate_tokens(
            prepare_decoder(model.aim_params, model.aim_config),
            labels,
            seed,
            index,
            sampling,
            guided=guided,
        )
    )


def test_an_image_depends_on_its_seed_and_index_only(tiny_model):
    labels = [0, 1, 2, 1]
    together = tokens_of(tiny_model, labels)
    alone = [tokens_of(tiny_model, labels[i : i + 1], first=i)[0] for i in range(4)]
    np.testing.assert_array_equal(together, alone)
    assert (together != tokens_of(tiny_model, labels, seed=4)).any()
    assert (together != tokens_of(tiny_model, labels, first=4)).any()


def test_guidance_one_is_the_conditional_model(tiny_model):
    labels = [0, 1, 2, 1]
    guided = tokens_of(tiny_model, labels, cfg_scale=1.0)
    np.testing.assert_array_equal(guided, tokens_of(tiny_model, labels, guided=False))


def test_guidance_schedules():
    at = lambda *a, **k: [float(guidance_at(i, 4, 5.0, *a, **k)) for i in range(4)]  # noqa: E731
    assert at() == [5, 5, 5, 5]
    assert at("linear") == [2, 3, 4, 5]
    np.testing.assert_allclose(at("cosine"), 1 + 4 * (1 - np.cos(np.pi * np.arange(1, 5) / 4)) / 2)
    assert at("constant", (0.25, 0.75)) == [1, 5, 5, 1]
    assert at("linear", (0.5, 1.0)) == [1, 1, 4, 5]
    per_image = guidance_at(1, 4, jnp.array([1.0, 3.0]), "linear")
    np.testing.assert_allclose(per_image, [1.0, 2.0])


def test_guidance_acts_where_its_interval_says(tiny_model):
    """Tokens before the interval are those of the conditional model, and those in it are not."""

    def tokens(**options):
        scale = jnp.array([9.0, 1.0, 9.0, 9.0])
        return np.asarray(generate(tiny_model, [0, 1, 2, 1], 3, cfg_scale=scale, **options).tokens)

    free = tokens_of(tiny_model, [0, 1, 2, 1], guided=False)
    late = tokens(cfg_interval=(0.5, 1.0))
    np.testing.assert_array_equal(late[:, :2], free[:, :2])
    np.testing.assert_array_equal(late[1], free[1])  # the image with a scale of 1
    assert (late[[0, 2, 3], 2:] != free[[0, 2, 3], 2:]).any()
    assert (tokens() != late).any() and (tokens(cfg_schedule="cosine") != tokens()).any()


def test_the_draw_at_the_edge_of_a_block_is_no_filtered_token():
    """Rounding can leave less than nothing of the target for the block that was chosen."""
    rng, rows, vocab = np.random.default_rng(0), 20_000, 1024
    kept = rng.random((rows, vocab)) < 0.1
    logits = np.where(kept, rng.normal(size=(rows, vocab)), -np.inf).astype(np.float32)
    ends = np.cumsum(np.exp(logits).reshape(rows, 32, 32).sum(-1), axis=-1)
    edge = ends[np.arange(rows), rng.integers(0, 31, rows)] / ends[:, -1]
    uniform = (np.round(edge * 2**23) + rng.integers(-1, 2, rows)) / 2**23
    tokens = draw(jnp.asarray(logits), jnp.asarray(uniform, jnp.float32))
    assert np.all(kept[np.arange(rows), tokens])


def test_a_prefix_is_completed_as_the_whole_image_was_drawn(tiny_model):
    """Randomness belongs to positions, so the same seed goes on with the same tokens."""
    labels = [0, 1, 2, 1]
    whole = np.asarray(generate(tiny_model, labels, 3).tokens)
    for length in (1, 2, 3):
        again = generate(tiny_model, labels, 3, prefix=whole[:, :length])
        np.testing.assert_array_equal(again.tokens, whole)
    other = (whole[:, :2] + 1) % 16
    changed = np.asarray(generate(tiny_model, labels, 3, prefix=other).tokens)
    np.testing.assert_array_equal(changed[:, :2], other)
    assert (changed[:, 2:] != whole[:, 2:]).any()
    for prefix in (whole, whole[:2, :1], whole[:, :0], whole[:, :1] / 2):
        with pytest.raises(ValueError, match=r"prefix: expected integer tokens of shape"):
            generate(tiny_model, labels, prefix=prefix)
    with pytest.raises(ValueError, match=r"prefix: expected tokens in 0\.\.15"):
        generate(tiny_model, labels, prefix=whole[:, :1] + 16)

    images = np.asarray(generate(tiny_model, labels, 3).images) / 127.5 - 1
    rows = encode_rows(tiny_model, images, 1)
    assert rows.shape == (4, 2) and rows.dtype == np.int32
    with pytest.raises(ValueError, match="rows=2: expected 1 to 1 of 2"):
        encode_rows(tiny_model, images, 2)


def test_greedy_tokens_are_the_argmax_of_the_full_forward(tiny_model):
    labels = jnp.array([0, 1, 2, 1])
    tokens = tokens_of(tiny_model, labels, k=1, guided=False)
    logits = AiM(tiny_model.aim_config).apply({"params": tiny_model.aim_params}, tokens, labels)
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))


def test_generate_returns_pictures_and_is_deterministic(tiny_model):
    samples = generate(tiny_model, [0, 1, 2, 1], seed=3)
    assert samples.images.shape == (4, 4, 4, 1) and samples.images.dtype == jnp.uint8
    np.testing.assert_array_equal(samples.tokens, tokens_of(tiny_model, [0, 1, 2, 1]))
    assert len({image.tobytes() for image in np.asarray(samples.images)}) > 1


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ([0, 4], {}, r"labels: \[4\] out of range"),
        ([-1], {}, "out of range"),
        ([], {}, "non-empty"),
        ([0.5], {}, "class ids"),
        ([0], {"seed": 2**31}, "seed=2147483648: expected"),
        ([0], {"seed": -1}, "seed=-1"),
        ([0], {"top_p": 0.0}, r"top_p=0.0: expected in \(0, 1\]"),
        ([0], {"top_p": 1.5}, "top_p"),
        ([0], {"top_k": -1}, "top_k"),
        ([0], {"temperature": 0.0}, "temperature"),
        ([0], {"cfg_scale": float("nan")}, "cfg_scale"),
        ([0], {"cfg_scale": [1.0, 2.0]}, "one per label"),
        ([0], {"cfg_schedule": "square"}, "cfg_schedule='square': expected one of"),
        ([0], {"cfg_interval": (0.5, 0.5)}, r"cfg_interval=\(0.5, 0.5\): expected two fractions"),
        ([0], {"cfg_interval": (0.5, 1.5)}, "start < end"),
        ([0], {"cfg_interval": 0.5}, "cfg_interval=0.5: expected two fractions"),
        ([0], {"seed": 1.5}, r"seed=1\.5: expected an integer"),
        ([0], {"seed": True}, "seed=True"),
        ([0], {"first_index": -1}, "first_index=-1"),
        ([0], {"every": 0}, "every=0"),
        ([0], {"top_k": float("inf")}, "top_k=inf"),
        ([0], {"implementation": "cuda"}, r"implementation='cuda'; expected one of None, xla"),
        ([0], {"form": "square"}, r"form='square'; expected one of None, recurrent"),
        ([0], {"min_p": 1.5}, r"min_p=1.5: expected in \[0, 1\]"),
        ([0], {"cfg_scale": 1e39}, "cfg_scale=1e\\+39: expected a finite number"),
        ([0], {"temperature": 1e-46}, "temperature=1e-46: expected a positive number"),
        (["castle"], {}, "unknown class 'castle'; tiny has the classes boat, house, old tree"),
    ],
)
def test_settings_out_of_range_are_refused(tiny_model, labels, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model, labels, **settings)


def test_classes_go_by_name_and_seeds_by_any_integer(tiny_model):
    expected = generate(tiny_model, [1, 2], seed=3).tokens
    for seed in (3, np.int64(3), jnp.asarray(3)):
        found = generate(tiny_model, ["house", "old tree"], seed=seed).tokens
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(
        ValueError, match=r"Pretrained from aim_jax\.load_pretrained, or .* got str"
    ):
        generate("cifar10", [0])


def test_a_configuration_and_keywords_mean_the_same(tiny_model):
    labels = [0, 1, 2, 1]
    config = SamplingConfig(cfg_scale=3.0, temperature=0.7, top_k=9, top_p=0.9, min_p=0.01)
    expected = generate(tiny_model, labels, 5, config).tokens
    by_name = generate(
        tiny_model, labels, 5, cfg_scale=3.0, temperature=0.7, top_k=9, top_p=0.9, min_p=0.01
    )
    np.testing.assert_array_equal(by_name.tokens, expected)
    # Keywords take the place of single fields, and None leaves them.
    other = dataclasses.replace(config, temperature=1.5)
    mixed = generate(tiny_model, labels, 5, other, temperature=0.7, top_k=None)
    np.testing.assert_array_equal(mixed.tokens, expected)
    own = dataclasses.replace(tiny_model, sampling=config.numbers())
    np.testing.assert_array_equal(generate(own, labels, 5).tokens, expected)
    with pytest.raises(TypeError, match="top_q: unknown sampling setting; expected cfg_scale, "):
        generate(tiny_model, labels, top_q=0.5)
    with pytest.raises(TypeError, match="config: expected a SamplingConfig, got dict"):
        generate(tiny_model, labels, 0, {"top_p": 0.5})


def test_a_configuration_checks_itself_and_is_a_plain_value():
    config = SamplingConfig(np.float32(3), top_k=np.int64(4), top_p=jnp.float32(1))
    assert config == SamplingConfig(3.0, top_k=4) and hash(config) == hash(
        SamplingConfig(3.0, top_k=4)
    )
    assert type(config.top_k) is int and type(config.cfg_scale) is float
    assert json.loads(json.dumps(config.numbers())) == config.numbers()
    per_image = SamplingConfig(np.array([1.0, 3.0]))
    assert per_image.cfg_scale == (1.0, 3.0) and per_image.guided
    assert not SamplingConfig(1.0).guided
    arrays = per_image.arrays(2)
    assert set(arrays) == set(SETTINGS) and arrays["top_k"].dtype == np.int32
    np.testing.assert_array_equal(arrays["cfg_scale"], np.float32([1, 3]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3
    for wrong in ("3", None, [[1.0]], [], [1.0, [2.0]], True, 1j):
        with pytest.raises(TypeError, match=r"temperature=.*: expected a positive number"):
            SamplingConfig(temperature=wrong)


def test_seeds_are_integers_or_keys_of_a_named_generator(tiny_model):
    labels = [0, 1, 2, 1]
    expected = generate(tiny_model, labels, 5).tokens
    key = jax.random.key(5, impl="threefry2x32")
    np.testing.assert_array_equal(generate(tiny_model, labels, key).tokens, expected)
    other = jax.random.key(5, impl="rbg")
    assert (np.asarray(generate(tiny_model, labels, other).tokens) != expected).any()
    with jax.default_prng_impl("rbg"):  # another default changes no image
        np.testing.assert_array_equal(generate(tiny_model, labels, 5).tokens, expected)
    with pytest.raises(ValueError, match=r"(?s)seed=.*: expected an integer"):
        generate(tiny_model, labels, jax.random.split(key, 2))


@contextlib.contextmanager
def one_loop():
    """Fail if the token loop is traced twice."""
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(token_loop._sample_tokens, n=1)
    loop = jax.jit(traced, static_argnames=("guided", "tokens"), donate_argnames="loop")
    with mock.patch("aim_jax.sampling.token_loop._advance_traced", loop):
        yield
    assert loop._cache_size() == 1


def test_one_program_serves_all_requests_of_a_size(tiny_model):
    """Seeds, labels, settings, schedules, prefixes and callbacks, and 3 as well as 4 images."""
    with one_loop():
        for seed, settings in enumerate(
            (
                {},
                {"cfg_scale": 3.0},
                {"temperature": 0.5},
                {"top_k": 3},
                {"top_p": 0.5, "min_p": 0.1},
                {"cfg_schedule": "cosine", "cfg_interval": (0.1, 0.9)},
            )
        ):
            expected = generate(tiny_model, [seed % 3, 1, 2], seed, **settings).tokens
        labels = [5 % 3, 1, 2, 0]
        np.testing.assert_array_equal(
            generate(tiny_model, labels, 5, **settings).tokens[:3], expected
        )
        for length in (1, 3):
            prefix = np.asarray(expected)[:, :length]
            completed = generate(tiny_model, labels[:3], 5, prefix=prefix, **settings).tokens
            np.testing.assert_array_equal(completed, expected)
        seen = []
        watched = generate(tiny_model, labels, 5, callback=seen.append, every=3, **settings).tokens
        np.testing.assert_array_equal(watched[:3], expected)
        assert [samples.tokens.shape for samples in seen] == [(4, 3), (4, 4)]


def test_batches_are_padded_to_few_sizes():
    sizes = sorted({padded_count(count) for count in range(1, 65)})
    assert sizes == [1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64]
    assert all(0.8 * padded_count(count) <= count for count in range(4, 10_000))
    assert all(padded_count(size) == size for size in sizes)
    rows = pad_rows({"a": np.arange(3), "b": np.ones((3, 2))}, 5)
    np.testing.assert_array_equal(rows["a"], [0, 1, 2, 0, 0])
    assert rows["b"].shape == (5, 2)


def test_a_prepared_model_generates_the_same_without_the_parameters(tiny_model):
    prepared = prepare(tiny_model, "xla")
    assert prepared.model.aim_params is None
    for options in ({}, {"form": "dual"}):
        expected = generate(tiny_model, ["boat", "house"], 3, implementation="xla", **options)
        actual = prepared.generate(["boat", "house"], 3, **options)
        np.testing.assert_array_equal(actual.tokens, expected.tokens)
        np.testing.assert_array_equal(actual.images, expected.images)
    with pytest.raises(ValueError, match=r"prepared for 'xla'; pass it to aim_jax\.prepare"):
        prepared.generate([0], implementation="native")
    with pytest.raises(ValueError, match="requires an AiM and a tokenizer"):
        prepare(dataclasses.replace(tiny_model, vq_config=None, vq_params=None))


def test_weights_are_laid_out_once_per_model(tiny_model):
    """And again for other parameters, also if they replace those of the same model."""
    model = dataclasses.replace(tiny_model, aim_params=dict(tiny_model.aim_params))
    assert model.prepared == {}
    first = generate(model, [0, 1], 3).tokens
    ((_, prepared),) = model.prepared.values()
    generate(model, [2], 4, form="recurrent")
    assert [known for _, known in model.prepared.values()] == [prepared]
    model.aim_params["token_embedding"] = {
        "embedding": -model.aim_params["token_embedding"]["embedding"]
    }
    changed = generate(model, [0, 1], 3).tokens
    assert (np.asarray(changed) != np.asarray(first)).any()
    np.testing.assert_array_equal(
        changed, generate(dataclasses.replace(model, name="copy"), [0, 1], 3).tokens
    )


def test_compiled_programs_are_kept_in_one_call(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        keep_compiled_programs()  # a directory that is set stays
        assert jax.config.jax_compilation_cache_dir == before
        jax.config.update("jax_compilation_cache_dir", None)
        keep_compiled_programs()
        kept = tmp_path / "aim_jax" / "compiled"
        assert jax.config.jax_compilation_cache_dir == str(kept) and kept.is_dir()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.mark.parametrize("callback", [None, print])
def test_logits_that_are_not_finite_are_refused(tiny_model, callback):
    params = dict(tiny_model.aim_params)
    scale = params["norm_f"]["scale"]
    for value in (jnp.nan, jnp.inf):
        params["norm_f"] = {"scale": scale.at[0].set(value)}
        broken = dataclasses.replace(tiny_model, aim_params=params)
        with pytest.raises(NonFiniteError, match="infinite or not a number, from which no token"):
            generate(broken, [0, 1], callback=callback)


def test_to_uint8_clips_and_rounds():
    values = to_uint8(jnp.array([-2.0, -1.0, 0.0, 1.0, 3.0, 1.6 / 127.5 - 1]))
    np.testing.assert_array_equal(values, [0, 0, 128, 255, 255, 2])
