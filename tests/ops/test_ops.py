"""Every scan against the oracle and golden vectors: values, states, every gradient."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_jax.ops import (
    causal_conv1d,
    conv2d,
    recurrence,
    selective_scan,
    selective_scan_step,
    ssd_scan,
    ssd_step,
)
from benchmarks import ssd_accuracy

# These tests spend their time compiling; unoptimised machine code halves it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
conv = jit(causal_conv1d, static_argnames="activation")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "ops"
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def mamba1_recurrence(x, dt, A, B, C, *, D=None, z=None, initial_state=None, **options):
    """The oracle in the layout of `selective_scan`: every channel is a head of size one."""
    y, state = recurrence(
        x[..., None],
        dt,
        A[:, None],
        B[:, :, None],
        C[:, :, None],
        D=D,
        z=None if z is None else z[..., None],
        initial_state=None if initial_state is None else initial_state[:, :, None],
        **options,
    )
    return y[..., 0], state[:, :, 0]


def mamba2_recurrence(x, dt, A, B, C, **options):
    """The oracle in the layout of `ssd_scan`: one decay per head."""
    return recurrence(x, dt, A[:, None, None], B, C, **options)


ORACLE = {selective_scan: mamba1_recurrence, ssd_scan: mamba2_recurrence}
STEP = {selective_scan: selective_scan_step, ssd_scan: ssd_step}


def assert_close(actual, expected, tolerance, name=""):
    """Largest difference, relative to the largest expected magnitude of the array."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, name
    error = np.max(np.abs(actual - expected), initial=0) / np.max(np.abs(expected), initial=1e-30)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def make_inputs(op, b=2, l=35, seed=0, g=1, shift=-1.0):
    """Random arguments of a scan by name, with every option in use."""
    rng = np.random.default_rng(seed)
    h, p, n, e = 4, 3, 5, 6
    channels, rates = ((h, p), (h,)) if op is ssd_scan else ((e,), (e, n))
    heads = channels[:1]
    groups = (g,) if op is ssd_scan else ()
    shapes = {
        "x": (b, l, *channels),
        "dt": (b, l, *heads),
        "A": rates,
        "B": (b, l, *groups, n),
        "C": (b, l, *groups, n),
        "D": heads,
        "z": (b, l, *channels),
        "dt_bias": heads,
        "initial_state": (b, *channels, n),
    }
    inputs = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    inputs["A"] = -np.exp(inputs["A"])
    inputs["dt_bias"] += shift
    return {name: array.astype(np.float32) for name, array in inputs.items()}


def values_and_gradients(function, inputs, *cotangents):
    """Outputs of function(**inputs) and, for each pair of cotangents, the gradients by name."""

    @jit
    def run(inputs, cotangent):
        outputs, pullback = jax.vjp(lambda inputs: function(**inputs), inputs)
        return outputs, pullback(cotangent)[0]

    outputs, gradients = zip(*[run(inputs, cotangent) for cotangent in cotangents], strict=True)
    return outputs[0], gradients


# The golden files name and order axes as the official kernels do: (b, e, l) and so on.
MAMBA1_NAMES = {"u": "x", "delta": "dt", "delta_bias": "dt_bias"}
GOLDEN_SCANS = {
    "mamba1_selective_scan": (mamba1_recurrence, selective_scan),
    "mamba2_ssd_plain": (mamba2_recurrence, ssd_scan),
    "mamba2_ssd_z_init": (mamba2_recurrence, ssd_scan),
    "mamba2_ssd_ngroups": (mamba2_recurrence, ssd_scan),
}


def ours(name, array):
    """A golden Mamba-1 array in our axis order."""
    return np.swapaxes(array, 1, 2) if array.ndim == 3 and name != "last_state" else array


