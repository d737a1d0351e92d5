"""Train AiM on the tokens of a tokenizer.

Example:
  aim-jax train --config fashion_mnist --workdir runs/fashion_mnist

The run writes to the workdir: checkpoints, metrics.jsonl, TensorBoard events, sample grids, and the
trained model with its tokenizer in model/. The same command resumes an interrupted run.
"""

from absl import flags

from aim_jax.cli import common
from aim_jax.parallel import processes


def define_flags() -> None:
    """Define the flags of the program."""
    common.define_config("Name of a recipe, or a file; see its docstring.")
    flags.DEFINE_string("workdir", None, "Directory of the run.")
    flags.DEFINE_string("data", "", "Directory with the images; short for --config.data.dir.")
    processes.define_flags()
    flags.mark_flags_as_required(["config", "workdir"])


def main() -> int:
    """Train and return the exit status."""
    from aim_jax.training.aim import train

    return common.start_training(train, "aim")
