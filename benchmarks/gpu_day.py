r"""Everything to measure on an NVIDIA GPU that is lent for minutes, in stages with a time budget.

Example:
  python benchmarks/gpu_day.py --out results --budget_s 540
  python benchmarks/gpu_day.py --out results --budget_s 540 --stage 3 --stage 5
  python benchmarks/gpu_day.py --out rehearsal --rehearse

stage
  1  every Triton kernel against its reference, values and gradients; the engines of a model of two
     layers against the modules
  2  AiM-B at 1, 8, 64 and 256 images by engine, with CUDA graphs and without; tables of kernels
  3  AiM-XL at 1 and 64 images
  4  launch shapes of the decode step kernels
  5  training steps of AiM-B and AiM-XL with both scans: ms, images/s, MFU, peak memory
  6  the models of CIFAR-10, trained from prepared parts (--parts; see gpu_training.py). It runs
     only if it is named, and resumes from the files of an earlier run in --out

Results are in OUT/results.json, which is written after every case. A case that fails is recorded
with its error, one that the library does not support with the reason, and the next one follows. The
same command repeats failed cases only. Each part of a stage runs in a process of its own, one at a
time: a kernel that breaks its process costs one case, and peaks of memory are those of one case. No
case starts after the budget, and one that runs then is ended within 15 s. The exit status is 1 if a
case failed or was left out.

--rehearse runs all stages in this process at tiny sizes, on any device; without a GPU, Triton
interprets the kernels. `pytest -m gpu` runs stage 1 as tests.

Machines without this package's dependencies: the checkout is enough, with Python 3.12, jax 0.11.2
and its CUDA plugin, triton 3.6 and these wheels (39 MB). Neither grain, tensorflow-datasets,
safetensors nor tensorboard is imported. On a machine with network access and Python 3.12:
  pip download --no-deps --only-binary=:all: --dest wheels --constraint constraints.txt \
    {WHEELS}
  python benchmarks/gpu_training.py prepare --data CIFAR10 --out parts      # stage 6 only
and on the machine with the GPU, in the checkout with both folders:
  ln -sfn ../configs aim_jax/configs
  pip install --no-index --no-deps --target site wheels/*.whl
  PYTHONPATH=site python benchmarks/gpu_day.py --out results --budget_s 540
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # find aim_jax/ from anywhere

from aim_jax.configs import aim_b, aim_xl
from aim_jax.configs.defaults import aim_defaults
from aim_jax.models import PRESETS, AiMConfig
from aim_jax.ops.triton_availability import triton_unavailable_because
from aim_jax.parallel.sharding import create_sharded, shard_batch
from aim_jax.perf.accelerators import peak_flops
from aim_jax.perf.flops import training_flops
from aim_jax.sampling.generate import prepare_decoder
from aim_jax.training.aim import Setup
from aim_jax.utils.cache import cache_directory
from aim_jax.utils.files import write_json
from benchmarks import decode_gpu, gpu_training
from benchmarks.decode_cpu import seconds
from benchmarks.traces import profiled
from benchmarks.train_cpu import aim_batch

WHEELS = (
    "absl-py aiofiles chex clu etils flax fsspec humanize importlib_resources jax-triton "
    "ml_collections msgpack optax orbax-checkpoint pillow protobuf psutil pygments pyyaml rich "
    "simplejson tensorstore toolz treescope typing_extensions uvloop wrapt zipp"
)
DESCRIPTION = __doc__.replace("{WHEELS}", WHEELS)
RESULTS = "results.json"
BROKEN = 75  # exit status of a process whose device is no longer usable
Case = tuple[str, Callable[[], dict]]
Run = tuple[tuple[str, ...], tuple[int, ...], bool]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements.

    Attributes:
      checked: models whose kernels are compared, at 2 images.
      agreed: model whose engines are compared.
      options: of decode_gpu.py.
      b, xl: names of the models of stages 2 and 3.
      engines: engines of stage 1.
      b_runs, xl_runs: engines, batch sizes, and whether tokens are also decoded into images, the
        most important first. The kernels of the first engine are listed too.
      without_graphs: the same for stage 2 without CUDA graphs.
      swept: model and images of every sweep of launch shapes.
      most_shapes: launch shapes per kernel.
      rounds: timed passes over the layers, or training steps.
      batch: images per training step.
      recipes: configurations of training, by model.
    """

    checked: dict[str, AiMConfig]
    agreed: AiMConfig
    options: tuple[str, ...]
    b: str
    xl: str
    engines: tuple[str, ...]
    b_runs: tuple[Run, ...]
    xl_runs: tuple[Run, ...]
    without_graphs: tuple[Run, ...]
    swept: tuple[tuple[AiMConfig, int], ...]
    most_shapes: int | None
    rounds: int
    batch: int
    recipes: dict[str, Callable]


