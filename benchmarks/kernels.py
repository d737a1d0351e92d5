"""Resources and modelled speed of the Triton kernels, from ahead-of-time compilation.

Example:
  python benchmarks/kernels.py --model XL --images 1 64
"""

import argparse
import dataclasses
import functools
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax_triton.triton_lib import get_triton_type
from triton import compile as compile_kernel
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aim_jax.models.config import PRESETS, AiMConfig
from aim_jax.ops import triton as kernels
from aim_jax.ops.triton.ssd_chunks import Decays, Sizes, tile_size

EPILOG = """\
example:
  python benchmarks/kernels.py --model XL --images 1 64

No GPU is required. Each kernel is traced at the shapes of a model, as it runs once per layer and
token (the sampler once per token, the prefills once per layer and prefix), compiled for each
architecture, and assembled by Triton's ptxas. With guidance, an image has two rows.

columns of the first table:
  registers, spill, shared   registers per thread; bytes spilled per thread; bytes per program
  occupancy                  fraction of an SM's warps that can be resident, by registers and shared
                             memory
  programs                   programs per launch
  MB                         data that one launch must move: every array once, and of a cache the
                             part of one layer (token caches: half full, the mean over an image)
  us                         MB / bandwidth of the A100 (sm_80, 2.0 TB/s) or H200 (sm_90, 4.3 TB/s)
columns of the second table, for one token of all images:
  floor ms                   time to move the bfloat16 weights once and the state or cache
  modelled ms                time to move the weights once and all data of the kernels
  images/s                   maximum rate by this model

The exit status is 1 if a kernel spills registers.
"""

BANDWIDTH = {80: 2.0e12, 90: 4.3e12}
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024}


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel launch.

    Attributes:
      name: name of the kernel and its cache dtype.
      op: the operation.
      arguments: arguments of the operation, by name.
      bytes: bytes that the launch has to move.
      cache_bytes: the part of `bytes` for the state or the cache of a Mamba-2 decode step.
    """

    name: str
    op: Callable
    arguments: dict
    bytes: float
    cache_bytes: float = 0


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Resources of a compiled kernel.

    Attributes:
      registers: registers per thread.
      spill: bytes spilled per thread.
      shared: bytes of shared memory per program.
      warps: warps per program.
      programs: programs per launch.
    """

    registers: int
    spill: int
    shared: int
    warps: int
    programs: int

    def occupancy(self, arch: int) -> float:
        """Return the fraction of an SM's warps that can be resident."""
        by_registers = 65536 // (self.warps * 32 * -(-self.registers // 8) * 8)
        by_shared = SHARED_PER_SM[arch] // (self.shared + 1024)
        return min(min(by_registers, by_shared, 32) * self.warps / 64, 1.0)


def nbytes(*arrays) -> int:
    """Return the total size of arrays in bytes."""
    return sum(array.size * array.dtype.itemsize for array in arrays)


