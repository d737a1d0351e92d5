"""The state that a training run carries from step to step."""

from typing import TYPE_CHECKING, Any

import chex
import jax
import numpy as np
from flax.struct import dataclass

from aim_jax.utils.random import GENERATOR


@dataclass
class Discriminator:
    """The tokenizer's adversary, which is trained beside it.

    Attributes:
      params: float32 parameters.
      opt_state: state of its own optimizer.
    """

    params: Any
    opt_state: Any


@dataclass
class TrainState:
    """Everything that a run carries from step to step.

    Attributes:
      step: () int32, optimizer steps done.
      params: float32 parameters.
      opt_state: state of the optimizer.
      ema: averaged parameters, or None.
      rng: (2,) uint32, data of the key from which the randomness of every step is folded.
      history: (65536,) int32 codes seen last (tokenizer), or None.
      discriminator: parameters and optimizer state of the tokenizer's adversary, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    rng: jax.Array
    history: jax.Array | None = None
    discriminator: Discriminator | None = None

    if TYPE_CHECKING:  # flax.struct.dataclass adds it, which type checkers do not see

        def replace(self, **changes: Any) -> "TrainState": ...

    def with_params(self, params: Any) -> "TrainState":
        """The state with other parameters, given as host arrays, and with the averages of those."""

        def place(old: jax.Array, new: np.ndarray) -> jax.Array:
            new = np.asarray(new, old.dtype)  # of which every process has the whole
            return jax.make_array_from_callback(old.shape, old.sharding, lambda at: new[at])

        # `place` reads by index: a larger array would be cut without a word.
        chex.assert_trees_all_equal_shapes(self.params, params)
        placed = jax.tree.map(place, self.params, params)
        ema = None if self.ema is None else jax.tree.map(place, self.ema, params)
        return self.replace(params=placed, ema=ema)

    def step_key(self) -> jax.Array:
        """The key of the randomness of the next step."""
        key = jax.random.wrap_key_data(self.rng, impl=GENERATOR)
        return jax.random.fold_in(key, self.step)

    @property
    def eval_params(self) -> Any:
        """Parameters to evaluate, sample with and export: the averaged ones if there are any."""
        return self.params if self.ema is None else self.ema
