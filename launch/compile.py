"""Compiles a training step, and generation, for devices that are not here: does it fit, how fast?

Examples:
  python launch/compile.py --config configs/aim_xl.py --topology v5e:16x16
  python launch/compile.py --config configs/aim_l.py --topology 8xA100-80G --search

Needs the compiler of the devices, not the devices: the extra `tpu`, or the packages
jax-cuda13-plugin and jax-cuda13-pjrt. Ends with 1 where something does not fit.
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs; what is here must not be taken

from absl import app, flags
from ml_collections import config_flags

from aim_jax.launching import errors_in_one_line, parse

config_flags.DEFINE_config_file("config", None, "A file of configs/ for AiM.")
flags.DEFINE_string("topology", None, "Such as v5e:16x16, v5p-32, 8xA100-80G or 8xH100.")
flags.DEFINE_integer("images", 8, "Images that each device generates; 0: no generation.", 0)
flags.DEFINE_bool("search", False, "Double config.accumulate until the training step fits.")
flags.DEFINE_string("json", "", "File for the figures.")
flags.mark_flags_as_required(["config", "topology"])


def main(_):
    from aim_jax import aot
    from aim_jax.utils.files import write_json

    f = flags.FLAGS
    with errors_in_one_line():
        report = aot.report(f.config, f.topology, f.images, f.search)
        if f.json:
            write_json(Path(f.json), report)
    return 0 if report["fits"] else 1


if __name__ == "__main__":
    sys.exit(app.run(main, flags_parser=parse))