ODD = AiMConfig(
    vocab_size=1000, num_classes=10, num_tokens=50, d_model=96, n_layer=2, d_state=40, headdim=24,
    ngroups=2,
)  # fmt: skip
TINY = AiMConfig(
    vocab_size=32, num_classes=3, num_tokens=4, d_model=8, n_layer=2, d_state=5, headdim=8
)


def tiny_recipe():
    """Return a recipe of a tiny model."""
    config = aim_defaults()
    config.model.update(dataclasses.asdict(TINY))
    return config


REAL = Sizes(
    checked={"B": dataclasses.replace(PRESETS["B"], n_layer=2), "odd": ODD},
    agreed=dataclasses.replace(PRESETS["B"], n_layer=2, compute_dtype="bfloat16"),
    options=("--models", "B,XL", "--repeats", "3"),
    b="B",
    xl="XL",
    engines=("dual_bf16", "recurrent_bf16", "recurrent"),
    b_runs=(
        (("dual_bf16", "recurrent_bf16"), (1, 64, 8, 256), False),
        (("dual_bf16",), (1, 64), True),
        (("recurrent", "xla"), (1, 64, 8, 256), False),
    ),
    xl_runs=((("dual_bf16", "recurrent_bf16", "recurrent", "xla"), (1, 64), False),),
    without_graphs=((("dual_bf16", "recurrent_bf16"), (1, 64), False),),
    swept=((PRESETS["XL"], 64), (PRESETS["B"], 64), (PRESETS["B"], 1), (PRESETS["XL"], 1)),
    most_shapes=None,
    rounds=10,
    batch=64,
    recipes={"B": aim_b.get_config, "XL": aim_xl.get_config},
)
REHEARSAL = Sizes(
    checked={"tiny": TINY},
    agreed=dataclasses.replace(TINY, compute_dtype="bfloat16"),
    options=("--tiny", "--repeats", "1", "--decode_batch", "1", "--bandwidth", "10"),
    b="tiny",
    xl="tiny",
    engines=("dual", "recurrent"),
    b_runs=((("dual", "recurrent"), (1,), False), (("dual",), (1,), True)),
    xl_runs=((("dual",), (1,), False),),
    without_graphs=((("recurrent",), (1,), False),),
    swept=((TINY, 1),),
    most_shapes=1,
    rounds=1,
    batch=2,
    recipes={"tiny": tiny_recipe},
)


class Record:
    """Results of all cases, written after each.

    Args:
      file: JSON file, which may hold earlier results.
      deadline: time after which no case starts.
    """

    def __init__(self, file: Path, deadline: float):
        self.file = file
        self.deadline = deadline
        self.content = json.loads(file.read_text()) if file.is_file() else {"cases": {}}

    @property
    def cases(self) -> dict[str, dict]:
        """Results by name."""
        return self.content["cases"]

    def write(self) -> None:
        """Write the file."""
        write_json(self.file, self.content)

    def run(self, name: str, case: Callable[[], dict]) -> bool:
        """Run a case unless it is recorded; return whether the device is usable after it."""
        if name in self.cases:
            return True
        if time.time() > self.deadline:
            self.cases[name] = {"left out": "no time was left"}
            self.write()
            return True
        # It stands if the case ends the process.
        self.cases[name] = {"failed": "the process ended during this case"}
        self.write()
        start = time.time()
        usable = True
        try:
            result = case()
            if not result.pop("passed", True):
                result = {"failed": "the results differ from the expected ones"} | result
        except gpu_training.Unsupported as error:
            result = {"unsupported": first_line(error)}
        except Exception as error:
            frames = traceback.format_exc().splitlines()[-12:]
            result = {"failed": first_line(error), "traceback": frames}
            out_of_memory = "RESOURCE_EXHAUSTED" in str(error)
            usable = out_of_memory or not isinstance(error, jax.errors.JaxRuntimeError)
        self.cases[name] = result | {"seconds": round(time.time() - start, 2)}
        self.write()
        shown = {k: v for k, v in result.items() if not isinstance(v, list | dict)}
        print(f"{name}: {json.dumps(shown)[:300]}", flush=True)
        return usable


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:500]}"


