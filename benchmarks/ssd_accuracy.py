"""Rounding errors of the Mamba-2 scan and of its gradients, beside those of a plain recurrence.

Example:
  python benchmarks/ssd_accuracy.py --seeds 10 --chunks 64,256

Values and gradients in float32 are compared with the recurrence in float64. An error is the largest
difference of an array, relative to its largest magnitude; the program prints medians over the
seeds. "mild" steps are those of a model at its start, "strong" ones decay a state to nothing within
a few positions. The last lines decode token by token after a prefix of strong steps.
"""

import argparse
import functools
import platform

import jax
import jax.numpy as jnp
import numpy as np

from aim_jax import ops

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
        print(f"{'':16}" + "".join(f"{name:>12}" for name in errors))
        for name in errors["recurrence"]:
            medians = (np.median(method[name]) for method in errors.values())
            print(f"{name:16}" + "".join(f"{median:12.1e}" for median in medians))
    print("\ndecoding with dt = 1e-3 after 100 tokens with dt = 10")
    for name, error in decode_errors(args.seeds).items():
        print(f"{name:16}{np.median(error):12.1e}")


if __name__ == "__main__":
    main()
