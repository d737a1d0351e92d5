"""Rounding errors of the Mamba-2 scan and of its gradients, beside those of a plain recurrence.

Example:
  python benchmarks/ssd_accuracy.py --seeds 10 --chunks 64,256

Values and gradients in float32 are compared with the recurrence in float64. An error is the largest
difference of an array, relative to its largest magnitude; the program prints medians over the
seeds. "mild" steps are those of a model at its start, "strong" ones decay a state to nothing within
a few positions. The next lines decode token by token after a prefix of strong steps.

The last lines are about bfloat16: the scan of bfloat16 x, B and C; the output head and its
gradients beside float32 with the same inputs; loss and gradient of a small model beside float32.
"""

import argparse
import dataclasses
import functools
import platform

import jax
import jax.numpy as jnp
import numpy as np

from aim_jax import ops
from aim_jax.models import AiM, AiMConfig
from aim_jax.models.aim import init_params

# Ranges of the step sizes, which are log-uniform.
STEPS = {"mild": (1e-3, 0.1), "strong": (0.3, 3.0)}
GRADIENTS = ("x", "dt", "A_log", "B", "C", "D", "initial_state")


def sequences(seeds: int, steps: tuple[float, float], b=2, l=512, h=4, p=8, n=16) -> dict:
    """Return float32 arguments of a scan by name, and a cotangent of y, with an axis of seeds."""

    def one(seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {
            "x": rng.normal(size=(b, l, h, p)),
            "dt": np.exp(rng.uniform(*np.log(steps), size=(b, l, h))),
            "A_log": np.log(rng.uniform(1, 16, h)),
            "B": rng.normal(size=(b, l, 1, n)),
            "C": rng.normal(size=(b, l, 1, n)),
            "D": rng.normal(size=h),
            "initial_state": rng.normal(size=(b, h, p, n)),
            "d_y": rng.normal(size=(b, l, h, p)),
        }

    def stack(*arrays: np.ndarray) -> np.ndarray:
        return np.stack(arrays).astype(np.float32)

    return jax.tree.map(stack, *map(one, range(seeds)))


@functools.partial(jax.jit, static_argnames="chunk_size")
@functools.partial(jax.vmap, in_axes=(0, None))
def values_and_gradients(arguments: dict, chunk_size: int | None) -> dict[str, jax.Array]:
    """Compute y, the last state, and the gradients of sum(d_y y) by "d_" and argument.

    Args:
      arguments: From `sequences`, without the axis of seeds.
      chunk_size: Chunks of `ops.ssd_scan`; None runs `ops.recurrence`.
    """
    arguments = dict(arguments)
    d_y = arguments.pop("d_y")

    def loss(arguments: dict) -> tuple[jax.Array, dict]:
        options = dict(arguments, dt_softplus=False)
        A = -jnp.exp(options.pop("A_log"))
        if chunk_size is None:
            y, state = ops.recurrence(A=A[:, None, None], **options)
        else:
            y, state = ops.ssd_scan(A=A, chunk_size=chunk_size, **options)
        return jnp.sum(d_y * y), {"y": y, "state": state}

    gradients, values = jax.grad(loss, has_aux=True)(arguments)
    return values | {f"d_{name}": gradients[name] for name in GRADIENTS}


def worst_errors(actual: dict, exact: dict) -> dict[str, np.ndarray]:
    """Return the error (seeds,) of every array by name."""

    def error(actual: jax.Array, exact: np.ndarray) -> np.ndarray:
        axes = tuple(range(1, exact.ndim))
        return np.abs(np.asarray(actual, np.float64) - exact).max(axes) / np.abs(exact).max(axes)

    return {name: error(actual[name], exact[name]) for name in exact}


def scan_errors(arguments: dict, chunks: tuple[int, ...]) -> dict[str, dict[str, np.ndarray]]:
    """Return the errors of the recurrence and of the scan in each chunk size, by method."""
    with jax.enable_x64(True):
        doubles = jax.tree.map(lambda array: jnp.asarray(array, jnp.float64), arguments)
        exact = jax.tree.map(np.asarray, values_and_gradients(doubles, None))
    methods = {"recurrence": None} | {f"chunk {chunk}": chunk for chunk in chunks}
    return {
        name: worst_errors(values_and_gradients(arguments, chunk), exact)
        for name, chunk in methods.items()
    }


def decode_errors(seeds: int, prefix: int = 100, tokens: int = 64) -> dict[str, np.ndarray]:
    """Return the errors (seeds,) of tokens with dt = 1e-3 after a prefix with dt = 10, by form."""
    names = ("x", "dt", "B", "C")
    arguments = sequences(seeds, (10.0, 10.0), b=1, l=prefix + tokens)
    arguments["dt"][:, :, prefix:] = 1e-3

    @functools.partial(jax.jit, static_argnames="dual")
    @functools.partial(jax.vmap, in_axes=(0, None))
    def decode(arguments: dict, dual: bool) -> jax.Array:
        b, l, h, p = arguments["x"].shape
        g, n = arguments["B"].shape[2:]
        A = -jnp.exp(arguments["A_log"])
        dtype = arguments["x"].dtype
        state = ops.init_dual_cache(b, l, h, p, g, n) if dual else jnp.zeros((b, h, p, n), dtype)

        def step(state: jax.Array | ops.DualCache, now: list) -> tuple:
            x, dt, B, C = now
            function = ops.ssd_dual_step if dual else ops.ssd_step
            y, state = function(state, x, dt, A, B, C, dt_softplus=False)
            return state, y

        _, y = jax.lax.scan(step, state, [jnp.moveaxis(arguments[name], 1, 0) for name in names])
        return y[prefix:]

    arguments = {name: arguments[name] for name in (*names, "A_log")}
    with jax.enable_x64(True):
        doubles = jax.tree.map(lambda array: jnp.asarray(array, jnp.float64), arguments)
        exact = {"y": np.asarray(decode(doubles, False))}
    return {
        name: worst_errors({"y": decode(arguments, dual)}, exact)["y"]
        for name, dual in {"recurrent": False, "dual": True}.items()
    }


def bfloat16_scan_errors(arguments: dict, chunks: tuple[int, ...]) -> dict[str, dict]:
    """Return the errors of `scan_errors` where x, B, C and the cotangent are bfloat16."""
    narrow = {name: jnp.asarray(arguments[name], jnp.bfloat16) for name in ("x", "B", "C", "d_y")}
    return scan_errors(arguments | narrow, chunks)


def head_errors(seeds: int, rows=256, d=64, v=512) -> dict[str, dict[str, np.ndarray]]:
    """Return the errors of the output head in bfloat16 beside float32 with the same inputs.

    Returns:
      Errors (seeds,) of "nats", "d_x" and "d_table", with the library's gradient ("rounded": the
      cotangent of the logits is bfloat16) and with JAX's own ("float32").
    """

    def head(x: jax.Array, table: jax.Array, labels: jax.Array, rounded: bool) -> jax.Array:
        if rounded:
            return ops.linear_cross_entropy(x, table, labels)
        logits = jnp.einsum("bld,vd->blv", x, table, preferred_element_type=jnp.float32)
        return ops.cross_entropy(logits, labels)

    @functools.partial(jax.jit, static_argnames="rounded")
    @functools.partial(jax.vmap, in_axes=(0, 0, 0, None))
    def run(x: jax.Array, table: jax.Array, labels: jax.Array, rounded: bool) -> dict:
        def loss(x: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
            nats = head(x, table, labels, rounded)
            return jnp.mean(nats), nats

        (d_x, d_table), nats = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, table)
        return {"nats": nats, "d_x": d_x, "d_table": d_table}

    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (seeds, 1, rows, d), jnp.bfloat16)
    table = jax.random.normal(keys[1], (seeds, v, d), jnp.bfloat16) * d**-0.5
    labels = jax.random.randint(keys[2], (seeds, 1, rows), 0, v)
    exact = run(x.astype(jnp.float32), table.astype(jnp.float32), labels, False)
    exact = jax.tree.map(functools.partial(np.asarray, dtype=np.float64), exact)
    return {
        name: worst_errors(run(x, table, labels, rounded), exact)
        for name, rounded in {"rounded": True, "float32": False}.items()
    }


