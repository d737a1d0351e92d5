"""Low-rank adapters of the projections of AiM (LoRA, arXiv 2106.09685, section 4.1).

A projection W of a trained model is kept, and W + scale * a @ b takes its place, where a has `rank`
columns and b as many rows; only a and b are trained. b starts at zero, so training starts with the
model as it is. The embedding of classes, if there is one, is trained whole: it is small, and other
classes need other rows. Adapters change parameters and no module, so every implementation of the
ops computes with them and differentiates through them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from aim_jax.models.aim import init_params
from aim_jax.models.config import AiMConfig
from aim_jax.utils.checks import NOT_NEGATIVE, check_fields, check_integer, check_number

# Projections of a layer that get an adapter.
ADAPTED = ("x_proj", "z_proj", "B_proj", "C_proj", "out_proj", "fc1", "fc2", "gate")
WHOLE = "class_embedding"  # trained without a low rank


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Adapters of a model.

    Attributes:
      rank: Columns of a and rows of b; 0 for no adapters.
      alpha: The product a @ b is scaled by alpha / rank; 0 stands for twice the rank.
    """

    rank: int = 0
    alpha: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_integer("lora.rank", self.rank)
        check_number("lora.alpha", self.alpha, NOT_NEGATIVE)

    @property
    def scale(self) -> float:
        """Factor of the product a @ b."""
        return (self.alpha or 2 * self.rank) / self.rank


def init_adapters(config: AiMConfig, lora: LoRA, key: jax.Array) -> dict:
    """Initialize the adapters of a model, float32, boxed with the logical axes of its projections.

    a is normal with variance 1 / fan-in, b is zero.

    Args:
      config: The model.
      lora: Its adapters.
      key: Random key.

    Returns:
      {"layers": {...: {"a": (n, i, rank), "b": (n, rank, o)}}} for projections (n, i, o) of n
      layers, and the table of classes under its own name.
    """
    params = jax.eval_shape(lambda: init_params(config, key))
    adapters: dict[tuple, Any] = {}
    for number, (path, kernel) in enumerate(sorted(_projections(params).items())):
        layers, inputs, outputs = kernel.value.shape
        of_layer, of_inputs, of_outputs = kernel.names
        a = jax.random.normal(jax.random.fold_in(key, number), (layers, inputs, lora.rank))
        b = jnp.zeros((layers, lora.rank, outputs), jnp.float32)
        names_a, names_b = (of_layer, of_inputs, None), (of_layer, None, of_outputs)
        adapters[*path, "a"] = nn.LogicallyPartitioned(a * inputs**-0.5, names_a)
        adapters[*path, "b"] = nn.LogicallyPartitioned(b, names_b)
    tree = unflatten_dict(adapters)
    if WHOLE in params:
        tree[WHOLE] = init_params(config, key)[WHOLE]
    return tree


def merge(params: dict, adapters: dict, scale: float) -> dict:
    """Return parameters with their adapters: W + scale * a @ b in float32, cast to W's dtype.

    Args:
      params: Parameters of a model.
      adapters: Adapters of the same model; see `init_adapters`.
      scale: Factor of the products.
    """
    flat = flatten_dict(params)
    for path, kernel in _projections(params).items():
        pair = adapters
        for name in path:
            pair = pair[name]
        low_rank = jnp.matmul(pair["a"], pair["b"], precision="highest")
        adapted = jnp.asarray(kernel, jnp.float32) + scale * low_rank
        flat[*path, "kernel"] = adapted.astype(kernel.dtype)
    merged = unflatten_dict(flat)
    return merged | {WHOLE: adapters[WHOLE]} if WHOLE in adapters else merged


def adapter_shapes(config: AiMConfig, lora: LoRA) -> dict:
    """Return shapes and dtypes of the adapters of a model, without logical axes."""
    return jax.eval_shape(lambda: nn.unbox(init_adapters(config, lora, jax.random.key(0))))


def _projections(params: dict) -> dict[tuple, Any]:
    """Return the kernels of the projections, by the path of their module."""
    flat = flatten_dict(params)
    return {
        path[:-1]: kernel
        for path, kernel in flat.items()
        if path[0] == "layers" and path[-1] == "kernel" and path[-2] in ADAPTED
    }