# Stage 1


def kernel_cases(sizes: Sizes) -> Iterator[Case]:
    """Yield the comparisons of the kernels."""
    from benchmarks import kernel_checks  # imports Triton

    for name, config in sizes.checked.items():
        for check, function in kernel_checks.checks(config, images=2):
            yield f"{name} {check}", function


def engine_cases(sizes: Sizes) -> Iterator[Case]:
    """Yield the comparisons of the engines with the modules."""
    agreement = decode_gpu.Agreement(sizes.agreed)
    engines = decode_gpu.parse(list(sizes.options)).known_engines
    for name, dtype in itertools.product(sizes.engines, ("float32", "bfloat16")):
        yield f"{name} {dtype}", functools.partial(compare_engine, agreement, engines[name], dtype)


def compare_engine(agreement: decode_gpu.Agreement, engine, dtype: str) -> dict:
    """Compare an engine with the modules at the highest precision of products."""
    with jax.default_matmul_precision("highest"):
        return agreement.of(engine, dtype)


# Stages 2 and 3


def decode_cases(sizes: Sizes, model: str, runs: Iterable[Run]) -> Iterator[Case]:
    """Yield the rates of a model by batch and engine, and tables of kernels."""
    args = decode_gpu.parse(list(sizes.options))

    @functools.cache
    def bandwidth() -> float:
        return args.bandwidth * 1e9 if args.bandwidth else decode_gpu.copy_bandwidth()

    @functools.cache
    def models() -> decode_gpu.Models:
        return decode_gpu.Models(args.configs[model], args.vq_config)

    def measure(count: int, name: str, images: bool) -> dict:
        options = argparse.Namespace(**vars(args) | {"tokens_only": not images})
        return decode_gpu.measure_case(models(), count, name, options, bandwidth())

    def trace(count: int, name: str) -> dict:
        tokens = functools.partial(
            decode_gpu.draw,
            prepare_decoder(models().aim, args.configs[model], args.known_engines[name]),
            count,
        )
        jax.block_until_ready(tokens())
        return profiled(tokens)

    yield "copy", lambda: {"GB/s": bandwidth() / 1e9}
    for number, (engines, batches, images) in enumerate(runs):
        for count, name in itertools.product(batches, engines):
            case = f"{count} {name}{' to images' if images else ''}"
            yield case, functools.partial(measure, count, name, images)
            if number == 0 and name == engines[0]:
                yield f"{case} kernels", functools.partial(trace, count, name)


# Stage 4


def launch_cases(sizes: Sizes) -> Iterator[Case]:
    """Yield the times of the decode step kernels by launch shape; the first is the library's."""
    from benchmarks import kernel_checks, kernels

    for config, images in sizes.swept:
        for case in kernels.cases(config, images):
            if kernel_checks.name_of(case.op) not in kernel_checks.CACHES:
                continue
            shapes = itertools.islice(kernel_checks.shapes_of(case), sizes.most_shapes)
            for shape in ({}, *shapes):
                name = f"{config.d_model} {images} {case.name} {shape or 'default'}"
                time_launch = functools.partial(kernel_checks.time_launch, case, 3, sizes.rounds)
                yield name, functools.partial(time_launch, **shape)


# Stage 5


def train_cases(sizes: Sizes, model: str, scan: str) -> Iterator[Case]:
    """Yield the speed of a training step."""
    yield "step", lambda: time_training(sizes.recipes[model](), sizes.batch, scan, sizes.rounds)


