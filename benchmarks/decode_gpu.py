"""Generation on a GPU: images per second by model, batch and engine, with the memory limit.

Example:
  python benchmarks/decode_gpu.py --out decode_gpu.json --plot decode_gpu.png

The program times whole images, from class labels to tokens (256 tokens, guidance, top-k 600, top-p
0.98), in bfloat16 with random weights created on the device; and the same with the decoder of the
tokenizer, to images of 256 x 256 pixels. The engines "recurrent" (float32 state), "recurrent_bf16"
and "dual_bf16" (bfloat16 caches) use the Triton kernels; "xla" uses the Flax modules, for
comparison. Each figure is a median over --repeats calls after a first call, which compiles. Cases
that do not fit into the memory of the device are skipped with a message;
XLA_CLIENT_MEM_FRACTION=0.95 in the environment gives JAX more memory than the default of 0.75.

The memory limit ("floor") of a step follows from the bytes that it has to move and the bandwidth of
the device: the weights once; per row the state read and written, or the cache of the tokens so far
read and a row written (mean over an image); the ring of convolution inputs and the logits, both
written and read. The bandwidth is measured by copying an array, or set with --bandwidth. "attained"
is the time at the limit divided by the measured time.

--floors prints only the limits, for any --bandwidth, and needs no GPU. --check compares the kernels
with the modules instead of timing them: logits along fixed tokens, and sampled tokens. The exit
status is 1 if they differ. --tiny replaces models and engines by small ones that run anywhere.

CUDA graphs (--graphs) are XLA's command buffers. By default, XLA records the body of the loop over
tokens, with every kernel of a step, as one graph, and launches it once per token. "off" launches
every kernel from the host. "unrolled" also records the loop, with all steps of an image, which
takes long. Driver 12.9 or newer is required to record the slices at the ends of the loop, else they
are launched separately. While a profile is recorded (--trace), XLA does not use graphs, so that
kernels are visible.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_jax.models import PRESETS, AiMConfig, VQConfig
from aim_jax.models.aim import init_params
from aim_jax.models.vq import init_params as init_vq
from aim_jax.sampling.config import SamplingConfig
from aim_jax.sampling.decoder import Decoder
from aim_jax.sampling.engine import Engine
from aim_jax.sampling.generate import generate_tokens, prepare_decoder
from aim_jax.sampling.images import decode_images

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # find benchmarks/ from anywhere

from benchmarks import traffic
from benchmarks.decode_cpu import SETTINGS, seconds, surroundings
from tests.teacher_forced import MODULES, teacher_forced_decode

ENGINES = {
    "recurrent": Engine("recurrent", "triton"),
    "recurrent_bf16": Engine("recurrent", "triton", "bfloat16"),
    "dual_bf16": Engine("dual", "triton", "bfloat16"),
    "xla": Engine("recurrent", "xla"),
}
TINY_ENGINES = {"recurrent": Engine("recurrent", "xla"), "dual": Engine("dual", "xla")}
TINY = AiMConfig(
    vocab_size=32, num_classes=3, num_tokens=4, d_model=16, n_layer=1, d_state=8, headdim=8
)
TINY_VQ = VQConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=8, n_embed=32)
GRAPHS = {
    "default": "",
    "off": "--xla_gpu_enable_command_buffer=",
    "unrolled": "--xla_gpu_enable_command_buffer=+WHILE --xla_gpu_command_buffer_unroll_loops=true",
}
COPIED = 2**30  # bytes, far beyond any cache
# Tolerated differences between logits of an engine and of the modules in float32, relative to the
# largest logit.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


bytes_per_step = functools.cache(traffic.bytes_per_step)


def floor(config: AiMConfig, images: int, engine: Engine, bandwidth: float) -> float:
    """Return images/s if a step takes only the time to move its bytes at `bandwidth` bytes/s."""
    return images / config.num_tokens * bandwidth / bytes_per_step(config, images, engine)


def copy_bandwidth() -> float:
    """Measure bytes/s of copying an array on the device, counting bytes read and written."""
    source = jnp.zeros(COPIED // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)

    def copies():
        for _ in range(10):
            copied = copy(source)
        copied.block_until_ready()

    copies()
    return 10 * 2 * COPIED / min(seconds(copies) for _ in range(5))


def in_float32(config: AiMConfig) -> AiMConfig:
    """Return the configuration with float32 as compute dtype."""
    return dataclasses.replace(config, compute_dtype="float32")


@functools.partial(jax.jit, static_argnums=0)
def random_params(config: AiMConfig) -> dict:
    """Return parameters as at the start of training, but with random gates instead of zeros."""
    params = nn.unbox(init_params(config, jax.random.key(0)))
    noise = 0.3 * jax.random.normal(jax.random.key(1), params["adaln"]["bias"].shape)
    return params | {"adaln": params["adaln"] | {"bias": noise}}


def draw(decoder: Decoder, images: int) -> jax.Array:
    """Generate the tokens of `images` images."""
    index = jnp.arange(images)
    labels = index % decoder.config.num_classes
    seed = 0
    return generate_tokens(
        decoder, labels, seed, index,
        SamplingConfig(SETTINGS["scale"], top_k=SETTINGS["top_k"], top_p=SETTINGS["top_p"]),
    )  # fmt: skip


def time_images(models: "Models", images: int, engine: Engine, args) -> dict:
    """Measure the seconds of generating a batch to tokens, and to images in smaller batches."""
    decoder = prepare_decoder(models.aim, models.aim_config, engine)
    first = seconds(lambda: draw(decoder, images).block_until_ready())

    def generate_images():
        tokens = draw(decoder, images)
        for start in range(0, images, args.decode_batch):
            part = tokens[start : start + args.decode_batch]
            decoded = decode_images(models.vq, part, config=models.vq_config)
        decoded.block_until_ready()

    def repeated(function):
        return [seconds(function) for _ in range(args.repeats)]

    tokens_s = repeated(lambda: draw(decoder, images).block_until_ready())
    result = {"tokens_s": tokens_s, "compile_s": first - statistics.median(tokens_s)}
    if not args.tokens_only:
        generate_images()
        result["pictures_s"] = repeated(generate_images)
    return result


@dataclasses.dataclass
class Models:
    """An AiM and a tokenizer with random parameters on the device."""

    aim_config: AiMConfig
    vq_config: VQConfig
    aim: dict = dataclasses.field(init=False)
    vq: dict = dataclasses.field(init=False)

    def __post_init__(self):
        self.aim = random_params(in_float32(self.aim_config))
        self.vq = jax.jit(init_vq, static_argnums=0)(self.vq_config, jax.random.key(2))


def measure(args, bandwidth: float) -> list[dict]:
    """Measure every model, batch and engine, print each result, and return all of them."""
    results = []
    for name, config in args.configs.items():
        models = Models(config, args.vq_config)
        for images in args.images:
            for engine_name in args.engines:
                row = {"model": name}
                row |= measure_case(models, images, engine_name, args, bandwidth)
                results.append(row)
                print(line(row), flush=True)
    return results


def measure_case(models: Models, images: int, engine_name: str, args, bandwidth: float) -> dict:
    """Measure one batch size and engine: seconds, rates and the memory limit."""
    engine = args.known_engines[engine_name]
    config = models.aim_config
    row = {"images": images, "engine": engine_name}
    row["floor"] = floor(config, images, engine, bandwidth)
    try:
        row |= time_images(models, images, engine, args)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        row["skipped"] = "does not fit into the device's memory"
    return row | rates(row, config.num_tokens)


def rates(row: dict, tokens: int) -> dict:
    """Return images/s to tokens and to images, milliseconds per step, and the limit's fraction."""
    if "skipped" in row:
        return {}
    typical = statistics.median(row["tokens_s"])
    result = {"ms": 1e3 * typical / tokens, "images/s": row["images"] / typical}
    result["attained"] = result["images/s"] / row["floor"]
    if "pictures_s" in row:
        result["pictures/s"] = row["images"] / statistics.median(row["pictures_s"])
    return result