def cases(config: AiMConfig, images: int) -> Iterator[Case]:
    """Yield every kernel at the shapes of a model, with bfloat16 activations and input caches.

    Args:
      config: configuration of a Mamba-2 model.
      images: images per batch, with guidance.
    """
    layers = config.n_layer
    b = 2 * images
    d = config.d_model
    v = config.vocab_size
    tokens = config.num_tokens
    e, h, p, n, w = config.d_inner, config.n_heads, config.headdim, config.d_state, config.d_conv
    g = config.ngroups
    c = e + 2 * g * n

    def half(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def full(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    parameters = {
        "conv_weight": full(layers, w, c),
        "conv_bias": full(layers, c),
        "dt_bias": full(layers, h),
        "A": full(layers, h),
        "D": full(layers, h),
        "norm_scale": full(layers, e),
    }
    step = {
        "projected": half(b, e + c + h),
        "conv_cache": half(layers, b, w, c),
        "layer": scalar,
        "position": scalar,
    } | parameters
    common_bytes = nbytes(*step.values()) / layers + nbytes(step["projected"]) + 2 * b * e

    def stacked(dtype):
        return jax.ShapeDtypeStruct((layers, b, h, p, n), dtype)

    def mamba2(dtype):
        cache = 2 * nbytes(stacked(dtype)) / layers
        arguments = step | {"state": stacked(dtype)}
        name = f"mamba2_step {dtype}"
        return Case(name, kernels.mamba2_step, arguments, common_bytes + cache, cache)

    yield mamba2("float32")
    yield mamba2("bfloat16")

    caches = {
        "inputs": half(layers, b, tokens, h, p),
        "B_cache": half(layers, b, tokens, g, n),
        "log_decay": full(layers, b, tokens, h),
    }
    cache = nbytes(*caches.values()) / layers / 2
    yield Case("dual_step bfloat16", kernels.dual_step, step | caches, common_bytes + cache, cache)

    modulation = {
        "hidden": half(b, d),
        "residual": full(b, d),
        "norm_scale": full(layers, d),
        "modulation": full(layers, b, 3, d),
        "sum_squares": full(b, h),
        "layer": scalar,
    }
    moved = b * d * (2 + 4 + 4 + 3 * 4 + 2)
    op = functools.partial(kernels.add_norm_modulate, inner=e)
    yield Case("add_norm_modulate", op, modulation, moved)

    settings = dict.fromkeys(("cfg_scale", "temperature", "top_p", "min_p"), full())
    sampler = {"logits": full(b, v), "uniform": full(images), "top_k": scalar} | settings
    yield Case("sample", kernels.sample, sampler, nbytes(sampler["logits"]))

    prefix = tokens // 2
    scan = {
        "x": half(b, prefix, h, p),
        "dt": half(b, prefix, h),
        "A": full(h),
        "B": half(b, prefix, g, n),
        "C": half(b, prefix, g, n),
        "D": full(h),
        "dt_bias": full(h),
    }
    moved = nbytes(*scan.values(), scan["x"], full(b, h, p, n))
    yield Case("ssd_prefill", kernels.ssd_prefill, scan, moved)

    yield from training_cases(config, images)

    # Mamba-1 at the same widths; its published state size is 16.
    n = 16
    r = config.dt_rank
    conv = {
        "projected": half(b, 2 * e),
        "conv_cache": half(layers, b, w, e),
        "layer": scalar,
        "position": scalar,
        "conv_weight": full(layers, w, e),
        "conv_bias": full(layers, e),
    }
    moved = 2 * b * e * (1 + w + 1) + 4 * e * (w + 1)
    yield Case("conv_step", kernels.conv_step, conv, moved)
    mamba1 = {
        "x": half(b, e),
        "dt": half(b, e),
        "BC": half(b, r + 2 * n),
        "projected": half(b, 2 * e),
        "state": full(layers, b, e, n),
        "layer": scalar,
        "dt_bias": full(layers, e),
        "A": full(layers, e, n),
        "D": full(layers, e),
    }
    moved = 2 * b * (4 * e + r + 2 * n) + 8 * b * e * n + 4 * e * (n + 2)
    yield Case("mamba1_step float32", kernels.mamba1_step, mamba1, moved)
    scan = {
        "x": half(b, prefix, e),
        "dt": half(b, prefix, e),
        "A": full(e, n),
        "B": half(b, prefix, n),
        "C": half(b, prefix, n),
        "D": full(e),
        "z": half(b, prefix, e),
        "dt_bias": full(e),
    }
    moved = nbytes(*scan.values(), scan["x"], full(b, e, n))
    yield Case("selective_scan_prefill", kernels.selective_scan_prefill, scan, moved)


def training_cases(config: AiMConfig, images: int, dtype: str = "bfloat16") -> Iterator[Case]:
    """Yield the kernels of a training step's scan, with one chunk per image, and convolution.

    Args:
      config: configuration of the model.
      images: images of a micro-batch.
      dtype: dtype of the activations.
    """
    b, l, h, p, g = images, config.num_tokens, config.n_heads, config.headdim, config.ngroups
    T = tile_size(dtype)
    u = -(-l // T)
    q = u * T

    def activations(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    def full(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    sizes = Sizes(l, h, p, g, 1, u, T)
    decays = Decays(*[full(b, h, 1, u, T)] * 4, full(b, h, 1, u, u))
    scores = full(b, 1, g, q, q)
    x = activations(b, l, h, p)
    by_pair = full(b, h, 1, u, u, T)
    shared = {"scores": scores, "decays": decays}
    tiles = nbytes(x, x, scores, *decays)
    for op, own, moved in (
        (kernels.ssd_outputs, {"x": x, "D": full(h)}, tiles),
        (kernels.ssd_inputs_gradient, {"dy": x, "D": full(h)}, tiles),
        (
            kernels.ssd_weights_gradient,
            {"x": x, "dy": x},
            tiles + nbytes(activations(*scores.shape), by_pair, by_pair),
        ),
    ):
        bound = functools.partial(op, sizes=sizes, dtype=x.dtype)
        yield Case(op.__name__, bound, shared | own, moved)

    e, w = config.d_inner, config.d_conv
    conv = {"x": activations(b, l, e), "weight": full(w, e), "bias": full(e)}
    moved = 2 * nbytes(x)
    yield Case("conv_outputs", functools.partial(kernels.conv_outputs, silu=True), conv, moved)
    arguments = conv | {"dy": conv["x"]}
    moved = 3 * nbytes(x)
    op = functools.partial(kernels.conv_gradients, silu=True)
    yield Case("conv_gradients", op, arguments, moved)


def find_launch(op, arguments: dict) -> tuple:
    """Trace `op` and return the parameters and argument types of its single kernel call."""
    jaxpr = jax.make_jaxpr(lambda a: op(**a))(arguments)
    (call,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "triton_kernel_call")
    return call.params, [get_triton_type(x.aval) for x in (*call.invars, *call.outvars)]


def compile_case(case: Case, arch: int) -> Compiled:
    """Compile a launch like jax-triton and assemble it.

    Args:
      case: see `cases`.
      arch: compute capability, 80 or 90.
    """
    call, types = find_launch(case.op, case.arguments)
    fn = call["fn"]
    constants = {name: call[name] for name in fn.arg_names if name in call}
    signature = dict(zip(fn.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    names = ("num_warps", "num_stages", "enable_fp_fusion")
    options = {name: call[name] for name in names if call[name] is not None}
    compiled = compile_kernel(
        ASTSource(fn, signature, constants, aligned), GPUTarget("cuda", arch, 32), options
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.asm["ptx"])
        target = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"])[1]
        ptxas = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", source.name, "-o", "out"]
        log = subprocess.run(ptxas, cwd=folder, check=True, capture_output=True, text=True).stderr
    return Compiled(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spill=sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        programs=math.prod(call["grid"]),
    )


def weight_bytes(config: AiMConfig) -> int:
    """Return the bytes of the bfloat16 weights read per token: projections and head."""
    e = config.d_inner
    gn = config.ngroups * config.d_state
    layer = config.d_model * (3 * e + 2 * gn + config.n_heads)
    return 2 * (config.n_layer * layer + config.vocab_size * config.d_model)


def row(*cells) -> str:
    """Format cells as a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def main(argv: list[str] | None = None) -> int:
    """Print both tables and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=PRESETS, default="B", help="model (default: B)")
    parser.add_argument(
        "--images", type=int, nargs="+", default=[1, 64], metavar="N", help="batch sizes (1 64)"
    )
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        default=[80, 90],
        choices=sorted(BANDWIDTH),
        help="compute capabilities (80 90)",
    )
    args = parser.parse_args(argv)
    config = PRESETS[args.model]
    # jax-triton clears this variable, and Triton would then write its cache into the current
    # directory.
    knobs.cache.dir = tempfile.mkdtemp()

    names = ("kernel", "arch", "registers", "spill", "shared", "warps", "occupancy", "programs")
    print(row("model", "images", *names, "MB", "us"), row(*["---"] * 12), sep="\n")
    spilled = False
    totals = []
    for images in args.images:
        launches = {case.name: case for case in cases(config, images)}
        for case in launches.values():
            for arch in args.arch:
                kernel = compile_case(case, arch)
                spilled |= kernel.spill > 0
                counts = (kernel.registers, kernel.spill, kernel.shared, kernel.warps)
                time = case.bytes / BANDWIDTH[arch]
                print(
                    row(
                        args.model, images, case.name, f"sm_{arch}", *counts,
                        f"{kernel.occupancy(arch):.2f}", kernel.programs,
                        f"{case.bytes / 1e6:.2f}", f"{time * 1e6:.1f}",
                    ),
                    flush=True,
                )  # fmt: skip
        weights = weight_bytes(config)
        layers = config.n_layer
        for name, step in launches.items():
            if not step.cache_bytes:
                continue
            floor = weights + layers * step.cache_bytes
            moved = layers * (step.bytes + launches["add_norm_modulate"].bytes)
            moved += weights + launches["sample"].bytes
            for arch in args.arch:
                ms = [1e3 * amount / BANDWIDTH[arch] for amount in (floor, moved)]
                rate = images / (config.num_tokens * ms[1] / 1e3)
                cells = (f"{ms[0]:.3f}", f"{ms[1]:.3f}", f"{rate:.1f}")
                totals.append(row(args.model, images, name, f"sm_{arch}", *cells))

    print()
    names = ("step", "arch", "floor ms", "modelled ms", "images/s")
    print(row("model", "images", *names), row(*["---"] * 7), *totals, sep="\n")
    return int(spilled)


if __name__ == "__main__":
    sys.exit(main())