@pytest.mark.parametrize(
    "backend, dtype", [("oracle", "float64"), (16, "float64"), (64, "float64"), (16, "float32")]
)
@pytest.mark.parametrize("case", GOLDEN_SCANS)
def test_scan_matches_golden(case, backend, dtype):
    oracle, scan = GOLDEN_SCANS[case]
    function = oracle if backend == "oracle" else functools.partial(scan, chunk_size=backend)
    golden = dict(np.load(GOLDEN / f"{case}.npz"))
    if scan is selective_scan:
        renamed = {"last_state": "final_state", "cotangent_last_state": "cotangent_final_state"}
        golden = {
            renamed.get(name, name): array if "last_state" in name else ours(name, array)
            for name, array in golden.items()
        }
    arguments = {name.removeprefix("grad_out_only__") for name in golden if "out_only" in name}
    name_of = {name: MAMBA1_NAMES.get(name, name) for name in arguments}
    name_of = {k: "initial_state" if k == "initial_states" else v for k, v in name_of.items()}

    with jax.enable_x64(dtype == "float64"):
        inputs = {name_of[name]: golden[name].astype(dtype) for name in arguments}
        d_out = golden["cotangent_out"].astype(dtype)
        d_state = golden["cotangent_final_state"].astype(dtype)
        (out, state), (out_only, out_and_state) = values_and_gradients(
            function, inputs, (d_out, np.zeros_like(d_state)), (d_out, d_state)
        )
        assert out.dtype == state.dtype == dtype
    close = functools.partial(assert_close, tolerance=TOLERANCE[dtype])
    close(out, golden["out"], name="out")
    close(state, golden["final_state"], name="state")
    for name in arguments:
        close(out_only[name_of[name]], golden[f"grad_out_only__{name}"], name=name)
        close(out_and_state[name_of[name]], golden[f"grad_out_and_state__{name}"], name=name)


def test_scan_without_gate_matches_golden():
    golden = np.load(GOLDEN / "mamba1_selective_scan.npz")
    u, delta, A, B, C, D, bias = (
        ours(name, golden[name]) for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")
    )
    with jax.enable_x64(True):
        y, _ = jit(selective_scan)(u, delta, A, B, C, D=D, dt_bias=bias)
    assert_close(y, ours("out", golden["out_no_z"]), 1e-10)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "case, step",
    [("mamba1_state_update", selective_scan_step), ("mamba2_state_update", ssd_step)],
)
def test_step_matches_golden(case, step, dtype):
    golden = np.load(GOLDEN / f"{case}.npz")
    names = [name.removeprefix("grad__") for name in golden if name.startswith("grad__")]
    with jax.enable_x64(dtype == "float64"):
        inputs = {name: golden[name].astype(dtype) for name in names}
        cotangents = [golden[f"cotangent_{name}"].astype(dtype) for name in ("out", "new_state")]
        (y, state), (gradients,) = values_and_gradients(step, inputs, tuple(cotangents))
    close = functools.partial(assert_close, tolerance=TOLERANCE[dtype])
    close(y, golden["out"], name="out")
    close(state, golden["new_state"], name="state")
    for name in names:
        close(gradients[name], golden[f"grad__{name}"], name=name)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("start", ["zero", "with"])
def test_conv_matches_golden(start, dtype):
    golden = np.load(GOLDEN / "causal_conv1d.npz")
    close = functools.partial(assert_close, tolerance=TOLERANCE[dtype])

    def array(name):
        return golden[name].astype(dtype)

    with jax.enable_x64(dtype == "float64"):
        inputs = {
            "x": array("x").swapaxes(1, 2),
            "weight": array("weight").T,
            "bias": array("bias"),
        }
        if start == "with":
            inputs["initial_state"] = array("initial_states").swapaxes(1, 2)
        d_out = array("cotangent_out").swapaxes(1, 2)
        (y, state), (gradients,) = values_and_gradients(
            causal_conv1d, inputs, (d_out, np.zeros((2, 3, 10), dtype))
        )
        linear, _ = conv(**inputs, activation=None)
    close(y.swapaxes(1, 2), golden[f"out_{start}_init_silu"])
    close(linear.swapaxes(1, 2), golden[f"out_{start}_init_linear"])
    close(state.swapaxes(1, 2), golden["final_states" + "_zero_init" * (start == "zero")])
    for name, gradient in gradients.items():
        expected = golden[f"grad_{start}_init_silu__{name}" + "s" * (name == "initial_state")]
        close(gradient if name == "bias" else gradient.swapaxes(-1, -2), expected, name=name)