COLUMNS = ("model", "images", "engine", "ms", "images/s", "floor", "attained", "pictures/s")


def cells(*values) -> str:
    """Format the values of a row in columns."""
    model, images, engine, *numbers = values
    return f"{model:6}{images:>7}  {engine:15}" + "".join(f"{n:>12}" for n in numbers)


def line(row: dict) -> str:
    """Format a result as a line of the table."""
    if "skipped" in row:
        return cells(*(row[k] for k in COLUMNS[:3])) + f"  skipped: {row['skipped']}"
    values = [f"{row[k]:.3g}" if isinstance(row.get(k), float) else row.get(k, "") for k in COLUMNS]
    return cells(*values)


def plot(results: list[dict], args, title: str) -> None:
    """Plot images/s against the batch for every model and engine, with their limits."""
    measured = {}
    floors = {}
    for row in results:
        if "skipped" not in row:
            name = f"{row['model']} {row['engine']}"
            measured.setdefault(name, {})[row["images"]] = row["images/s"]
            floors.setdefault(name, {})[row["images"]] = row["floor"]
    traffic.plot(args.plot, title, measured, floors)


class Agreement:
    """Comparison of engines with the modules in float32: logits along fixed tokens, and samples.

    Args:
      config: configuration of the model.
    """

    def __init__(self, config: AiMConfig):
        self.config = config
        self.exact = in_float32(config)
        self.images = 2

    @functools.cached_property
    def params(self) -> dict:
        """Random parameters, made when they are first used."""
        return random_params(self.exact)

    def _logits(self, config: AiMConfig, engine: Engine) -> jax.Array:
        shape = (self.images, config.num_tokens)
        inputs = jax.random.randint(jax.random.key(3), shape, 0, config.vocab_size)
        labels = jnp.arange(self.images) % config.num_classes
        arguments = (self.params, inputs, labels, 1.5, 0)
        return teacher_forced_decode(*arguments, config=config, engine=engine)["guided"]

    @functools.cached_property
    def expected(self) -> tuple[jax.Array, jax.Array]:
        """Logits and sampled tokens of the modules in float32."""
        tokens = draw(prepare_decoder(self.params, self.exact, MODULES), self.images)
        return self._logits(self.exact, MODULES), tokens

    def of(self, engine: Engine, compute_dtype: str) -> dict:
        """Compare an engine in a compute dtype; in float32 it has to sample the same tokens."""
        config = dataclasses.replace(self.config, compute_dtype=compute_dtype)
        expected, tokens = self.expected
        error = jnp.max(jnp.abs(self._logits(config, engine) - expected))
        error = float(error / jnp.max(jnp.abs(expected)))
        narrow = "bfloat16" in (compute_dtype, engine.cache_dtype)
        allowed = TOLERANCE["bfloat16" if narrow else "float32"]
        result = {"logits": error, "allowed": allowed, "passed": error <= allowed}
        if not narrow:
            drawn = draw(prepare_decoder(self.params, self.exact, engine), self.images)
            same = jnp.mean(drawn == tokens)
            result["same tokens"] = float(same)
            result["passed"] &= float(same) == 1
        return result


