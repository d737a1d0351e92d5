"""Decoding on a CPU: this library beside PyTorch with the same mathematics, and other models.

Example:
  python benchmarks/decode_cpu.py --out decode_cpu.json
  python benchmarks/decode_cpu.py --contestants copy,ours --images 1,2,4,8 --plot rates.png

All contestants run in float32 with the sizes of AiM-B (LlamaGen: of LlamaGen-B), guidance, top-k
600 and top-p 0.98, for 1 and 8 images (2 and 16 rows):

  ours          aim_jax.sampling.generate.generate_tokens; --ours selects the variants
  official      the official decode step in plain eager PyTorch
  tuned         the same function, tuned within eager PyTorch
  huggingface   transformers' Mamba2ForCausalLM, without classes
  llamagen      a transformer with a key-value cache
  vq, vq_torch, vq_torch_nhwc
                the decoder of the tokenizer: one image of 256 x 256 pixels
  copy          the copy bandwidth of the machine, reading and writing

Each measurement runs in a separate process, one at a time. Each round covers all contestants, so
that a slow phase of the machine affects all of them. First, peers.py checks that the contestants
with AiM's weights compute the same logits and images. Timed calls go from class labels to tokens,
after a warm-up. The time of a step is the difference between calls of two lengths, which excludes
the work done once per image (class modulation, "start"). A contestant whose steps would take longer
than --budget seconds does fewer steps. The cost of LlamaGen's steps grows linearly with the number
of tokens, so steps around the middle of the image are timed. Whole images are timed once, in the
first round, or extrapolated from the steps (marked ~) if that would take longer than --whole
seconds.

Bytes per step are the minimum that a step has to move (traffic.py): its weights, and its states or
the rows of past tokens. Divided by the time of a step, they give the attained bandwidth.

The last line holds ratios of median times for the first of the --ours variants; a ratio above 1
means that the library is faster. "bandwidth" is the fraction of the copy bandwidth attained at 1
image, and "tokenizer" compares with the faster memory layout in PyTorch. nan means not measured.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np

from aim_jax.models import PRESETS, VQConfig
from aim_jax.sampling.config import SamplingConfig
from aim_jax.sampling.engine import Engine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # find benchmarks/ from anywhere

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"scale": 5.0, "top_k": 600, "top_p": 0.98}
COPIED = 512 * 2**20  # bytes, far beyond any cache
START = 2  # steps of the shorter of two timed lengths


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant of decoding with the library.

    Attributes:
      config: fields of AiMConfig that differ from AiM-B.
      engine: form, implementation and cache dtype of the loop.
      whole: time only whole images, for engines whose steps differ in cost.
    """

    config: dict = dataclasses.field(default_factory=dict)
    engine: Engine = Engine()  # noqa: RUF009
    whole: bool = False


OURS = {
    "default": Variant(whole=True),
    "recurrent": Variant(engine=Engine(form="recurrent")),
    "dual": Variant(engine=Engine(form="dual"), whole=True),
    "xla": Variant(engine=Engine(form="recurrent", implementation="xla")),
    "xla_dual": Variant(engine=Engine(form="dual", implementation="xla"), whole=True),
    "bfloat16": Variant({"compute_dtype": "bfloat16"}, Engine(cache_dtype="bfloat16")),
}
PEERS = ("official", "tuned", "huggingface", "llamagen")
TOKENIZERS = ("vq", "vq_torch", "vq_torch_nhwc")
CONTESTANTS = ("copy", "ours", *PEERS, *TOKENIZERS)


def threads() -> int:
    """Return the number of CPUs that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def seconds(function, *args) -> float:
    """Return the seconds that a call of `function` takes."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


# Measurements in the processes of the contestants. Each function returns an entry of the results.


