"""Memory and training time of the models on accelerators, estimated by compilation.

Example:
  python benchmarks/footprints.py --out docs/footprints.json   # an hour or two on two cores
  python benchmarks/footprints.py --out docs/footprints.json --table   # only print the table

The program runs aim-jax compile --search for every model and topology, and for some choices of
rematerialization, chunking and sharding. Entries already in the file are not compiled again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("aim_b", "aim_l", "aim_xl", "aim_1b")
TOPOLOGIES = ("v5e-16", "v5e-64", "v5e-256", "v5p-32", "v6e-16", "8xA100-80G", "8xH100")
# Initial images per micro-batch and device; --search halves them until the step fits.
START = {"aim_b": 32, "aim_l": 16, "aim_xl": 8, "aim_1b": 8}
CHOICES = {
    "as configured": [],
    "chunk_size=128": ["--config.model.chunk_size=128"],
    "chunk_size=64": ["--config.model.chunk_size=64"],
    "remat=full": ["--config.model.remat=full"],
    "remat=none": ["--config.model.remat=none"],
    "logits_chunk=32": ["--config.model.logits_chunk=32"],
    "fsdp=False": ["--config.mesh.fsdp=False"],
    "model=4": ["--config.mesh.model=4"],
}


def compile_one(config: str, topology: str, options: list[str]) -> dict:
    """Run aim-jax compile and return its report."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [
            sys.executable, "-m", "aim_jax", "compile", "--config", config,
            "--topology", topology, "--images", "0", "--json", file.name, *options,
        ]  # fmt: skip
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if process.returncode not in (0, 1) or not Path(file.name).stat().st_size:
            sys.exit(f"{' '.join(command)}\n{process.stderr[-2000:]}")
        return json.loads(Path(file.name).read_text())


def jobs():
    """Yield key, config, topology and options of every compilation."""
    chips = {"v5p-32": 16}
    for topology in TOPOLOGIES:
        count = chips.get(topology) or int("".join(filter(str.isdigit, topology.split("-")[-1])))
        count = 8 if topology.startswith("8x") else count
        for config in MODELS:
            accumulate = max(1, 2048 // count // START[config])
            options = [f"--config.accumulate={accumulate}", "--search"]
            yield f"{config} {topology}", config, topology, options
    for name, options in CHOICES.items():
        yield f"choice {name}", "aim_l", "v5e-16", [*options, "--config.accumulate=8"]


def gib(size: float) -> str:
    """Format bytes in GiB."""
    return f"{size / 2**30:.1f}"


def row(report: dict) -> str:
    """Format the cells of a report: memory, micro-batches, step, rate, MFU, device hours."""
    training = report["training"]
    if "refused" in training:
        return f"does not fit: {training['refused'][:80]} | | | | |"
    needed = training["arguments"] + training["temporaries"] + training["outputs"]
    memory = f"{gib(needed)} of {gib(training['capacity'])}"
    if not training["fits"]:
        return f"**{memory}** | {training['accumulate']} | | | |"
    return (
        f"{memory} | {training['accumulate']} | {training['seconds']:.2f} | "
        f"{training['images_per_second']:.0f} | {training['mfu']:.0%} | "
        f"{training['hours']:.0f} h, {training['hours'] * report['devices']:.0f}"
    )


def table(reports: dict) -> str:
    """Format the reports as Markdown tables."""
    head = "GiB | micro-batches | s per step | images/s | MFU | recipe: hours, device hours"
    lines = [f"| | | {head} |", "|---|---|---|---|---|---|---|---|"]
    for topology in TOPOLOGIES:
        for config in MODELS:
            if report := reports.get(f"{config} {topology}"):
                name = f"{topology} ({report['devices']} x {report['kind']})"
                lines.append(f"| {name} | {config} | {row(report)} |")
    lines += ["", f"| AiM-L on v5e-16 | {head} |", "|---|---|---|---|---|---|---|"]
    for name in CHOICES:
        if report := reports.get(f"choice {name}"):
            lines.append(f"| {name} | {row(report)} |")
    return "\n".join(lines)


def main():
    """Run the missing compilations and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to extend")
    parser.add_argument("--only", default="", help="compile only entries whose name contains this")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    args = parser.parse_args()
    reports = json.loads(args.out.read_text()) if args.out.exists() else {}
    for key, config, topology, options in () if args.table else jobs():
        if key in reports or args.only not in key:
            continue
        reports[key] = compile_one(config, topology, options)
        partial = args.out.with_suffix(".partial")
        partial.write_text(json.dumps(reports, indent=1) + "\n")
        partial.replace(args.out)
        print(f"{key}: {row(reports[key])}", flush=True)
    print(table(reports))


if __name__ == "__main__":
    main()