def test_conv_decode_step_matches_golden():
    golden = np.load(GOLDEN / "causal_conv1d.npz")
    with jax.enable_x64(True):
        y, state = conv(
            golden["update_x"][:, None],
            golden["weight"].T,
            golden["bias"],
            initial_state=golden["update_state"][:, :, 1:].swapaxes(1, 2),
        )
    assert_close(y[:, 0], golden["update_out_silu"], 1e-10)
    assert_close(state.swapaxes(1, 2), golden["update_new_state"][:, :, 1:], 0)


# One position, less than a chunk of 8, one position more, and several chunks with a remainder.
@pytest.mark.parametrize("l", [1, 7, 9, 35])
@pytest.mark.parametrize("scan", [selective_scan, ssd_scan])
def test_scan_matches_oracle_at_any_length(scan, l):
    inputs = make_inputs(scan, l=l, g=2)
    rng = np.random.default_rng(1)
    d_y = rng.normal(size=inputs["x"].shape).astype(np.float32)
    d_state = rng.normal(size=inputs["initial_state"].shape).astype(np.float32)

    actual = values_and_gradients(functools.partial(scan, chunk_size=8), inputs, (d_y, d_state))
    expected = values_and_gradients(ORACLE[scan], inputs, (d_y, d_state))
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), actual, expected)


@pytest.mark.parametrize("scan", [selective_scan, ssd_scan])
@pytest.mark.parametrize("l", [8, 20])
def test_options_are_optional(scan, l):
    inputs = make_inputs(scan, l=l)
    required = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    required["dt"] = np.abs(required["dt"])
    actual = jit(functools.partial(scan, chunk_size=8, dt_softplus=False))(**required)
    expected = jit(functools.partial(ORACLE[scan], dt_softplus=False))(**required)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), actual, expected)


@pytest.mark.parametrize("scan", [selective_scan, ssd_scan])
def test_split_sequence_carries_its_state(scan):
    inputs = make_inputs(scan, l=23, g=2)
    run = jit(functools.partial(scan, chunk_size=8))
    whole, final = run(**inputs)
    sequences = ("x", "dt", "B", "C", "z")
    for cut in (1, 22):
        head = inputs | {name: inputs[name][:, :cut] for name in sequences}
        tail = inputs | {name: inputs[name][:, cut:] for name in sequences}
        y_head, state = run(**head)
        y_tail, state = run(**tail | {"initial_state": state})
        assert_close(np.concatenate([y_head, y_tail], axis=1), whole, 1e-5)
        assert_close(state, final, 1e-5)


@pytest.mark.parametrize("scan", [selective_scan, ssd_scan])
def test_steps_walk_along_the_scan(scan):
    inputs = make_inputs(scan, l=19, g=2)
    sequences = {name: inputs.pop(name) for name in ("x", "dt", "B", "C", "z")}
    state = inputs.pop("initial_state")
    whole, final = jit(functools.partial(scan, chunk_size=8))(
        **inputs, **sequences, initial_state=state
    )
    step = jit(STEP[scan])
    for t in range(19):
        now = {name: sequence[:, t] for name, sequence in sequences.items()}
        y, state = step(state, **now, **inputs)
        assert_close(y, whole[:, t], 2e-5, f"position {t}")
    assert_close(state, final, 1e-5)


