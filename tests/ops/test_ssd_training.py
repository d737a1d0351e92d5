"""Triton kernels of training, the Mamba-2 scan and convolution: interpreted, lowered, compiled."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from aim_jax import ops
from aim_jax.ops.triton_availability import triton_unavailable_because

if reason := triton_unavailable_because():
    pytest.skip(f"{reason}; `make test` brings it all", allow_module_level=True)

from aim_jax.models.config import PRESETS
from aim_jax.ops import triton as kernels
from aim_jax.ops.implementation import compiling_kernels_for
from aim_jax.ops.triton.ssd_training import ssd_training
from aim_jax.parallel.sharding import axis_rules, make_mesh, sharded_jit
from aim_jax.perf.accelerators import topology
from aim_jax.training import aim as train
from benchmarks import kernels as kernel_benchmark
from benchmarks import ssd_accuracy
from tests import triton_on_cpu
from tests.ops.test_ops import (
    GOLDEN,
    assert_close,
    jit,
    mamba2_recurrence,
    values_and_gradients,
)
from tests.ops.test_triton import cuda_calls, kernel_calls, normal
from tests.parallel.test_sharding import gradients, small_config


def scan_inputs(b, l, h, p, g, n, without=(), dtype=np.float32, seed=0):
    """Random arguments of a scan by name, and cotangents of y and of the last state."""
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (b, l, h, p), "dt": (b, l, h), "A": (h,), "B": (b, l, g, n), "C": (b, l, g, n),
        "D": (h,), "z": (b, l, h, p), "dt_bias": (h,), "initial_state": (b, h, p, n),
    }  # fmt: skip
    inputs = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    inputs["A"] = -np.exp(inputs["A"])
    inputs["dt"] = inputs["dt"] - 1
    inputs = {name: array.astype(dtype) for name, array in inputs.items() if name not in without}
    cotangents = rng.normal(size=(b, l, h, p)), rng.normal(size=(b, h, p, n))
    return inputs, (cotangents[0].astype(dtype), cotangents[1].astype(np.float32))


def exact_results(inputs, cotangents):
    """Values and gradients of the recurrence in float64."""
    with jax.enable_x64(True):
        double = functools.partial(jax.tree.map, lambda t: np.asarray(t, np.float64))
        results = values_and_gradients(mamba2_recurrence, double(inputs), double(cotangents))
    return jax.tree.map(np.asarray, results)


# Sizes b, l, h, p, g, n; chunk and tile; arguments left out.
CASES = {
    "chunks and tiles that are not full, two groups": ((2, 53, 4, 3, 2, 5), 32, 16, ()),
    "one chunk of three tiles": ((1, 45, 2, 20, 1, 17), 64, 16, ("initial_state", "z")),
    "two blocks of channels": ((1, 5, 1, 70, 1, 3), 64, 64, ("D",)),
    "one position": ((1, 1, 2, 4, 1, 16), 64, 64, ("dt_bias",)),
}


@pytest.mark.parametrize("case", CASES)
def test_values_states_and_gradients(case):
    size, chunk_size, tile, without = CASES[case]
    inputs, cotangents = scan_inputs(*size, without=without)
    scan = functools.partial(ssd_training, chunk_size=chunk_size, tile=tile)
    actual = values_and_gradients(scan, inputs, cotangents)
    expected = exact_results(inputs, cotangents)
    jax.tree.map(functools.partial(assert_close, tolerance=2e-6), actual, expected)


def test_operands_in_bfloat16():
    inputs, cotangents = scan_inputs(1, 40, 2, 8, 1, 16, without=("z",))
    narrow = {name: inputs[name].astype(jnp.bfloat16) for name in ("x", "B", "C")}
    inputs |= narrow
    cotangents = (cotangents[0].astype(jnp.bfloat16), cotangents[1])
    scan = functools.partial(ssd_training, chunk_size=32, tile=16)
    (y, state), (gradients,) = values_and_gradients(scan, inputs, cotangents)
    assert {name: t.dtype for name, t in gradients.items()} == {
        name: t.dtype for name, t in inputs.items()
    }
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    actual = (y, state), (gradients,)
    # The weights, the states and the results are rounded to 8 bits.
    jax.tree.map(
        functools.partial(assert_close, tolerance=3 * 2**-8),
        actual, exact_results(inputs, cotangents),
    )  # fmt: skip


@pytest.mark.parametrize("case", ["mamba2_ssd_plain", "mamba2_ssd_z_init", "mamba2_ssd_ngroups"])
def test_golden_gradients(case):
    """As called by `ssd_scan`: chosen by name, through the rule that keeps the arguments only."""
    golden = dict(np.load(GOLDEN / f"{case}.npz"))
    names = [name.removeprefix("grad_out_only__") for name in golden if "out_only" in name]
    own = {"initial_states": "initial_state"}
    inputs = {own.get(name, name): golden[name].astype(np.float32) for name in names}
    d_out, d_state = (
        golden[f"cotangent_{name}"].astype(np.float32) for name in ("out", "final_state")
    )
    scan = functools.partial(ops.ssd_scan, chunk_size=64, implementation="triton")

    @jit
    def run(inputs):
        outputs, pullback = jax.vjp(lambda inputs: scan(**inputs), inputs)
        _, pullback_out = jax.vjp(lambda inputs: scan(**inputs)[0], inputs)
        return outputs, pullback_out(d_out)[0], pullback((d_out, d_state))[0]

    (y, state), out_only, out_and_state = run(inputs)
    assert_close(y, golden["out"], 1e-5, "out")
    assert_close(state, golden["final_state"], 1e-5, "state")
    for name in names:
        ours = own.get(name, name)
        assert_close(out_only[ours], golden[f"grad_out_only__{name}"], 1e-5, name)
        assert_close(out_and_state[ours], golden[f"grad_out_and_state__{name}"], 1e-5, name)


@pytest.mark.parametrize("steps", ssd_accuracy.STEPS)
def test_gradients_round_like_a_plain_recurrence(steps):
    """Medians over seeds; of decays and of their gradients no digits are lost in differences."""
    seeds = 5
    sequences = ssd_accuracy.sequences(seeds, ssd_accuracy.STEPS[steps], b=1, l=80, h=1, p=4, n=8)
    allowed = ssd_accuracy.scan_errors(sequences, ())["recurrence"]
    with jax.enable_x64(True):
        doubles = jax.tree.map(lambda array: jnp.asarray(array, jnp.float64), sequences)
        exact = jax.tree.map(np.asarray, ssd_accuracy.values_and_gradients(doubles, None))

    @jit
    def one(arguments):
        arguments = dict(arguments)
        d_y = arguments.pop("d_y")

        def loss(arguments):
            options = dict(arguments, dt_softplus=False)
            A = -jnp.exp(options.pop("A_log"))
            y, state = ssd_training(A=A, chunk_size=128, tile=32, **options)
            return jnp.sum(d_y * y), {"y": y, "state": state}

        gradients, values = jax.grad(loss, has_aux=True)(arguments)
        return values | {f"d_{name}": gradients[name] for name in gradients}

    runs = [one({name: t[seed] for name, t in sequences.items()}) for seed in range(seeds)]
    actual = jax.tree.map(lambda *arrays: np.stack(arrays), *runs)
    roundoff = 4 * np.finfo(np.float32).eps
    for name, error in ssd_accuracy.worst_errors(actual, exact).items():
        bound = max(np.median(allowed[name]), roundoff)
        assert np.median(error) <= bound, (name, np.median(error), bound)


def test_small_terms_keep_their_digits_beside_large_ones():
    """Gradients of dt of weak steps after a strong one, where sums of others are much larger."""
    inputs, cotangents = scan_inputs(1, 32, 1, 4, 1, 4, without=("z", "dt_bias", "initial_state"))
    inputs["A"] = np.array([-1.0], np.float32)
    inputs["dt"] = np.full((1, 32, 1), -7.0, np.float32)
    inputs["dt"][:, :16] = 50.0
    inputs["x"][:, :8] *= 1e4
    scan = functools.partial(ssd_training, chunk_size=32, tile=32)
    _, (actual,) = values_and_gradients(scan, inputs, cotangents)
    _, (expected,) = exact_results(inputs, cotangents)
    assert_close(actual["dt"][:, 17:], expected["dt"][:, 17:], 2e-6)


def test_gradients_choose_the_kernels_and_skip_unused_states():
    inputs, _ = scan_inputs(1, 16, 2, 4, 1, 4, without=("initial_state",))
    scan = functools.partial(ops.ssd_scan, implementation="triton")

    def names(function):
        jaxpr = jax.make_jaxpr(function)(inputs).jaxpr
        return [name for name, _ in kernel_calls(jaxpr)]

    assert names(lambda inputs: scan(**inputs)) == ["ssd_prefill_kernel"]
    gradient = jax.grad(lambda inputs: jnp.sum(scan(**inputs)[0]))
    assert set(names(gradient)) == {
        "ssd_outputs_kernel", "ssd_inputs_gradient_kernel", "ssd_weights_gradient_kernel",
    }  # fmt: skip
    # The last state and what belongs to it: an array (b, h, p, n), or one of its groups.
    text = jax.jit(gradient).lower(inputs).compile().as_text()
    with_state = jax.grad(lambda inputs: jnp.sum(scan(**inputs)[1]))
    assert "f32[1,2,4,4]" not in text and "f32[1,1,1,2,4,4]" not in text
    assert "f32[1,1,1,2,4,4]" in jax.jit(with_state).lower(inputs).as_text("hlo")


@pytest.mark.parametrize(("groups", "mesh"), [(1, (2, 2)), (2, (1, 4))])
def test_devices_scan_their_own_batch_and_heads(groups, mesh):
    """Of two groups over four devices, every device repeats the one that its heads use."""
    inputs, cotangents = scan_inputs(2, 18, 4, 3, groups, 5)
    devices = make_mesh(*mesh, devices=jax.devices()[:4])

    def run(inputs):
        scan = functools.partial(ops.ssd_scan, implementation="triton", chunk_size=32)
        outputs, pullback = jax.vjp(lambda inputs: scan(**inputs), inputs)
        return outputs, pullback(cotangents)

    actual = sharded_jit(run, devices, axis_rules(devices))(inputs)
    expected = exact_results(inputs, cotangents)
    jax.tree.map(functools.partial(assert_close, tolerance=2e-6), actual, expected)


def test_none_trains_with_the_kernels_on_nvidia(monkeypatch):
    """Only in functions that are traced for a mesh of such devices."""
    inputs, _ = scan_inputs(1, 4, 1, 2, 1, 2)
    mesh = make_mesh(devices=jax.devices()[:1])

    def called(inputs):
        found = []

        def scan(inputs):
            jaxpr = jax.make_jaxpr(lambda inputs: ops.ssd_scan(**inputs))(inputs)
            found.extend(name for name, _ in kernel_calls(jaxpr.jaxpr))

        sharded_jit(scan, mesh, axis_rules(mesh)).lower(inputs)
        return found

    assert called(inputs) == []
    monkeypatch.setattr("aim_jax.ops.implementation.TRITON_PLATFORMS", ("cpu",))
    assert called(inputs) == ["ssd_prefill_kernel"]
    assert list(kernel_calls(jax.make_jaxpr(lambda a: ops.ssd_scan(**a))(inputs).jaxpr)) == []


def test_wrong_arguments_are_named():
    inputs, _ = scan_inputs(1, 4, 2, 3, 1, 2)
    with pytest.raises(ValueError, match="ssd_scan: z has shape"):
        kernels.ssd_scan(**inputs | {"z": inputs["z"][..., :2]})
    with pytest.raises(ValueError, match="x is float64, but implementation='triton' expects"):
        kernels.ssd_scan(**inputs | {"x": inputs["x"].astype(np.float64)})
    with pytest.raises(ValueError, match="causal_conv1d: x is float64, but implementation="):
        kernels.causal_conv1d(np.zeros((1, 2, 3)), np.zeros((4, 3)))


# Sizes b, l, c, w; with a state; activation.
CONVOLUTIONS = {
    "two blocks of positions": ((2, 37, 5, 4), False, "silu"),
    "two blocks of channels": ((1, 3, 130, 4), False, "silu"),
    "after other inputs": ((1, 34, 3, 3), True, "silu"),
    "alone": ((1, 5, 2, 2), False, None),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_and_its_gradients(case):
    (b, l, c, w), continued, activation = CONVOLUTIONS[case]
    rng = np.random.default_rng(0)
    shapes = {"x": (b, l, c), "weight": (w, c), "bias": (c,), "initial_state": (b, w - 1, c)}
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if not continued:
        del inputs["initial_state"]
    cotangents = (rng.normal(size=(b, l, c)), rng.normal(size=(b, w - 1, c)))
    convolve = functools.partial(ops.causal_conv1d, activation=activation)
    kernel = functools.partial(convolve, implementation="triton")
    actual = values_and_gradients(kernel, inputs, tuple(t.astype(np.float32) for t in cotangents))
    with jax.enable_x64(True):
        double = jax.tree.map(np.float64, inputs)
        expected = jax.tree.map(np.asarray, values_and_gradients(convolve, double, cotangents))
    jax.tree.map(functools.partial(assert_close, tolerance=1e-6), actual, expected)


def test_convolution_in_bfloat16():
    rng = np.random.default_rng(0)
    x, dy, weight = rng.normal(size=(3, 9, 6))
    x, dy = (t[None].astype(jnp.bfloat16) for t in (x, dy))
    inputs = {"x": x, "weight": weight[:4].astype(np.float32)}
    zeros = np.zeros((1, 3, 6), np.float32)
    kernel = functools.partial(ops.causal_conv1d, implementation="triton")
    (y, _), (gradients,) = values_and_gradients(kernel, inputs, (dy, zeros))
    (y_exact, _), (exact,) = values_and_gradients(ops.causal_conv1d, inputs, (dy, zeros))
    assert (y.dtype, gradients["x"].dtype) == (jnp.bfloat16, jnp.bfloat16)
    jax.tree.map(functools.partial(assert_close, tolerance=2**-8), (y, gradients), (y_exact, exact))


def test_a_model_trains_with_the_kernels(monkeypatch):
    """Loss and gradients on four devices, with rematerialization, beside XLA's on one."""
    config, on_one = small_config(data=2, model=2, fsdp=True), small_config()
    config.model.update(remat="dots", n_layer=1)
    on_one.model.n_layer = 1
    shapes = jax.eval_shape(train.Setup(config, jax.devices()[:4]).new_state).params
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.5 * normal(rng, *x.shape), nn.unbox(shapes))
    expected = gradients(on_one, 1, params)[:2]
    monkeypatch.setattr("aim_jax.ops.implementation.TRITON_PLATFORMS", ("cpu",))
    calls = []
    monkeypatch.setattr(triton_on_cpu, "run", counted(triton_on_cpu.run, calls))
    actual = gradients(config, 4, params)[:2]
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), actual, expected)
    assert set(calls) == {
        "ssd_outputs_kernel", "ssd_inputs_gradient_kernel", "ssd_weights_gradient_kernel",
        "conv_outputs_kernel", "conv_gradients_kernel",
    }  # fmt: skip


