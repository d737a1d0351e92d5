"""How loss and FID follow parameters and compute over several training runs.

Example:
  aim-jax scaling --runs runs/aim_b,runs/aim_l,runs/aim_xl --out scaling

A run is a workdir of aim-jax train; its FID is that of RUN/evaluation/report.json, where
aim-jax evaluate --checkpoint RUN --out RUN/evaluation has put it. --out gets scaling.md and
scaling.png.
"""

from pathlib import Path

from absl import flags


def define_flags() -> None:
    flags.DEFINE_list("runs", None, "Workdirs.")
    flags.DEFINE_string("out", "scaling", "Directory for the results.")
    flags.mark_flag_as_required("runs")


def main() -> None:
    from aim_jax.evaluation import scaling
    from aim_jax.utils.plots import pyplot

    out = Path(flags.FLAGS.out)
    pyplot()
    runs = [scaling.read_run(Path(run)) for run in flags.FLAGS.runs]
    text = scaling.report(runs)
    out.mkdir(parents=True, exist_ok=True)
    (out / "scaling.md").write_text(text)
    print(text)
    print(scaling.draw(runs, out / "scaling.png"))