def copy_bandwidth() -> dict:
    """Measure GB/s of copying a large array with all CPUs, counting bytes read and written."""
    source, target = np.ones((2, COPIED // 8), np.float64)
    parts = list(zip(*(np.array_split(x, threads()) for x in (target, source)), strict=True))
    with ThreadPoolExecutor(threads()) as pool:

        def copy():
            list(pool.map(lambda part: np.copyto(*part), parts))

        copy()
        best = min(seconds(copy) for _ in range(5))
    return {"GB/s": 2 * COPIED / best / 1e9}


def timed_decoding(generate, steps: int, whole: bool, args) -> dict:
    """Time the steps of a generation.

    The time of a step is the difference between calls of two lengths, which excludes the work done
    once per image (class modulation, fresh states).

    Args:
      generate: generate(steps) returns its seconds; it is compiled and warm.
      steps: number of timed steps.
      whole: also time a whole image.
      args: the parsed command line.
    """
    start = min(generate(START), generate(START))
    longer = generate(START + steps)
    if longer <= start:
        raise RuntimeError(
            f"{steps} additional steps took no additional time: the machine is busy, or --steps is "
            "too small."
        )
    result = {"ms": 1e3 * (longer - start) / steps, "steps": steps}
    result["start_s"] = start - START * result["ms"] / 1e3
    if whole and result["start_s"] + result["ms"] / 1e3 * args.tokens < args.whole:
        result["whole_s"] = generate(args.tokens)
    return result


def ours(name: str, images: int, whole: bool, args) -> dict:
    """Measure decoding with the library."""
    import jax
    import jax.numpy as jnp

    from aim_jax.sampling.engine import resolve
    from aim_jax.sampling.generate import generate_tokens, prepare_decoder
    from aim_jax.weights import convert
    from benchmarks.conversion import random_weights
    from benchmarks.traffic import bytes_per_step

    variant = OURS[name]
    config = dataclasses.replace(PRESETS["B"], **variant.config)
    params = jax.device_put(convert.convert_aim(random_weights(config), config))
    compiled = {}

    @functools.cache
    def decoder(steps):
        shortened = dataclasses.replace(config, num_tokens=steps)
        table = params["position_embedding"]["embedding"][: steps + 1]
        shortened_params = params | {"position_embedding": {"embedding": table}}
        return prepare_decoder(shortened_params, shortened, variant.engine)

    def call(steps):
        return generate_tokens(
            decoder(steps), jnp.arange(images), 0, jnp.arange(images),
            SamplingConfig(SETTINGS["scale"], top_k=SETTINGS["top_k"], top_p=SETTINGS["top_p"]),
        ).block_until_ready()  # fmt: skip

    def generate(steps):
        if steps not in compiled:
            compiled[steps] = seconds(call, steps)
        return seconds(call, steps)

    steps = args.tokens - START if variant.whole else args.steps
    result = timed_decoding(generate, steps, whole, args)
    compile_s = compiled[START] - result["start_s"] - START * result["ms"] / 1e3
    engine = resolve(variant.engine, config, 2 * images, "cpu")
    moved = bytes_per_step(config, images, engine)
    return result | {"compile_s": compile_s, "bytes": moved, "engine": dataclasses.asdict(engine)}


def peer(name: str, images: int, whole: bool, args) -> dict:
    """Measure decoding with one of the peers."""
    import torch

    from benchmarks import peers

    torch.set_num_threads(threads())
    config = PRESETS["B"]
    labels = peers.with_null(range(images), config.num_classes)
    if name == "huggingface":
        decoder = peers.HuggingFace(config, 2 * images)
    elif name == "llamagen":
        decoder = peers.LlamaGen(peers.LlamaGenConfig(), labels)
    else:
        decoder_class = {"official": peers.OfficialAiM, "tuned": peers.TunedAiM}[name]
        decoder = decoder_class(peers.as_torch(peers.random_weights(config)), config, labels)

    def generate(steps):
        first = (args.tokens - steps) // 2 if name == "llamagen" else 0
        return seconds(lambda: peers.generate(decoder, steps, first=first, **SETTINGS))

    generate(START)
    affordable = int(args.budget / generate(START) * START)
    return timed_decoding(generate, max(4, min(args.steps, affordable)), whole, args)


def tokenizer(name: str) -> dict:
    """Measure decoding the tokens of one image."""
    from benchmarks.conversion import random_weights

    config = VQConfig()
    weights = random_weights(config)
    tokens = np.random.default_rng(0).integers(0, config.n_embed, (1, 256))
    if name == "vq":
        import jax

        from aim_jax.sampling.images import decode_images
        from aim_jax.weights import convert

        params = jax.device_put(convert.convert_vq(weights, config))

        def decode():
            jax.block_until_ready(decode_images(params, tokens, config=config))
    else:
        import torch

        from benchmarks import peers

        torch.set_num_threads(threads())
        layout = torch.channels_last if name.endswith("nhwc") else torch.contiguous_format
        decoder = peers.VQDecoder(peers.as_torch(weights), config, layout)

        def decode():
            decoder(torch.from_numpy(tokens))

    first = seconds(decode)
    typical = statistics.median(seconds(decode) for _ in range(3))
    return {"ms": 1e3 * typical, "compile_s": first - typical}


def work(job: dict, args) -> dict:
    """Run one measurement in this process."""
    kind = job["kind"]
    name = job["name"]
    if kind == "copy":
        return copy_bandwidth()
    if kind in TOKENIZERS:
        return tokenizer(kind)
    function = ours if kind == "ours" else peer
    return function(name, job["images"], job["whole"], args)


# The main process starts these processes, collects the results and reports them.


def jobs(args) -> list[dict]:
    """Return the measurements of one round, in order."""
    result = []
    for kind in args.contestants:
        if kind == "copy" or kind in TOKENIZERS:
            result.append({"kind": kind, "name": kind, "images": 1})
        else:
            names = args.ours if kind == "ours" else [kind]
            result += [{"kind": kind, "name": n, "images": b} for n in names for b in args.images]
    return result


def run_child(command: list[str], **options) -> subprocess.CompletedProcess:
    """Run a module of this repository on the CPU.

    It runs as a module, because Python searches the directory of a script first, and transformers
    would import our kernels.py as the package `kernels`.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, **options)


def measure(job: dict, argv: list[str]) -> dict:
    """Run a job in a separate process; return its result, or {"error": last line of stderr}."""
    command = ["-m", "benchmarks.decode_cpu", *argv, "--job", json.dumps(job)]
    process = run_child(command, capture_output=True, text=True)
    if process.returncode:
        return {"error": (process.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(process.stdout.splitlines()[-1])


def label(job: dict) -> str:
    """Return the key of a job in the results."""
    name = f"ours:{job['name']}" if job["kind"] == "ours" else job["name"]
    return name if job["kind"] in ("copy", *TOKENIZERS) else f"{name}/{job['images']}"


def run_rounds(args, argv: list[str]) -> dict[str, list[dict]]:
    """Run all rounds and return the results of every job by label, one per round."""
    results = {}
    for number in range(args.rounds):
        for job in jobs(args):
            rows = results.setdefault(label(job), [])
            rows.append(measure(job | {"whole": number == 0 and args.whole > 0}, argv))
            print(f"round {number + 1}  {label(job):18}{describe(rows[-1])}", flush=True)
    return results


def describe(result: dict) -> str:
    """Format one result as a line of text."""
    if "error" in result:
        return f"skipped: {result['error']}"
    if "GB/s" in result:
        return f"{result['GB/s']:.1f} GB/s"
    text = f"{result['ms']:.1f} ms"
    text += f" per step ({result['steps']} steps)" if "steps" in result else " per image"
    text += f", compiled in {result['compile_s']:.1f} s" if "compile_s" in result else ""
    return text + (f", whole image {result['whole_s']:.1f} s" if "whole_s" in result else "")


def values(results: dict, name: str, field: str = "ms") -> list[float]:
    """Return a field of every round that has it."""
    return [row[field] for row in results.get(name, []) if field in row]


def median(results: dict, name: str, field: str = "ms") -> float:
    """Return the median of a field over the rounds, or nan without values."""
    numbers = values(results, name, field)
    return statistics.median(numbers) if numbers else math.nan


def attained(results: dict, name: str) -> float:
    """Return the bandwidth of decoding as a fraction of the copy bandwidth."""
    rate = median(results, name, "bytes") / (median(results, name) / 1e3)
    return rate / 1e9 / median(results, "copy", "GB/s")


def ratios(results: dict, ours: str) -> dict[str, float]:
    """Return the ratios of the last line for the variant `ours`."""
    ours_ms = {b: median(results, f"ours:{ours}/{b}") for b in (1, 8)}
    torch_vq = [median(results, name) for name in TOKENIZERS[1:]]
    torch_vq = [ms for ms in torch_vq if not math.isnan(ms)]
    return {
        "official_1": median(results, "official/1") / ours_ms[1],
        "official_8": median(results, "official/8") / ours_ms[8],
        "tuned_8": median(results, "tuned/8") / ours_ms[8],
        "bandwidth": attained(results, f"ours:{ours}/1"),
        "tokenizer": min(torch_vq, default=math.nan) / median(results, "vq"),
    }


def last_line(found: dict[str, float]) -> str:
    """Format the ratios as one line."""
    return " ".join(f"{name} {value:.2f}" for name, value in found.items())


def table(results: dict, tokens: int) -> list[str]:
    """Return lines with medians and ranges over the rounds, whole images, and bandwidth shares."""
    lines = [f"{'':20}{'ms, median':>11}  {'min - max':17}{'images s':>9}  compile s   of copy"]
    for name in results:
        numbers = values(results, name)
        if not numbers:
            continue
        middle = statistics.median(numbers)
        spread = f"{min(numbers):.1f} - {max(numbers):.1f}"
        image_s = values(results, name, "whole_s")
        start = 0.0 if math.isnan(once := median(results, name, "start_s")) else once
        image_s = f"{image_s[0]:.1f}" if image_s else f"~{start + middle * tokens / 1e3:.1f}"
        image_s = image_s if "/" in name else ""
        compile_s = median(results, name, "compile_s")
        compile_s = "" if math.isnan(compile_s) else f"{compile_s:.1f}"
        share = attained(results, name)
        share = "" if math.isnan(share) else f"{share:.2f}"
        lines.append(f"{name:20}{middle:11.1f}  {spread:17}{image_s:>9}{compile_s:>11}{share:>10}")
    return lines


def plot_rates(results: dict, args) -> None:
    """Plot images/s of our variants against the batch, and the limit of the copy bandwidth."""
    from benchmarks.traffic import plot

    bandwidth = median(results, "copy", "GB/s") * 1e9
    measured = {}
    floors = {}
    for name in args.ours:
        labels = {images: f"ours:{name}/{images}" for images in args.images}
        step = {b: median(results, row) / 1e3 for b, row in labels.items()}
        floor = {b: median(results, row, "bytes") / bandwidth for b, row in labels.items()}
        measured[name] = {b: b / args.tokens / seconds for b, seconds in step.items()}
        floors[name] = {b: b / args.tokens / seconds for b, seconds in floor.items()}
    title = f"AiM-B on {threads()} CPUs, {bandwidth / 1e9:.0f} GB/s; tokens only"
    plot(args.plot, title, measured, floors)


def surroundings() -> dict:
    """Return hardware, versions, load and commit."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for name in ("jax", "jaxlib", "flax", "torch", "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    commit = ""
    if shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "cpu": model[0] if model else platform.processor(),
        "threads": threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
    }


def parse(argv) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(text):
        return text.split(",")

    parser.add_argument("--steps", type=int, default=32, help="timed steps per round (32)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of measurements (3)")
    parser.add_argument(
        "--images",
        type=lambda x: [int(i) for i in x.split(",")],
        default=[1, 8],
        help="batch sizes, separated by commas (1,8)",
    )
    parser.add_argument(
        "--contestants",
        type=names,
        default=list(CONTESTANTS),
        help="contestants, separated by commas (all)",
    )
    parser.add_argument(
        "--ours",
        type=names,
        default=["default"],
        help=f"variants of ours among {', '.join(OURS)}, separated by commas",
    )
    parser.add_argument(
        "--budget", type=float, default=6, help="seconds for the steps of a slow peer (6)"
    )
    parser.add_argument(
        "--whole",
        type=float,
        default=120,
        help="maximum seconds of a timed whole image; 0 times none (120)",
    )
    parser.add_argument("--check_only", action="store_true", help="only check the peers")
    parser.add_argument("--nocheck", action="store_true", help="do not check the peers")
    parser.add_argument("--out", type=Path, help="JSON file for all results")
    parser.add_argument("--plot", type=Path, help="PNG file to plot images/s against the batch")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.tokens = PRESETS["B"].num_tokens
    for selected, known in ((args.contestants, CONTESTANTS), (args.ours, OURS)):
        if unknown := set(selected) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    return args


def main(argv=None) -> int:
    """Check the peers, run the measurements and print the results."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.job:
        print(json.dumps(work(args.job, args)))
        return 0
    machine = surroundings()
    print(json.dumps(machine))
    if machine["load"] > 0.5:
        print(f"warning: the machine is not idle (load {machine['load']:.1f}); times will be off.")
    sys.stdout.flush()
    if not args.nocheck or args.check_only:
        checked = run_child(["-m", "benchmarks.peers", "--size", "B"])
        if checked.returncode or args.check_only:
            return checked.returncode
    results = run_rounds(args, argv)
    summary = ratios(results, args.ours[0])
    if args.out:
        report = {"machine": machine, "results": results, "ratios": summary}
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(results, args.tokens)))
    if args.plot:
        plot_rates(results, args)
    print(last_line(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
