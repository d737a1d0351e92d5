"""How loss and FID follow parameters and compute over several training runs.

Example:
  python launch/scaling.py --runs runs/aim_b,runs/aim_l,runs/aim_xl --out scaling

A run is a workdir of launch/train.py; its FID is that of RUN/evaluation/report.json, where
launch/evaluate.py --checkpoint RUN --out RUN/evaluation has put it. --out gets scaling.md and
scaling.png.
"""

import sys
from pathlib import Path

from absl import app, flags

from aim_jax.launching import errors_in_one_line, parse

flags.DEFINE_list("runs", None, "Workdirs.")
flags.DEFINE_string("out", "scaling", "Directory for the results.")
flags.mark_flag_as_required("runs")


def main(_):
    from aim_jax.evaluation import scaling
    from aim_jax.utils.plots import pyplot

    out = Path(flags.FLAGS.out)
    with errors_in_one_line():
        pyplot()
        runs = [scaling.read_run(Path(run)) for run in flags.FLAGS.runs]
        text = scaling.report(runs)
        out.mkdir(parents=True, exist_ok=True)
        (out / "scaling.md").write_text(text)
        print(text)
        print(scaling.draw(runs, out / "scaling.png"))


if __name__ == "__main__":
    sys.exit(app.run(main, flags_parser=parse))
