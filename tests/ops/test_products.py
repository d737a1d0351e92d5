"""Precision, sums and gradients of matrix products, in the ops and in whole models."""

import dataclasses

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from aim_jax import ops
from aim_jax.models import AiM, AiMConfig, VQConfig, VQModel
from aim_jax.models.aim import init_params
from aim_jax.ops.products import precision_of, product, round_cotangent
from benchmarks import ssd_accuracy

SMALL = AiMConfig(
    vocab_size=32, num_classes=3, d_model=16, n_layer=2, d_state=8, headdim=8, num_tokens=40,
    chunk_size=40,
)  # fmt: skip
PRODUCTS = ("dot_general", "conv_general_dilated")


def equations(jaxpr):
    """Yield the equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def products(function, *arguments):
    """Return (dtypes of the operands, dtype of the result, precision) of all products."""
    return [
        ({str(x.aval.dtype) for x in e.invars}, str(e.outvars[0].aval.dtype), e.params["precision"])
        for e in equations(jax.make_jaxpr(function)(*arguments).jaxpr)
        if e.primitive.name in PRODUCTS
    ]


def aim_gradient(config):
    """Return the gradient of a loss of AiM, and abstract arguments."""
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    codes = jax.ShapeDtypeStruct((2, config.num_tokens), jnp.int32)
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)

    def loss(params, codes, labels):
        apply = AiM(config).apply
        return apply({"params": params}, codes, labels, method="cross_entropy").mean()

    return jax.grad(loss), params, codes, labels


def tokenizer_gradient(dtype):
    """Return the gradient of reconstructions of a tokenizer, and abstract arguments."""
    config = VQConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, n_embed=16,
                      compute_dtype=dtype)  # fmt: skip
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    params = jax.eval_shape(VQModel(config).init, jax.random.key(0), images)
    return jax.grad(lambda params, x: VQModel(config).apply(params, x)[0].sum()), params, images


@pytest.mark.parametrize(
    "case",
    [
        lambda: aim_gradient(SMALL),
        lambda: aim_gradient(dataclasses.replace(SMALL, mixer="mamba1", remat="dots")),
        lambda: tokenizer_gradient("float32"),
    ],
    ids=["mamba2", "mamba1", "tokenizer"],
)
def test_float32_is_multiplied_as_float32_on_every_device(case):
    """Forwards and backwards; a user's default overrules it."""
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    found = products(*case())
    assert len(found) > 10
    assert all(precision == highest for _, _, precision in found), found
    with jax.default_matmul_precision("bfloat16"):
        chosen = {precision for _, _, precision in products(*case())}
    assert (jax.lax.Precision.DEFAULT,) * 2 in chosen


def test_bfloat16_models_multiply_bfloat16():
    """All products of blocks and head, forwards and backwards, but for sums of decays and adaLN."""
    config = dataclasses.replace(SMALL, compute_dtype="bfloat16", remat="dots", d_model=32)
    found = products(*aim_gradient(config))
    operands = [kinds for kinds, _, _ in found]
    # Float32: two sums of decays and the weights of scores, forwards, again and backwards (the
    # weights have two gradients), and the products of two adaLN.
    assert operands.count({"float32"}) == 3 + 3 + 4 + 2 * 3
    assert operands.count({"bfloat16"}) == len(operands) - 16 > 30


def test_layers_carry_no_masks():
    """The loop over the layers holds no mask in the shape of decays or scores."""
    gradient, *arguments = aim_gradient(dataclasses.replace(SMALL, remat="dots"))
    loops = [
        e for e in equations(jax.make_jaxpr(gradient)(*arguments).jaxpr)
        if e.primitive.name == "scan" and e.params["length"] == SMALL.n_layer
    ]  # fmt: skip
    assert len(loops) == 2
    masks = [x.aval for e in loops for x in (*e.invars, *e.outvars) if x.aval.dtype == bool]
    assert not masks


def test_product_and_its_gradients_against_float32():
    keys = jax.random.split(jax.random.key(0), 3)
    a, b, g = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, ((3, 5, 40), (3, 7, 40), (3, 5, 7)), strict=True)
    )
    y, backward = jax.vjp(lambda a, b: product("mtk,msk->mts", a, b), a, b)
    wide = [x.astype(jnp.float32) for x in (a, b, g)]
    expected, exact_backward = jax.vjp(lambda a, b: product("mtk,msk->mts", a, b), *wide[:2])
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for found, exact in zip(backward(wide[2]), exact_backward(wide[2]), strict=True):
        assert found.dtype == jnp.bfloat16  # the cotangent is a bfloat16 number here: one rounding
        np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8, atol=1e-5)
    mixed = product("mtk,msk->mts", a, wide[1])
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-5)
    assert precision_of("bfloat16") is None and precision_of("float64") is not None


def test_the_head_in_bfloat16_costs_gradients_one_more_rounding():
    """Worst elements within two units of roundoff of bfloat16; the loss keeps float32's digits."""
    errors = ssd_accuracy.head_errors(3, rows=64, d=32, v=128)
    for method, by_name in errors.items():
        assert np.median(by_name["nats"]) < 1e-6, method
        for name in ("d_x", "d_table"):
            assert np.median(by_name[name]) <= 2 * 2**-9 * (1 + (method == "rounded")), (
                method,
                name,
            )


def test_a_model_in_bfloat16_keeps_loss_and_gradient():
    """Loss within 0.01 %, gradient within 1 %, of float32."""
    sizes = dict(d_model=64, n_layer=2, num_tokens=64, vocab_size=256, d_state=16, headdim=16)
    errors = ssd_accuracy.model_errors(**sizes)
    assert errors["loss"] < 1e-4 and 1e-5 < errors["gradient"] < 0.01


def test_float32_head_is_exact():
    """The cotangent of float32 logits is not rounded."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 8))
    table = jax.random.normal(jax.random.key(1), (16, 8))
    labels = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)

    def plain(x, table):
        return ops.cross_entropy(jnp.einsum("bld,vd->blv", x, table), labels).sum()

    def ours(x, table):
        return ops.linear_cross_entropy(x, table, labels).sum()

    for found, expected in zip(
        *(jax.grad(f, (0, 1))(x, table) for f in (ours, plain)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_cotangents_are_rounded_only_where_the_dtype_is_narrow():
    x = jnp.full((3,), 1 + 2.0**-12)
    assert (jax.grad(lambda x: (round_cotangent(x, "float32") * x).sum())(x) == 2 * x).all()
    found = jax.grad(lambda y: (round_cotangent(y, jnp.bfloat16) * x).sum())(x)
    assert (found == 1).all() and found.dtype == jnp.float32
