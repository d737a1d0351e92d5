"""The Triton kernels on this device: agreement with their references, and time of a launch."""

import functools
import statistics
import zlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from aim_jax import ops
from aim_jax.models.config import AiMConfig
from aim_jax.sampling import logits
from benchmarks import kernels
from benchmarks.decode_cpu import seconds
from benchmarks.kernels import Case

# References of kernels whose op has another name.
REFERENCES = {
    "sample": logits.sample,
    "ssd_prefill": ops.ssd_scan,
    "selective_scan_prefill": ops.selective_scan,
}
# Ops with gradients, by a kernel with the same arguments. Their other kernels have no reference.
DIFFERENTIABLE = {
    "ssd_prefill": ops.ssd_scan,
    "conv_outputs": ops.causal_conv1d,
    "selective_scan_prefill": ops.selective_scan,
}
# Arguments of the decode steps of Mamba-2 that they update in place.
CACHES = {
    "mamba2_step": ("conv_cache", "state"),
    "dual_step": ("conv_cache", "inputs", "B_cache", "log_decay"),
}
# Tolerated differences by the dtype of a result, relative to its largest magnitude: the order of
# float32 sums, and the rounding of a bfloat16 result to a neighbour. Gradients of bfloat16 arrays
# may be products of bfloat16 factors.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2**-7}
NARROW_GRADIENTS = 2e-2
DIFFERENT_TOKENS = 0.02  # sums of probabilities that differ in the last digit change a few tokens


def name_of(op: Callable) -> str:
    """Return the name of an op, which may be a partial one."""
    return getattr(op, "func", op).__name__


def reference(case: Case) -> Callable | None:
    """Return the plain JAX function that a kernel computes, or None if it is a part of one."""
    name = name_of(case.op)
    op = REFERENCES.get(name) or getattr(ops, name, None)
    keywords = getattr(case.op, "keywords", {})
    return op and functools.partial(op, **keywords, implementation="xla")


def random_arguments(case: Case) -> dict[str, jax.Array]:
    """Return arrays of the shapes of a case, with values as a model has them."""
    shapes = case.arguments
    images = shapes["uniform"].shape if "uniform" in shapes else ()
    tokens = shapes["inputs"].shape[2] if "inputs" in shapes else 8
    settings = {
        "layer": jnp.int32(1),
        "position": jnp.int32(tokens // 2 + 1),
        "cfg_scale": jnp.full(images, 1.5, jnp.float32),
        "temperature": jnp.full(images, 0.9, jnp.float32),
        "top_k": jnp.full(images, 600, jnp.int32),
        "top_p": jnp.full(images, 0.98, jnp.float32),
        "min_p": jnp.full(images, 0.001, jnp.float32),
    }

    def values(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0), zlib.crc32(name.encode()))
        if name == "uniform":
            return jax.random.uniform(key, shape.shape, jnp.float32)
        x = jax.random.normal(key, shape.shape, jnp.float32)
        if name in ("A", "log_decay"):
            x = -jnp.exp(x)
        elif name == "sum_squares":
            x = jnp.exp(x)
        elif name == "dt_bias":
            x = x - 2
        return x.astype(shape.dtype)

    make = jax.jit(lambda: {k: values(k, v) for k, v in shapes.items() if k not in settings})
    return make() | {name: settings[name] for name in shapes if name in settings}


