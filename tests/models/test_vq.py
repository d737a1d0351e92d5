"""The tokenizer: shapes, tokens, gradients through the quantizer, usage, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_jax.models import VQConfig, VQModel
from aim_jax.models.codebook import (
    VectorQuantizer,
    codebook_usage,
    entropy_loss,
    unit,
    update_history,
)
from aim_jax.models.vq import DoublingConv, init_params
from tests.conftest import TINY_VQ


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_f16_has_the_exact_parameter_count():
    params = jax.eval_shape(lambda: init_params(VQConfig(), jax.random.key(0)))
    assert count(params) == 71_883_403


def test_first_parameters_are_those_of_flax_in_distribution():
    params, again = (init_params(TINY_VQ, jax.random.key(0)) for _ in range(2))
    side = TINY_VQ.downsampling
    images = jnp.zeros((1, side, side, TINY_VQ.in_channels))
    flax = jax.eval_shape(VQModel(TINY_VQ).init, jax.random.key(0), images)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, flax)
    kernels = {}
    for (path, x), y in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(x, y)
        if path[-1].key == "kernel":
            kernels[path] = x * np.sqrt(np.prod(x.shape[:-1]))
        elif path[-1].key in ("scale", "bias"):
            assert np.all(x == (path[-1].key == "scale"))
    values = np.concatenate([np.ravel(x) for x in kernels.values()])
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    assert 2.2 < np.abs(values).max() < 2.28  # two standard deviations before the truncation
    assert len({float(x.ravel()[0]) for x in kernels.values()}) == len(kernels)


@pytest.mark.parametrize(
    ("mult", "factor"), [((1, 1, 1), 4), ((1, 2, 2, 4), 8), ((1, 1, 2, 2, 4), 16)]
)
def test_any_downsampling_factor(mult, factor):
    config = VQConfig(ch=32, ch_mult=mult, num_res_blocks=1, z_channels=16, n_embed=32)
    assert config.downsampling == factor
    images = jax.ShapeDtypeStruct((2, 2 * factor, 3 * factor, 3), jnp.float32)

    def forward(images):
        model, params = VQModel(config), init_params(config, jax.random.key(0))
        recon, quantized = model.apply({"params": params}, images)
        decoded = model.apply({"params": params}, quantized.indices, (2, 3), method="decode_tokens")
        return recon, decoded, quantized

    recon, decoded, quantized = jax.eval_shape(forward, images)
    assert recon.shape == decoded.shape == images.shape
    assert quantized.indices.shape == (2, 6) and quantized.quant.shape == (2, 2, 3, 8)


@pytest.fixture(scope="module")
def forward(tiny_model):
    images = jax.random.uniform(jax.random.key(3), (3, 4, 4, 1), minval=-1)
    variables = {"params": tiny_model.vq_params}

    @jax.jit
    def run(images):
        model = VQModel(TINY_VQ)
        recon, quantized = model.apply(variables, images)
        tokens = model.apply(variables, images, method="encode_to_tokens")
        decoded = model.apply(variables, tokens, method="decode_tokens")
        return recon, quantized, tokens, decoded

    return images, *run(images)


def test_decoding_the_tokens_is_the_reconstruction(forward):
    _, recon, quantized, tokens, decoded = forward
    np.testing.assert_array_equal(tokens, quantized.indices)
    np.testing.assert_allclose(decoded, recon, atol=1e-5)
    assert tokens.dtype == jnp.int32 and tokens.shape == (3, 4)


def test_bfloat16_convolutions_stay_close(tiny_model, forward):
    _, recon, _, tokens, _ = forward
    config = VQConfig(**{**vars(TINY_VQ), "compute_dtype": "bfloat16"})
    decoded = jax.jit(
        lambda t: VQModel(config).apply({"params": tiny_model.vq_params}, t, method="decode_tokens")
    )(tokens)
    assert decoded.dtype == jnp.float32
    assert 0 < jnp.abs(decoded - recon).max() < 0.1 * jnp.abs(recon).max()


def test_quantizer_takes_the_nearest_entry_and_passes_gradients_straight():
    config = VQConfig(embed_dim=4, n_embed=16)
    quantizer = VectorQuantizer(config)
    z = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
    params = quantizer.init(jax.random.key(1), z)
    out = quantizer.apply(params, z)
    codebook = unit(params["params"]["embedding"])
    distances = jnp.sum((unit(z)[..., None, :] - codebook) ** 2, axis=-1)
    np.testing.assert_array_equal(out.indices, distances.argmin(axis=-1).reshape(2, 9))
    np.testing.assert_allclose(out.quant, codebook[distances.argmin(axis=-1)], atol=1e-6)
    np.testing.assert_allclose(out.commit_loss, 0.25 * out.vq_loss, rtol=1e-6)

    cotangent = jax.random.normal(jax.random.key(2), z.shape)
    through = jax.grad(lambda z: jnp.sum(quantizer.apply(params, z).quant * cotangent))(z)
    straight = jax.grad(lambda z: jnp.sum(unit(z) * cotangent))(z)
    np.testing.assert_allclose(through, straight, atol=1e-6)


def test_codebook_and_commitment_losses_train_one_side_each():
    config = VQConfig(embed_dim=4, n_embed=16)
    quantizer = VectorQuantizer(config)
    z = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
    params = quantizer.init(jax.random.key(1), z)

    def grads(name):
        loss = lambda params, z: getattr(quantizer.apply(params, z), name)  # noqa: E731
        return [jnp.abs(jax.tree.leaves(g)[0]).max() for g in jax.grad(loss, (0, 1))(params, z)]

    to_codebook, to_z = grads("vq_loss")
    assert to_codebook > 1e-4 and to_z == 0
    to_codebook, to_z = grads("commit_loss")
    assert to_codebook == 0 and to_z > 1e-4


def test_entropy_loss_prefers_sure_and_even_codes():
    sure_and_even = 1 - jnp.eye(4)
    sure_of_one = jnp.tile(1 - jnp.eye(4)[:1], (4, 1))
    np.testing.assert_allclose(entropy_loss(sure_and_even), -np.log(4), atol=1e-3)
    np.testing.assert_allclose(entropy_loss(sure_of_one), 0, atol=1e-3)


def test_usage_counts_distinct_codes_in_the_history():
    history = jnp.zeros(8, jnp.int32)
    history = update_history(history, jnp.array([[3, 1], [3, 2]]))
    np.testing.assert_array_equal(history, [0, 0, 0, 0, 3, 1, 3, 2])
    np.testing.assert_allclose(codebook_usage(history, 16), 4 / 16)
    history = update_history(history, jnp.arange(10))
    np.testing.assert_array_equal(history, np.arange(2, 10))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 8, 8, 3), r"expected \(batch, height, width, 1\)"), ((1, 8, 9, 1), "not a multiple")],
)
def test_images_of_the_wrong_shape_are_refused(tiny_model, shape, message):
    with pytest.raises(ValueError, match=message):
        VQModel(TINY_VQ).apply({"params": tiny_model.vq_params}, jnp.zeros(shape))


def test_tokens_that_fill_no_grid_and_odd_widths_are_refused(tiny_model):
    with pytest.raises(ValueError, match="6 tokens do not fill a 2x2 grid"):
        VQModel(TINY_VQ).apply(
            {"params": tiny_model.vq_params}, jnp.zeros((1, 6), jnp.int32), method="decode_tokens"
        )
    with pytest.raises(ValueError, match="multiple of 32"):
        VQConfig(ch=48)


def test_doubling_convolution_is_repetition_and_convolution():
    """Odd sizes and borders; in float32 the sums of kernel entries are rounded first."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 6))
    conv = DoublingConv("float32")
    params = conv.init(jax.random.key(1), x)["params"]
    params["bias"] = jnp.arange(6.0)
    expected = jax.lax.conv_general_dilated(
        x.repeat(2, axis=1).repeat(2, axis=2), params["kernel"], (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ) + params["bias"]  # fmt: skip
    np.testing.assert_allclose(conv.apply({"params": params}, x), expected, atol=1e-5)
