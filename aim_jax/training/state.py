"""State that a training run carries from step to step."""

from typing import TYPE_CHECKING, Any

import chex
import jax
import numpy as np
from flax.struct import dataclass

from aim_jax.parallel.sharding import from_host
from aim_jax.utils.random import GENERATOR


@dataclass
class Discriminator:
    """Discriminator of the tokenizer, which is trained beside it.

    Attributes:
      params: float32 parameters.
      opt_state: State of its own optimizer.
    """

    params: Any
    opt_state: Any


@dataclass
class TrainState:
    """State that a training run carries from step to step.

    Attributes:
      step: () int32, optimizer steps done.
      params: float32 parameters.
      opt_state: State of the optimizer.
      ema: Averaged parameters, or None.
      rng: (2,) uint32, data of the key that the keys of all steps are folded from.
      history: (65536,) int32, the most recent tokens (tokenizer training), or None.
      discriminator: Parameters and optimizer state of the discriminator, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    rng: jax.Array
    history: jax.Array | None = None
    discriminator: Discriminator | None = None

    if TYPE_CHECKING:  # added by flax.struct.dataclass, which type checkers do not see

        def replace(self, **changes: Any) -> "TrainState":
            """Return the state with some fields replaced."""
            ...

    def with_params(self, params: Any) -> "TrainState":
        """Return the state with new parameters, given as host arrays, and their averages reset."""

        def to_device(old: jax.Array, new: np.ndarray) -> jax.Array:
            return from_host(np.asarray(new, old.dtype), old.sharding)

        # `to_device` reads by index, so a larger array would be cropped silently.
        chex.assert_trees_all_equal_shapes(self.params, params)
        device_params = jax.tree.map(to_device, self.params, params)
        ema = None if self.ema is None else jax.tree.map(to_device, self.ema, params)
        return self.replace(params=device_params, ema=ema)

    def step_key(self) -> jax.Array:
        """Return the random key of the next step."""
        key = jax.random.wrap_key_data(self.rng, impl=GENERATOR)
        return jax.random.fold_in(key, self.step)

    @property
    def eval_params(self) -> Any:
        """Parameters to evaluate, sample and export: the averaged ones if there are any."""
        return self.params if self.ema is None else self.ema