def test_conv_carries_its_state_at_any_length():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 11, 5)), rng.normal(size=(4, 5))
    x, weight = x.astype(np.float32), weight.astype(np.float32)
    whole, final = conv(x, weight, activation=None)
    padded = np.pad(x, ((0, 0), (3, 0), (0, 0)))
    expected = np.stack([np.sum(weight * padded[:, t : t + 4], axis=1) for t in range(11)], axis=1)
    assert_close(whole, expected, 1e-6)

    # Pieces shorter and longer than the three inputs that the state holds.
    state, pieces = None, []
    for piece in np.split(x, [1, 2, 4, 9], axis=1):
        y, state = conv(piece, weight, initial_state=state, activation=None)
        assert state.shape == (2, 3, 5)
        pieces.append(y)
    assert_close(np.concatenate(pieces, axis=1), whole, 1e-6)
    assert_close(state, final, 0)
    assert_close(state, x[:, -3:], 0)


@pytest.mark.parametrize("scan", [selective_scan, ssd_scan])
def test_strong_decay_over_a_long_sequence(scan):
    """Decays far below the smallest float: exp of the unmasked half would be infinite."""
    inputs = make_inputs(scan, b=1, l=200, shift=5.0)
    inputs["A"] = inputs["A"] * 50
    d_y, d_state = np.ones_like(inputs["x"]), np.ones_like(inputs["initial_state"])
    actual = values_and_gradients(scan, inputs, (d_y, d_state))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(actual))
    expected = values_and_gradients(ORACLE[scan], inputs, (d_y, d_state))
    jax.tree.map(functools.partial(assert_close, tolerance=1e-3), actual, expected)


@pytest.mark.parametrize("scan", [selective_scan, ssd_scan])
def test_no_decay_over_a_long_sequence(scan):
    inputs = make_inputs(scan, b=1, l=200)
    inputs["A"] = np.zeros_like(inputs["A"])
    actual, expected = jit(scan)(**inputs), jit(ORACLE[scan])(**inputs)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), actual, expected)


@pytest.mark.parametrize("scan", [selective_scan, ssd_scan])
def test_bfloat16_inputs_keep_a_float32_state(scan):
    inputs = {k: v.astype(jnp.bfloat16) for k, v in make_inputs(scan, l=20).items()}
    exact = {name: array.astype(np.float32) for name, array in inputs.items()}
    y, state = jit(functools.partial(scan, chunk_size=8))(**inputs)
    y_exact, state_exact = jit(functools.partial(scan, chunk_size=8))(**exact)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    # Mamba-2 rounds the operands of its products, as the official kernels do.
    products = scan is ssd_scan
    assert_close(state, state_exact, 2**-8 if products else 1e-6)
    assert_close(y, y_exact, 2**-7 if products else 2**-8)

    now = {k: inputs[k][:, 0] if k in ("x", "dt", "B", "C", "z") else inputs[k] for k in inputs}
    y, state = jit(STEP[scan])(now.pop("initial_state").astype(np.float32), **now)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)


def test_conv_of_bfloat16_inputs_keeps_a_float32_state():
    x, weight = np.ones((1, 5, 3), jnp.bfloat16), np.ones((4, 3), jnp.bfloat16)
    y, state = jit(causal_conv1d)(x, weight)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("function", [selective_scan, mamba1_recurrence, ssd_scan])
@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"])
def test_wrong_shapes_are_named(function, name):
    inputs = make_inputs(ssd_scan if function is ssd_scan else selective_scan, l=4)
    inputs[name] = np.concatenate([inputs[name], inputs[name]])
    with pytest.raises(ValueError, match=rf"{name} has shape .* expected"):
        function(**inputs)


def test_wrong_ranks_groups_and_options_are_named():
    inputs = make_inputs(ssd_scan, l=4, g=3)
    with pytest.raises(ValueError, match="4 heads cannot share 3 B/C groups"):
        ssd_scan(**inputs)
    with pytest.raises(ValueError, match="x has shape"):
        ssd_scan(**inputs | {"x": inputs["x"][..., 0]})
    with pytest.raises(ValueError, match="x has shape"):
        ssd_scan(**inputs | {"x": inputs["x"][:, :0]})
    with pytest.raises(ValueError, match="chunk_size is 0"):
        selective_scan(**make_inputs(selective_scan, l=4), chunk_size=0)