def time_training(config, batch_size: int, scan: str, steps: int) -> dict:
    """Measure training steps of a recipe on one device.

    Args:
      config: configuration of the run.
      batch_size: images per step.
      scan: `AiMConfig.scan_implementation`.
      steps: timed steps.
    """
    config.batch_size = batch_size
    config.model.scan_implementation = scan
    device = jax.devices()[0]
    setup = Setup(config, [device])
    state = create_sharded(setup.new_state, setup.mesh, setup.rules)
    batch = shard_batch(aim_batch(setup.model, batch_size), setup.mesh)

    def step() -> None:
        nonlocal state
        state, metrics = setup.train_step(state, batch)
        losses.append(float(metrics["loss"]))

    losses: list[float] = []
    first = seconds(step)
    times = [seconds(step) for _ in range(steps)]
    typical = statistics.median(times)
    rate = batch_size / typical
    peak = peak_flops([device])
    memory = device.memory_stats() or {}
    return {
        "batch": batch_size,
        "ms": 1e3 * typical,
        "images/s": rate,
        "MFU": peak and rate * training_flops(setup.model) / peak,
        "peak_GB": memory.get("peak_bytes_in_use", 0) / 1e9 or None,
        "compile_s": first - typical,
        "losses": losses,
        "passed": bool(jnp.all(jnp.isfinite(jnp.array(losses)))),
    }


# All of them


@dataclasses.dataclass(frozen=True)
class Part:
    """Cases that share a process.

    Attributes:
      stage: number of the stage.
      cases: yields them; what they share is made by the first that needs it.
      xla_flags: flags of XLA.
    """

    stage: int
    cases: Callable[[Sizes], Iterable[Case]]
    xla_flags: str = ""


def parts_of(sizes: Sizes, args) -> dict[str, Part]:
    """Return all parts by name, in order."""
    decode_b = functools.partial(decode_cases, model=sizes.b)
    decode_xl = functools.partial(decode_cases, model=sizes.xl)
    without_graphs = functools.partial(decode_b, runs=sizes.without_graphs)
    parts = {
        "kernels": Part(1, kernel_cases),
        "engines": Part(1, engine_cases),
        "B": Part(2, functools.partial(decode_b, runs=sizes.b_runs)),
        "B without graphs": Part(2, without_graphs, decode_gpu.GRAPHS["off"]),
        "XL": Part(3, functools.partial(decode_xl, runs=sizes.xl_runs)),
        "launch shapes": Part(4, launch_cases),
    }
    for model, scan in itertools.product(sizes.recipes, ("xla", "triton")):
        cases = functools.partial(train_cases, model=model, scan=scan)
        parts[f"{model} {scan}"] = Part(5, cases)
    for model in args.train:
        cases = functools.partial(train_model, model=model, args=args)
        parts[f"CIFAR-10 {model}"] = Part(6, cases)
    return parts


def train_model(sizes: Sizes, model: str, args) -> Iterator[Case]:
    """Yield the training of a model of CIFAR-10, to its last step or the deadline."""
    del sizes
    settings = (args.parts, args.out, args.deadline, args.config)
    yield "training", functools.partial(gpu_training.train, model, *settings)


def run_part(name: str, part: Part, sizes: Sizes, record: Record) -> int:
    """Run a part in this process; return `BROKEN` if its device has become unusable, else 0."""
    prefix = f"{part.stage} {name}"
    try:
        for case_name, case in part.cases(sizes):
            if not record.run(f"{prefix}: {case_name}", case):
                return BROKEN
    except Exception as error:  # of making the list of cases
        record.cases[f"{prefix}: cases"] = {"failed": first_line(error)}
        record.write()
    return 0


def run_children(names: Iterable[str], args, file: Path) -> None:
    """Run parts in processes of their own, again after a case that has ended one."""
    for name in names:
        recorded = -1
        problem = None
        while problem is None:
            record = Record(file, args.deadline)
            if time.time() > args.deadline:
                problem = {"left out": "no time was left"}
            elif len(record.cases) == recorded:
                problem = {"failed": "the process ended before its first case"}
            elif not run_child(name, args):
                break
            recorded = len(record.cases)
        else:
            record.cases[f"{name}: process"] = problem
            record.write()