def check(args) -> bool:
    """Compare every engine with the modules; print each result."""
    agree = True
    for name, config in args.configs.items():
        agreement = Agreement(config)
        for engine_name in args.engines:
            for dtype in ("float32", config.compute_dtype):
                result = agreement.of(args.known_engines[engine_name], dtype)
                agree &= result["passed"]
                text = f"logits {result['logits']:.1e} (allowed {result['allowed']:.0e})"
                if "same tokens" in result:
                    text += f", {result['same tokens']:.1%} of tokens the same"
                label = f"{name:6}{engine_name:16}{dtype:10}"
                print(label, text, "ok" if result["passed"] else "DIFFERENT", flush=True)
    return agree


def machine() -> dict:
    """Return hardware, versions and commit."""
    versions = {}
    for name in ("triton", "jax-triton", "jax-cuda13-plugin"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    host = surroundings()
    device = jax.devices()[0]
    return host | {
        "device": device.device_kind,
        "platform": device.client.platform_version,
        "versions": host["versions"] | versions,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def parse(argv) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(text):
        return text.split(",")

    def numbers(text):
        return [int(i) for i in text.split(",")]

    add = parser.add_argument
    add("--models", type=names, help=f"models among {', '.join(PRESETS)}, with commas (all)")
    add("--images", type=numbers, default=[1, 8, 64, 256], help="batch sizes (1,8,64,256)")
    add("--engines", type=names, help=f"engines among {', '.join(ENGINES)}, with commas (all)")
    add("--repeats", type=int, default=5, help="timed calls per case (5)")
    add("--decode_batch", type=int, default=32, help="batch size of the tokenizer's decoder (32)")
    add("--tokens_only", action="store_true", help="skip the tokenizer's decoder")
    add("--bandwidth", type=float, help="GB/s for the memory limit (default: measured)")
    add("--graphs", choices=GRAPHS, default="default", help="CUDA graphs, see above")
    add("--floors", action="store_true", help="print only the limits (default: at 2000 GB/s)")
    add("--check", action="store_true", help="compare the engines instead of timing them")
    add("--tiny", action="store_true", help="use small models and the engines of any device")
    add("--trace", type=Path, metavar="DIR", help="also profile one call of the first case")
    add("--plot", type=Path, metavar="FILE", help="plot images/s over batch (needs matplotlib)")
    add("--out", type=Path, help="JSON file for all results")
    args = parser.parse_args(argv)

    known = {"tiny": TINY} if args.tiny else PRESETS
    args.known_engines = TINY_ENGINES if args.tiny else ENGINES
    args.models = args.models or list(known)
    args.engines = args.engines or list(args.known_engines)
    for selected, available in ((args.models, known), (args.engines, args.known_engines)):
        if unknown := set(selected) - set(available):
            parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(available)}")
    args.configs = {
        name: dataclasses.replace(known[name], compute_dtype="bfloat16") for name in args.models
    }
    vq = TINY_VQ if args.tiny else VQConfig()
    args.vq_config = dataclasses.replace(vq, compute_dtype="bfloat16")
    return args


def print_floors(args) -> None:
    """Print the limits in images/s: a line per model and engine, a column per batch size."""
    bandwidth = 1e9 * (args.bandwidth or 2000)
    print(f"images/s at {bandwidth / 1e9:.0f} GB/s, by batch size")
    print(f"{'':24}" + "".join(f"{images:>8}" for images in args.images))
    for name, config in args.configs.items():
        for engine_name in args.engines:
            engine = args.known_engines[engine_name]
            row = [floor(config, images, engine, bandwidth) for images in args.images]
            print(f"{name:8}{engine_name:16}" + "".join(f"{rate:8.1f}" for rate in row))


def main(argv=None) -> int:
    """Measure or check, print the results and return the exit status."""
    args = parse(argv)
    if args.floors:
        print_floors(args)
        return 0
    # XLA reads the flags when JAX first accesses a device.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {GRAPHS[args.graphs]}".strip()
    environment = machine()
    print(json.dumps(environment), flush=True)
    if args.check:
        with jax.default_matmul_precision("highest"):
            return int(not check(args))
    bandwidth = args.bandwidth * 1e9 if args.bandwidth else copy_bandwidth()
    print(f"bandwidth {bandwidth / 1e9:.0f} GB/s")
    print(cells(*COLUMNS))
    results = measure(args, bandwidth)
    if args.trace:
        config = args.configs[args.models[0]]
        engine = args.known_engines[args.engines[0]]
        decoder = prepare_decoder(random_params(in_float32(config)), config, engine)
        draw(decoder, args.images[0]).block_until_ready()
        with jax.profiler.trace(str(args.trace)):
            draw(decoder, args.images[0]).block_until_ready()
    if args.out:
        report = {"machine": environment, "GB/s": bandwidth / 1e9, "results": results}
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(results, args, f"{environment['device']}, {bandwidth / 1e9:.0f} GB/s; tokens only")
    return 0


if __name__ == "__main__":
    sys.exit(main())