def model_errors(**changes: int) -> dict[str, float]:
    """Return the relative errors of loss and gradient of a model in bfloat16, beside float32.

    Args:
      changes: Fields of `AiMConfig` in the place of those of a small model.

    Returns:
      "loss", and "gradient": the norm of the difference over the norm.
    """
    sizes = dict(vocab_size=1024, num_classes=10, d_model=128, n_layer=6, chunk_size=256) | changes
    config = AiMConfig(**sizes, class_dropout=0.0)
    params = init_params(config, jax.random.key(0))
    codes = jax.random.randint(jax.random.key(1), (2, config.num_tokens), 0, config.vocab_size)

    def run(dtype: str) -> tuple[float, np.ndarray]:
        model = AiM(dataclasses.replace(config, compute_dtype=dtype))

        @jax.jit
        @jax.value_and_grad
        def loss(params: dict) -> jax.Array:
            labels = jnp.arange(2, dtype=jnp.int32)
            return model.apply({"params": params}, codes, labels, method="cross_entropy").mean()

        value, gradients = loss(params)
        return float(value), np.concatenate([x.ravel() for x in jax.tree.leaves(gradients)])

    exact, exact_gradient = run("float32")
    value, gradient = run("bfloat16")
    norm = np.linalg.norm(exact_gradient)
    return {
        "loss": abs(value - exact) / exact,
        "gradient": float(np.linalg.norm(gradient - exact_gradient) / norm),
    }


def print_medians(errors: dict[str, dict[str, np.ndarray]]) -> None:
    """Print medians over the seeds: one line per array, one column per method."""
    print(f"{'':16}" + "".join(f"{method:>12}" for method in errors))
    for name in next(iter(errors.values())):
        medians = (np.median(by_name[name]) for by_name in errors.values())
        print(f"{name:16}" + "".join(f"{median:12.1e}" for median in medians))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10, help="random sequences per case")
    parser.add_argument("--length", type=int, default=512, help="positions of a sequence")
    parser.add_argument("--chunks", default="64,256", help="chunk sizes, separated by commas")
    args = parser.parse_args()
    chunks = tuple(int(chunk) for chunk in args.chunks.split(","))
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind} ({platform.machine()})")
    for kind, steps in STEPS.items():
        errors = scan_errors(sequences(args.seeds, steps, l=args.length), chunks)
        print(f"\n{kind} steps: dt {steps[0]:g} - {steps[1]:g}")
        print_medians(errors)
    print("\ndecoding with dt = 1e-3 after 100 tokens with dt = 10")
    for name, error in decode_errors(args.seeds).items():
        print(f"{name:16}{np.median(error):12.1e}")
    print("\nbfloat16 x, B and C, mild steps")
    print_medians(bfloat16_scan_errors(sequences(args.seeds, STEPS["mild"], l=args.length), chunks))
    print("\noutput head in bfloat16, by the cotangent of the logits")
    print_medians(head_errors(args.seeds))
    print("\nmodel in bfloat16")
    for name, error in model_errors().items():
        print(f"{name:16}{error:12.1e}")


if __name__ == "__main__":
    main()