def counted(run, calls):
    def call(*arrays, fn, **options):
        calls.append(fn.fn.__name__)
        return run(*arrays, fn=fn, **options)

    return call


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_spills(arch, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_benchmark.knobs.cache, "dir", str(tmp_path))
    spills = {
        (model, dtype, case.name): kernel_benchmark.compile_case(case, arch).spill
        for model, config in PRESETS.items()
        for dtype in ("bfloat16", "float32")
        for case in kernel_benchmark.training_cases(config, 8, dtype)
    }
    assert spills == dict.fromkeys(spills, 0)


def test_the_train_step_of_gpus_has_the_kernels():
    """Four of them, that are not here: what each calls, and no array (q, q) per head in memory."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="`make test` brings XLA's GPU compiler")
    config = small_config(data=2, model=2)
    config.model.update(
        num_tokens=128, chunk_size=128, d_model=64, headdim=16, compute_dtype="bfloat16"
    )
    devices = topology("4xH100")
    setup = train.Setup(config, devices)
    with compiling_kernels_for(devices[0]):
        lowered = setup.train_step.lower(*setup.abstract_arguments())
        text = lowered.compile().as_text()
    assert {name for name, _, _ in cuda_calls(lowered)} == {
        "ssd_outputs_kernel", "ssd_inputs_gradient_kernel", "ssd_weights_gradient_kernel",
        "conv_outputs_kernel", "conv_gradients_kernel",
    }  # fmt: skip
    # Rows and heads of one device, and its scores.
    rows, heads = config.batch_size // 2, setup.model.n_heads // 2
    assert f"f32[{rows},1,1,128,128]" in text
    assert not re.findall(rf"\w+\[{rows},(?:1,)*{heads},(?:1,)*128,128\]", text)
