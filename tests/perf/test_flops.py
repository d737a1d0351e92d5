"""Counts of operations."""

import math

import jax
import jax.numpy as jnp
import pytest

from aim_jax.models import VQConfig
from aim_jax.models.vq import VQModel, init_params
from aim_jax.perf.flops import tokenizer_flops


def products(jaxpr) -> float:
    """Count the operations of the convolutions and matrix products of a program."""
    total = 0.0
    for equation in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in equation.invars]
        result = equation.outvars[0].aval.shape
        if equation.primitive.name == "conv_general_dilated":
            kernel = shapes[1]
            if kernel[:2] == (
                2,
                2,
            ):  # doubles the image; counted as a 3x3 convolution of the result
                height, channels = shapes[0][1], kernel[2]
                total += 2 * (3 * 2 * height * channels) ** 2
            else:
                total += 2 * math.prod(result) * math.prod(kernel[:3])
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * math.prod(result) * math.prod(shapes[0][axis] for axis in contracted)
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)
            total += products(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize(("mult", "blocks"), [((1, 2), 1), ((1, 1, 4), 2)])
def test_tokenizer_has_the_operations_of_its_program(mult, blocks):
    config = VQConfig(ch=32, ch_mult=mult, num_res_blocks=blocks, z_channels=32, n_embed=16)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    apply = lambda params, images: VQModel(config).apply({"params": params}, images)[0]  # noqa: E731
    counted = products(jax.make_jaxpr(apply)(params, images).jaxpr)
    # The quantizer is not counted.
    assert 0.99 * counted < tokenizer_flops(config, 32) <= counted