def run_child(name: str, args) -> int:
    """Run a part in a process until the deadline; return its exit status."""
    command = [sys.executable, __file__, "--part", name, "--deadline", str(args.deadline)]
    command += ["--out", str(args.out), *(["--parts", str(args.parts)] if args.parts else [])]
    command += ["--train", *args.train]
    for override in args.config:
        command += ["--config", override]
    environment = {"JAX_COMPILATION_CACHE_DIR": str(cache_directory("compiled"))} | os.environ
    flags = parts_of(REAL, args)[name].xla_flags
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    # Only its own time limit ends a training without loss, so that comes before this one.
    left = args.deadline - time.time() + gpu_training.MARGIN / 2
    with subprocess.Popen(command, env=environment) as child:
        try:
            return child.wait(left)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()


def again(result: dict) -> bool:
    """Return whether the next run repeats or resumes a recorded case."""
    return "failed" in result or "left out" in result or result.get("complete") is False


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of all results")
    add("--budget_s", type=float, default=540, help="seconds in all (540)")
    add("--stage", type=int, action="append", help="stage to run; may be repeated (1 to 5)")
    add("--parts", type=Path, help="folder of the training data of stage 6")
    models = ", ".join(gpu_training.MODELS)
    add("--train", nargs="+", default=gpu_training.MODELS, help=f"models of stage 6 ({models})")
    add(
        "--config", action="append", default=[], metavar="MODEL.FIELD=VALUE",
        help="setting of a training of stage 6, such as aim.steps=20000; may be repeated",
    )  # fmt: skip
    add("--rehearse", action="store_true", help="run everything at tiny sizes in this process")
    add("--part", help=argparse.SUPPRESS)
    add("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.stage = args.stage or [1, 2, 3, 4, 5]
    args.deadline = args.deadline or time.time() + args.budget_s
    if unknown := set(args.stage) - set(range(1, 7)):
        parser.error(f"--stage {unknown.pop()}: expected 1 to 6")
    if 6 in args.stage and args.parts is None:
        parser.error("--stage 6 needs --parts, the folder that gpu_training.py prepare writes")
    if unknown := set(args.train) - set(gpu_training.MODELS):
        parser.error(f"--train {unknown.pop()}: expected some of {models}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the stages and return the exit status."""
    args = parse(argv)
    sizes = REHEARSAL if args.rehearse else REAL
    file = args.out / RESULTS
    parts = parts_of(sizes, args)
    if args.part:  # a child of this program
        record = Record(file, args.deadline)
        record.content["machine"] = decode_gpu.machine()
        part = parts[args.part]
        if (backend := jax.default_backend()) != "gpu":
            reason = f"JAX's device is {backend}, expected an NVIDIA GPU; see jax-cuda13-plugin"
            record.cases[f"{part.stage} {args.part}: device"] = {"failed": reason}
            record.write()
            return 0
        return run_part(args.part, part, sizes, record)
    record = Record(file, args.deadline)
    record.content["cases"] = {k: v for k, v in record.cases.items() if not again(v)}
    record.write()
    names = [name for name, part in parts.items() if part.stage in args.stage]
    if args.rehearse:
        if jax.default_backend() == "cpu" and not triton_unavailable_because():
            importlib.import_module("tests.triton_on_cpu")
        record.content["machine"] = decode_gpu.machine()
        for name in names:
            while run_part(name, parts[name], sizes, record) == BROKEN:
                pass  # it resumes after the case that is recorded
    else:
        run_children(names, args, file)
    cases = Record(file, args.deadline).cases
    failed = [name for name, result in cases.items() if "failed" in result]
    left_out = [name for name, result in cases.items() if "left out" in result]
    print(f"{len(cases)} cases, {len(failed)} failed, {len(left_out)} left out: {file}")
    for name in failed:
        print(f"  {name}: {cases[name]['failed']}")
    return int(bool(failed or left_out))


if __name__ == "__main__":
    sys.exit(main())
