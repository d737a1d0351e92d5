"""Plots of the training curves that the model cards show.

Example:
  python benchmarks/curves.py --workdirs runs/cifar10_vq,runs/cifar10 --out curves.png
"""

import json
import sys
from pathlib import Path

from absl import app, flags

from aim_jax.cli.common import errors_in_one_line
from aim_jax.utils.plots import pyplot

FLAGS = flags.FLAGS
flags.DEFINE_list("workdirs", None, "Workdirs of training runs, one row of plots each.")
flags.DEFINE_string("out", "curves.png", "Image file to write.")
flags.mark_flag_as_required("workdirs")

SHOWN = {
    "vq": (("rec_loss", "val_rec_l2"), ("val_psnr",), ("codebook_usage", "val_usage")),
    "adversarial": (
        ("rec_loss", "lpips"),
        ("hinge_loss", "logits_real", "logits_fake"),
        ("val_rfid",),
    ),
    "aim": (("loss", "val_loss"), ("grad_norm",), ("examples_per_second",)),
}


def draw(workdirs: list[Path], out: Path) -> None:
    """Plot the curves into one file, with a row of three plots per run."""
    rows = len(workdirs)
    figure, axes = pyplot().subplots(rows, 3, figsize=(12, 3 * rows), squeeze=False)
    for row, workdir in zip(axes, workdirs, strict=True):
        stage = json.loads((workdir / "run.json").read_text())["stage"]
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        stage = "adversarial" if any("hinge_loss" in r for r in rows) else stage
        for plot, names in zip(row, SHOWN[stage], strict=True):
            for name in names:
                points = [(r["step"], r[name]) for r in rows if name in r and r["step"] > 1]
                if points:
                    plot.plot(*zip(*points, strict=True), label=name)
            plot.set_xlabel("step")
            plot.set_title(workdir.name)
            plot.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=80)


def main(_):
    """Plot the curves and print the path."""
    with errors_in_one_line():
        draw([Path(workdir) for workdir in FLAGS.workdirs], Path(FLAGS.out))
        print(FLAGS.out)


if __name__ == "__main__":
    sys.exit(app.run(main))
