"""What every program in launch/ does at its start."""

import contextlib
import sys

from absl import logging

from aim_jax.monitor import NonFiniteLossError


@contextlib.contextmanager
def errors_in_one_line():
    """Ends the program with status 1 and one line for errors that say what a user should change."""
    # Orbax and JAX log every file that they touch at the info level.
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    except (ValueError, OSError, NonFiniteLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def start(train, stage: str, flags) -> None:
    """Runs a training program on its flags.

    Args:
      train: (config, workdir) trains.
      stage: the kind of configuration that it takes.
      flags: parsed flags `config`, `workdir` and `data`.
    """
    config = flags.config
    with errors_in_one_line():
        if config.stage != stage:
            program = {"aim": "launch/train.py", "vq": "launch/train_vq.py"}
            raise ValueError(
                f"the configuration is of stage {config.stage!r}; {program[config.stage]} runs it."
            )
        if flags.data:
            config.data.dir = flags.data
        train(config, flags.workdir)
