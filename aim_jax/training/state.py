"""The state that a training run carries from step to step."""

from typing import Any

import chex
import flax.struct
import jax
import numpy as np


@flax.struct.dataclass
class Discriminator:
    """The tokenizer's adversary, which is trained beside it.

    Attributes:
      params: float32 parameters.
      opt_state: state of its own optimizer.
    """

    params: Any
    opt_state: Any


@flax.struct.dataclass
class TrainState:
    """Everything that a run carries from step to step.

    Attributes:
      step: () int32, optimizer steps done.
      params: float32 parameters.
      opt_state: state of the optimizer.
      ema: averaged parameters, or None.
      rng: key from which the randomness of every step is folded.
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

    def with_params(self, params) -> "TrainState":
        """The state with other parameters, given as host arrays, and with the averages of those."""

        def place(old, new):
            new = np.asarray(new, old.dtype)  # of which every process has the whole
            return jax.make_array_from_callback(old.shape, old.sharding, lambda at: new[at])

        # `place` reads by index: a larger array would be cut without a word.
        chex.assert_trees_all_equal_shapes(self.params, params)
        placed = jax.tree.map(place, self.params, params)
        ema = None if self.ema is None else jax.tree.map(place, self.ema, params)
        return self.replace(params=placed, ema=ema)

    @property
    def eval_params(self):
        """Parameters to evaluate, sample with and export: the averaged ones if there are any."""
        return self.params if self.ema is None else self.ema
