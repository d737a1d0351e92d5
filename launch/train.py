"""Trains AiM on the codes of a tokenizer.

Example:
  python launch/train.py --config configs/fashion_mnist.py --workdir runs/fashion_mnist

The workdir gets checkpoints, metrics.jsonl, TensorBoard events, sample grids and the
trained model with its tokenizer in model/. The same command continues an interrupted run.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from aim_jax.launching import parse, start
from aim_jax.parallel import processes

config_flags.DEFINE_config_file("config", None, "A file of configs/; see its docstring.")
flags.DEFINE_string("workdir", None, "Directory of this run.")
flags.DEFINE_string("data", "", "Directory with the pictures; short for --config.data.dir.")
processes.define_flags()
flags.mark_flags_as_required(["config", "workdir"])


def main(_):
    from aim_jax.training.aim import train

    start(train, "aim", flags.FLAGS)


if __name__ == "__main__":
    sys.exit(app.run(main, flags_parser=parse))