def difference(actual: jax.Array, expected: jax.Array, allowed: float | None = None) -> dict:
    """Compare an array with the expected one; see `TOLERANCE`."""
    if jnp.issubdtype(expected.dtype, jnp.integer):
        error, allowed = float(jnp.mean(actual != expected)), DIFFERENT_TOKENS
    else:
        allowed = allowed or TOLERANCE[str(expected.dtype)]
        exact = expected.astype(jnp.float32)
        error = jnp.max(jnp.abs(actual.astype(jnp.float32) - exact))
        error = float(error / jnp.maximum(jnp.max(jnp.abs(exact)), 1e-30))
    same_type = (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    return {"error": error, "allowed": allowed, "passed": same_type and error <= allowed}


def verdict(differences: dict[str, dict]) -> dict:
    """Return whether all differences are allowed, the largest part of what is, and all by name."""
    return {
        "passed": all(d["passed"] for d in differences.values()),
        "largest": max(d["error"] / d["allowed"] for d in differences.values()),
        "differences": differences,
    }


def results(op: Callable, case: Case, arguments: dict) -> list[jax.Array]:
    """Return the results of an op for the arguments of a case.

    The sums of squares of a Mamba-2 step are summed further, to one per row and group, because the
    blocks of channels that they cover are a choice of the implementation.
    """
    leaves = jax.tree.leaves(op(**arguments))
    if name_of(case.op) in CACHES:
        state = arguments["state" if "state" in arguments else "B_cache"]
        channels = arguments["conv_weight"].shape[-1] - arguments["norm_scale"].shape[-1]
        groups = channels // (2 * state.shape[-1])
        leaves[1] = leaves[1].reshape(len(leaves[1]), groups, -1).sum(axis=-1)
    return leaves


def compare_values(case: Case) -> dict:
    """Compare all results of a kernel with those of its reference."""
    arguments = random_arguments(case)
    kernel, plain = (functools.partial(results, op, case) for op in (case.op, reference(case)))
    with jax.default_matmul_precision("highest"):
        actual, expected = (jax.jit(f)(arguments) for f in (kernel, plain))
    pairs = zip(actual, expected, strict=True)
    return verdict({str(i): difference(*pair) for i, pair in enumerate(pairs)})


def compare_gradients(case: Case, dtype: str) -> dict:
    """Compare results and gradients of a differentiable op with those in plain JAX.

    Args:
      case: of a kernel in `DIFFERENTIABLE`.
      dtype: of the arrays with a position axis.

    Raises:
      NotImplementedError: the op's kernels are not differentiable.
    """
    op = DIFFERENTIABLE[name_of(case.op)]
    arguments = random_arguments(case)
    x = arguments["x"]
    if "B" in arguments:  # a scan
        state = (x.shape[0], *x.shape[2:], arguments["B"].shape[-1])
        arguments |= {"z": jnp.flip(x), "initial_state": jnp.ones(state)}
    narrow = ("x", "dt", "B", "C", "z")
    arguments = {k: v.astype(dtype if k in narrow else "float32") for k, v in arguments.items()}

    def loss(arguments: dict, implementation: str) -> tuple[jax.Array, dict]:
        y, state = op(**arguments, implementation=implementation)
        weights = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(weights * y) + jnp.sum(jnp.cos(state)), {"y": y, "state": state}

    gradients = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    with jax.default_matmul_precision("highest"):
        (actual, values), (expected, plain) = (gradients(arguments, i) for i in ("triton", "xla"))
    actual |= values
    expected |= plain
    allowed = NARROW_GRADIENTS if dtype == "bfloat16" else None
    return verdict({k: difference(actual[k], expected[k], allowed) for k in expected})


def checks(config: AiMConfig, images: int) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Yield name and comparison of every kernel at the shapes of a model, and of gradients."""
    for case in kernels.cases(config, images):
        if reference(case):
            yield case.name, functools.partial(compare_values, case)
        if op := DIFFERENTIABLE.get(name_of(case.op)):
            for dtype in ("float32", "bfloat16"):
                name = f"gradients of {op.__name__} {dtype}"
                yield name, functools.partial(compare_gradients, case, dtype)


def time_launch(case: Case, repeats: int, rounds: int, **shape) -> dict:
    """Measure a decode step kernel, layer after layer as in a model, with another launch shape.

    Args:
      case: of a kernel in `CACHES`.
      repeats: timed calls; the median counts.
      rounds: passes over all layers per call.
      **shape: arguments of the op that set blocks and warps.
    """
    arguments = random_arguments(case)
    names = CACHES[name_of(case.op)]
    caches = {name: arguments.pop(name) for name in names}
    layers = arguments["A"].shape[0]

    @functools.partial(jax.jit, donate_argnums=0)
    def run(caches: dict, arguments: dict) -> dict:
        def one_round(caches: dict, _: None) -> tuple[dict, None]:
            for layer in range(layers):
                _, _, *new = case.op(**arguments | caches | {"layer": layer}, **shape)
                caches = dict(zip(names, new, strict=True))
            return caches, None

        return jax.lax.scan(one_round, caches, length=rounds)[0]

    def call() -> None:
        nonlocal caches
        caches = jax.block_until_ready(run(caches, arguments))

    call()
    time = statistics.median(seconds(call) for _ in range(repeats)) / (rounds * layers)
    return {"us": 1e6 * time, "GB/s": case.bytes / time / 1e9} | shape


def shapes_of(case: Case) -> Iterator[dict[str, int]]:
    """Yield launch shapes to try for a decode step kernel."""
    if name_of(case.op) == "mamba2_step":
        headdim = case.arguments["state"].shape[3]
        for channels in (c for c in (8, 16, 32, 64) if c <= headdim):
            for warps in (2, 4, 8):
                yield {"channels_per_program": channels, "num_warps": warps}
        return
    per_group = case.arguments["inputs"].shape[3] // case.arguments["B_cache"].shape[3]
    for heads in (k for k in (1, 2, 4, 8) if per_group % k == 0):
        for tokens in (16, 32, 64):
            for warps in (4, 8):
                yield {"heads_per_program": heads, "tokens_per_block": tokens, "num_warps": warps}
