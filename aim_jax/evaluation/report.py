"""Evaluation reports: metrics, settings and environment."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import jax

from aim_jax import __version__
from aim_jax.utils.checks import shown
from aim_jax.utils.files import replacing, write_json
from aim_jax.utils.json_files import (
    Check,
    anything,
    dict_of,
    either,
    list_of,
    measured,
    read_json,
    record,
    string,
    text,
)

KIND = "is not a report of aim-jax evaluate"
# A metric: its value, or mean and standard deviation.
METRICS: Check = dict_of(either(measured, list_of(measured, 2, 2)))
NOTES: Check = list_of(string)
TITLE: Check = record({"title": string})
# The part of a report that says how good images are, and whose. Further entries are ignored.
SCORES: Check = record(
    {"metrics": METRICS}, {"settings": dict_of(anything), "parameters": dict_of(text())}
)
REPORT: Check = record(
    {
        "title": string,
        "metrics": METRICS,
        "notes": NOTES,
        "settings": dict_of(anything),
        "environment": dict_of(anything),
    },
    {"parameters": dict_of(text())},
)


def provenance() -> dict:
    """Return versions, hardware and date for reports."""
    return {
        "aim_jax": __version__,
        "commit": _commit(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpus": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    """Return the commit of this checkout, with "-dirty" if files differ from it."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may be inside the checkout of another project.
        is_checkout = Path(git("rev-parse", "--show-toplevel")).resolve() == root
        return git("describe", "--always", "--dirty") if is_checkout else "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_report(out: Path, report: dict) -> None:
    """Write a report as report.json and report.md."""
    write_json(out / "report.json", report)
    lines = [f"# {report['title']}", "", "| metric | value |", "|---|---|"]
    for name, value in report["metrics"].items():
        text = f"{value[0]:.5g} ± {value[1]:.2g}" if isinstance(value, list) else f"{value:.5g}"
        lines.append(f"| {name} | {text} |")
    lines += [""] + [f"- {note}" for note in report["notes"]]
    for section in ("settings", "environment"):
        lines += ["", f"| {section} | |", "|---|---|"]
        lines += [f"| {k} | {v} |" for k, v in report[section].items()]
    with replacing(out / "report.md") as partial:
        # Names of files may hold bytes that are no text.
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")


def read_report(directory: Path) -> dict:
    """Read the report that `write_report` wrote into a directory.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged.
    """
    file = directory / "report.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{directory}: holds no report.json; expected the directory --out of aim-jax evaluate."
        )
    return read_json(file, REPORT, KIND, allow_nan=True)


def check_out(out: Path, title: str) -> None:
    """Check that a directory does not hold a report with another title.

    Raises:
      ValueError: if it does.
    """
    file = out / "report.json"
    if file.exists() and (old := read_json(file, TITLE, KIND, allow_nan=True)["title"]) != title:
        raise ValueError(
            f"{out} holds another report ({shown(old)}, not {title}); choose another --out, or "
            "delete it."
        )
