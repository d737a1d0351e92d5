"""Tables of the kernels in a trace of JAX's profiler, read from its own files."""

import collections
import gzip
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

STREAM = re.compile(r"Stream #")  # lines of a GPU's kernels and copies; others repeat them by op
HOST_LINE = re.compile(r"tf_XLA|XLA|Codegen|Eigen")  # lines of XLA's threads on a CPU


def profiled(function: Callable[[], object], rows: int = 40) -> dict:
    """Call a function under the profiler and return its `kernel_table`."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # a call per line of Python would be recorded too
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(function())
        (file,) = Path(folder).rglob("*.trace.json.gz")
        with gzip.open(file) as stream:
            return kernel_table(json.load(stream)["traceEvents"], rows)


def kernel_table(events: list[dict], rows: int = 40) -> dict:
    """Sum the time of kernels of the same name, without the numbers that XLA appends to names.

    Args:
      events: of a trace in Chrome's format: complete events (ph "X", times in microseconds) and
        names of processes and lines (ph "M").
      rows: names to list; the others are summed up.

    Returns:
      `device`, whether they ran on an accelerator; `busy_ms`, the sum of their times; `span_ms`,
      from the first start to the last end; `kernels`, the longest in sum first: name, calls, ms.
    """
    names = {}
    for event in events:
        if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name"):
            line = event["pid"], event.get("tid") if event["name"] == "thread_name" else None
            names[line] = event["args"]["name"]

    def on_device(event: dict) -> bool:
        is_stream = STREAM.search(names.get((event["pid"], event["tid"]), ""))
        return "/device:" in names.get((event["pid"], None), "") and bool(is_stream)

    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    kernels = [event for event in complete if on_device(event)]
    device = bool(kernels)
    if not device:
        of_line = [(event, names.get((event["pid"], event["tid"]), "")) for event in complete]
        kernels = [event for event, line in of_line if HOST_LINE.search(line)]
    totals: dict[str, list] = collections.defaultdict(lambda: [0, 0.0])
    for event in kernels:
        total = totals[re.sub(r"([._]\d+)+$", "", event["name"])]
        total[0] += 1
        total[1] += event["dur"] / 1e3
    ordered = sorted(totals.items(), key=lambda item: -item[1][1])
    table = [{"name": name[:120], "calls": n, "ms": ms} for name, (n, ms) in ordered[:rows]]
    if others := ordered[rows:]:
        calls, ms = (sum(x) for x in zip(*(total for _, total in others), strict=True))
        table.append({"name": f"{len(others)} others", "calls": calls, "ms": ms})
    start = min((event["ts"] for event in kernels), default=0)
    end = max((event["ts"] + event["dur"] for event in kernels), default=0)
    return {
        "device": device,
        "busy_ms": sum(row["ms"] for row in table),
        "span_ms": (end - start) / 1e3,
        "kernels": table,
    }