@pytest.mark.parametrize("scan", [selective_scan, ssd_scan])
def test_step_names_a_wrong_state(scan):
    inputs = make_inputs(scan, l=1)
    now = {k: inputs[k][:, 0] if k in ("x", "dt", "B", "C", "z") else inputs[k] for k in inputs}
    state = now.pop("initial_state")
    with pytest.raises(ValueError, match="state has shape"):
        STEP[scan](state[..., :-1], **now)


def test_conv_names_what_is_wrong():
    x, weight = np.zeros((2, 5, 3), np.float32), np.zeros((4, 3), np.float32)
    with pytest.raises(ValueError, match="weight has shape"):
        causal_conv1d(x, weight.T)
    with pytest.raises(ValueError, match="bias has shape"):
        causal_conv1d(x, weight, np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="initial_state has shape"):
        causal_conv1d(x, weight, initial_state=np.zeros((2, 4, 3), np.float32))
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        causal_conv1d(x, weight, activation="gelu")


def test_the_kernels_name_the_extra_that_they_need(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("aim_jax.ops.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with pytest.raises(ImportError, match=r"pip install 'aim_jax\[cuda\]'"):
        import aim_jax.ops.triton  # noqa: F401


@pytest.mark.parametrize(
    "side, kernel, stride", [(1, 3, 1), (2, 3, 1), (2, 3, 2), (3, 4, 2), (4, 4, 1)]
)
def test_convolution_of_a_map_smaller_than_its_kernel(side, kernel, stride):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, side, side + 1, 5))
    w = jax.random.normal(keys[1], (kernel, kernel, 5, 7))
    padding, numbers = ((1, 1), (1, 2)), ("NHWC", "HWIO", "NHWC")

    def value_and_grads(convolve):
        y, backward = jax.vjp(
            lambda x, w: convolve(x, w, (stride, stride), padding, dimension_numbers=numbers), x, w
        )
        return y, backward(jax.random.normal(keys[2], y.shape))

    for ours, theirs in zip(
        jax.tree.leaves(value_and_grads(conv2d.conv_general_dilated)),
        jax.tree.leaves(value_and_grads(jax.lax.conv_general_dilated)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    text = str(jax.make_jaxpr(lambda: value_and_grads(conv2d.conv_general_dilated))())
    assert "conv_general_dilated" not in text


@pytest.mark.parametrize("steps", ssd_accuracy.STEPS)
def test_ssd_scan_rounds_like_a_plain_recurrence(steps):
    """Medians over ten seeds, of values and all gradients; differences of sums were 5 to 100 times
    as far off. Four units of roundoff are left to the order of summation in matrix products.
    """
    sequences = ssd_accuracy.sequences(10, ssd_accuracy.STEPS[steps], b=1, l=256, h=2, p=4, n=8)
    errors = ssd_accuracy.scan_errors(sequences, (64, 256))
    allowed = errors.pop("recurrence")
    roundoff = 4 * np.finfo(np.float32).eps
    for method, by_name in errors.items():
        for name, error in by_name.items():
            bound = max(np.median(allowed[name]), roundoff)
            assert np.median(error) <= bound, (method, name, np.median(error), bound)


@pytest.mark.parametrize("steps", ssd_accuracy.STEPS)
def test_ssd_scan_of_bfloat16_rounds_operands_only(steps):
    """Four units of roundoff at the worst element, of values and all gradients: decays, sums and
    states are float32.
    """
    sequences = ssd_accuracy.sequences(3, ssd_accuracy.STEPS[steps], b=1, l=256, h=2, p=4, n=8)
    errors = ssd_accuracy.bfloat16_scan_errors(sequences, (64, 256))
    for method in ("chunk 64", "chunk 256"):
        for name, error in errors[method].items():
            assert np.median(error) <= 4 * 2**-9, (method, name, np.median(error))


def test_dual_decoding_after_strong_decays_rounds_like_the_recurrence():
    errors = ssd_accuracy.decode_errors(3)
    assert errors["dual"].max() <= errors["recurrent"].max()
