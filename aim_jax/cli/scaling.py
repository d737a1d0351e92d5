"""Fit loss and FID against parameters and compute over several training runs.

Example:
  aim-jax scaling --runs runs/aim_b,runs/aim_l,runs/aim_xl --out scaling

A run is a workdir of aim-jax train. Its FID is read from RUN/evaluation/report.json, which
aim-jax evaluate --checkpoint RUN --out RUN/evaluation writes. The program writes scaling.md and
scaling.png to --out.
"""

from pathlib import Path

from absl import flags


def define_flags() -> None:
    """Define the flags of the program."""
    flags.DEFINE_list("runs", None, "Workdirs of the training runs.")
    flags.DEFINE_string("out", "scaling", "Directory for the results.")
    flags.mark_flag_as_required("runs")


def main() -> None:
    """Write and print the report, and write the plot."""
    from aim_jax.evaluation import scaling
    from aim_jax.utils.files import replacing
    from aim_jax.utils.names import printable
    from aim_jax.utils.plots import pyplot

    out = Path(flags.FLAGS.out)
    pyplot()
    runs = [scaling.read_run(Path(run)) for run in flags.FLAGS.runs]
    text = scaling.report(runs)
    with replacing(out / "scaling.md") as partial:
        partial.write_text(text)
    print(printable(text))
    print(scaling.draw(runs, out / "scaling.png"))
