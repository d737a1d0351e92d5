"""Trains AiM on the codes of a tokenizer.

Example:
  aim-jax train --config fashion_mnist --workdir runs/fashion_mnist

The workdir gets checkpoints, metrics.jsonl, TensorBoard events, sample grids and the
trained model with its tokenizer in model/. The same command continues an interrupted run.
"""

from absl import flags

from aim_jax.cli import common
from aim_jax.parallel import processes


def define_flags() -> None:
    common.define_config("A recipe's name or a file; see its docstring.")
    flags.DEFINE_string("workdir", None, "Directory of this run.")
    flags.DEFINE_string("data", "", "Directory with the images; short for --config.data.dir.")
    processes.define_flags()
    flags.mark_flags_as_required(["config", "workdir"])


def main() -> int:
    from aim_jax.training.aim import train

    return common.start_training(train, "aim")
