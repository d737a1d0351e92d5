"""A process of two that ends in a way of its own: what `test_distributed` starts."""

import os
import signal
import sys
import time

from absl import app, flags

from aim_jax.cli.common import errors_in_one_line
from aim_jax.parallel import processes
from aim_jax.parallel.watch import start_is_over
from aim_jax.training.monitor import StopSignal
from aim_jax.utils.signals import EXIT_STOPPED

flags.DEFINE_enum("end", None, ["error", "late", "signal", "signal_at_start", "killed"], "How.")
flags.DEFINE_integer("killed", 1, "Process that is killed.")
processes.define_flags()


def main(_):
    import jax

    with errors_in_one_line():
        processes.initialize_from(flags.FLAGS)
        if flags.FLAGS.end == "killed":
            if flags.FLAGS.process_id == flags.FLAGS.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # imports, compiles or restores
        first = jax.process_index() == 0
        processes.wait_for_all("the start")
        if flags.FLAGS.end == "error":
            if not first:
                raise FileNotFoundError("not on this host")
            processes.wait_for_all("a step that the other one never takes")
        if flags.FLAGS.end == "signal_at_start":
            if not first:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)  # restores
        if flags.FLAGS.end == "signal":
            start_is_over()
            if not first:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # until all know of it
            sys.exit(EXIT_STOPPED if StopSignal(3000).reached(3000) else 3)
        if first:
            time.sleep(3 * flags.FLAGS.heartbeat_seconds)  # writes something large
        processes.wait_for_all("the end")


if __name__ == "__main__":
    sys.exit(app.run(main))
