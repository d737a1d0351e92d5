"""What compiled programs move, analytic operations, and programs for devices that are not here."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from aim_jax.cli import compile as aot
from aim_jax.models import PRESETS, AiM, AiMConfig
from aim_jax.models.aim import init_params
from aim_jax.ops import ssd_scan
from aim_jax.parallel.sharding import make_mesh
from aim_jax.perf import accelerators as hardware
from aim_jax.perf.accelerators import accelerator, peak_flops, topology
from aim_jax.perf.flops import executed_flops, forward_flops, training_flops
from aim_jax.perf.footprint import DoesNotFitError, Footprint
from aim_jax.perf.hlo import Program
from tests.parallel.test_sharding import small_config


def compiled(fn, *args):
    return Program(jax.jit(fn).lower(*args).compile().as_text())


def test_collectives_count_as_often_as_a_loop_runs():
    mesh = make_mesh(8, 1)
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "data")))
    w = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, P("data", None)))

    def five_products(x, w):
        split = NamedSharding(mesh, P(None, "data"))

        def body(x, _):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), split), None

        return jax.lax.scan(body, x, length=5)[0]

    found = compiled(five_products, x, w).collectives()
    # A product over a sharded axis: sums of (16, 64), by whichever collective the compiler takes.
    assert sum(runs for runs, _ in found.values()) == 5
    each = 16 * 64 * 4 * 7 / 8
    assert sum(sent for _, sent in found.values()) in (5 * each, 10 * each)


def test_memory_traffic_counts_parts_where_parts_are_touched():
    n = 2**16
    x = jax.ShapeDtypeStruct((n,), jnp.float32)
    assert compiled(lambda x, y: x + y, x, x).memory_traffic() == 3 * 4 * n

    def write_rows(buffer, row):
        def body(i, buffer):
            return jax.lax.dynamic_update_slice(buffer, (row * i)[None], (i, 0))

        return jax.lax.fori_loop(0, 16, body, buffer)

    buffer = jax.ShapeDtypeStruct((16, n), jnp.float32)
    program = Program(jax.jit(write_rows, donate_argnums=0).lower(buffer, x).compile().as_text())
    rows = program.memory_traffic() / (16 * 4 * n)  # per round, in rows
    assert 1.9 < rows < 3.5  # the row read, and written; never the 16 of the buffer


TPU_TEXT = """HloModule step, is_scheduled=true

%gather_part (p: bf16[1,8]) -> bf16[4,8] {
  %p = bf16[1,8]{1,0} parameter(0)
  ROOT %g.1 = bf16[4,8]{1,0} all-gather(%p), channel_id=3, replica_groups=mesh['a'=4,'b'=2] {'a'}
}

%gather_rest (q: bf16[1,8]) -> bf16[4,8] {
  %q = bf16[1,8]{1,0} parameter(0)
  ROOT %g.2 = bf16[4,8]{1,0} all-gather(%q), channel_id=3, replica_groups=mesh['a'=4,'b'=2] {'a'}
}

%cond (s: (s32[], bf16[1,8])) -> pred[] {
  %s = (s32[], bf16[1,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (t: (s32[], bf16[1,8])) -> (s32[], bf16[1,8]) {
  %t = (s32[], bf16[1,8]{1,0}) parameter(0)
  %x = bf16[1,8]{1,0} get-tuple-element(%t), index=1
  %start = bf16[4,8]{1,0:S(1)} fusion(%x), kind=kCustom, calls=%gather_part
  %done = bf16[4,8]{1,0:S(1)} fusion(%x), kind=kCustom, calls=%gather_rest
  %hop = (bf16[1,8]{1,0}, bf16[1,8]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=9
  %hopped = bf16[1,8]{1,0} collective-permute-done(%hop)
  %j = s32[] get-tuple-element(%t), index=0
  ROOT %next = (s32[], bf16[1,8]{1,0}) tuple(%j, %hopped)
}

ENTRY %main (a: bf16[1,8]) -> bf16[1,8] {
  %a = bf16[1,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %first = (s32[], bf16[1,8]{1,0}) tuple(%zero, %a)
  %loop = (s32[], bf16[1,8]{1,0}) while(%first), condition=%cond, body=%body
  ROOT %out = bf16[1,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_the_text_of_a_tpu_program_is_understood():
    """A collective that two fusions share counts once; what stays on the chip is not traffic."""
    program = Program(TPU_TEXT)
    assert program.collectives() == {
        "all-gather": (6, 6 * 64 * 3 // 4),
        "collective-permute": (6, 6 * 16),
    }
    hops = 6 * (16 + 8)  # the result, and two counters
    assert program.memory_traffic() == 6 * 2 * 16 + hops
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        Program("module @jit_f {}")
    with pytest.raises(ValueError, match=r"loop condition cond has the constants"):
        Program(TPU_TEXT.replace("constant(6)", "parameter(1)"))


def dot_flops(jaxpr) -> float:
    """Operations of all products of a jaxpr, loops included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[i] for i in contracted)
            total += 2 * equation.outvars[0].aval.size * inner
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                total += times * dot_flops(inner)
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"chunk_size": 256},
        {"adaln": "group", "num_groups": 2, "ngroups": 2},
        {"d_intermediate": 200},
    ],
    ids=["chunks", "one chunk", "groups", "mlp"],
)  # fmt: skip
def test_analytic_flops_are_those_of_the_products(changes):
    config = AiMConfig(
        **{"vocab_size": 96, "num_classes": 5, "d_model": 64, "n_layer": 3, "d_state": 32,
           "headdim": 16, "num_tokens": 256} | changes
    )  # fmt: skip
    codes, labels = jnp.zeros((2, 256), jnp.int32), jnp.zeros(2, jnp.int32)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def forward(params):
        return AiM(config).apply({"params": params}, codes, labels)

    counted = dot_flops(jax.make_jaxpr(forward)(params).jaxpr)
    # The sums of the decays, and their use on scores, are products too. Pairs of positions of one
    # block are multiplied twice. Nothing reads the last state of a single chunk.
    c, u, k = (4, 4, 16) if config.chunk_size == 64 else (1, 16, 16)  # chunks, blocks, positions
    sums = c * config.n_heads * (u * k * (k + 1) ** 2 + u * (u + 1) ** 2 + (u * k) ** 2)
    twice = 256 * k * (config.ngroups * config.d_state + config.d_inner)
    unread = 256 * config.d_inner * config.d_state * (c == 1)
    assert counted == 2 * (forward_flops(config) + 2 * config.n_layer * (sums + twice + unread))


def test_analytic_flops_of_the_paper_models():
    expected = {"B": 176.4, "L": 560.4, "XL": 1190.0, "1B": 2052.9}  # chunks of 64 tokens
    for name, config in PRESETS.items():
        assert training_flops(config) / 1e9 == pytest.approx(expected[name], abs=0.05)
    assert executed_flops(AiMConfig()) == training_flops(AiMConfig())
    full = executed_flops(AiMConfig(remat="full"))
    assert 1.2 < full / training_flops(AiMConfig()) < 4 / 3
    assert training_flops(AiMConfig()) < executed_flops(AiMConfig(remat="dots")) < full
    assert executed_flops(AiMConfig(logits_chunk=256)) == training_flops(AiMConfig())  # one chunk
    assert executed_flops(AiMConfig(logits_chunk=128)) > training_flops(AiMConfig())


def test_accelerators_by_name():
    assert accelerator("NVIDIA A100-SXM4-80GB").memory == 80 * 2**30
    assert accelerator("NVIDIA A100-SXM4-40GB").memory == 40 * 2**30
    assert accelerator("TPU v5 lite").flops == 197e12 and accelerator("TPU v5").flops == 459e12
    assert accelerator("TPU v5e").flops == 197e12 and accelerator("TPU v6e").flops == 918e12
    assert accelerator("NVIDIA H100 PCIe").flops < accelerator("NVIDIA H100 80GB HBM3").flops
    assert accelerator("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None
    assert accelerator("cpu") is None and peak_flops(jax.devices()) is None


def test_topologies_that_cannot_be_had(monkeypatch):
    for name in ("v7:4x4", "v5e-17", "v5e:16", "9xA200", "8xA100"):
        with pytest.raises(
            ValueError, match=f"topology '{name}'.*expected a TPU slice by its shape"
        ):
            topology(name)
    with pytest.raises(ValueError, match="with 2 slices"):
        topology("8xH100", 2)
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'aim_jax\[tpu\]'"):
        topology("v5p-32")
    version = re.escape(jax.__version__)
    with pytest.raises(ValueError, match=f"jax-cuda13-pjrt=={version}, then set PYTHONPATH=cuda"):
        topology("8xH100")


def check_report(found, config, output):
    assert found["fits"] and "(modelled)" in output
    # Data parallelism exchanges the gradients of all parameters, and little else.
    params = jax.eval_shape(lambda: init_params(AiMConfig(**config.model), jax.random.key(0)))
    size = sum(4 * x.size for x in jax.tree.leaves(params))
    assert size <= sum(sent for _, sent in found["training"]["collectives"].values()) < 2 * size
    # Arguments are whole on every device: parameters, two moments, averages.
    assert 4 * size < found["training"]["arguments"] < 5 * size
    assert found["generation"]["temporaries"] > 0


def test_report_of_a_step_and_of_generation(capsys, monkeypatch):
    """With the devices that are here in the place of others."""
    chip = hardware.Accelerator(1e12, 2**30, 1e11, 1e10)
    monkeypatch.setitem(hardware.ACCELERATORS, "cpu", chip)
    monkeypatch.setattr(aot, "topology", lambda name, slices: jax.devices()[:2])
    config = small_config(data=2)
    found = aot.report(config, "two", 1, search=False)
    check_report(found, config, capsys.readouterr().err)


def test_search_for_micro_batches_that_fit(capsys, monkeypatch):
    monkeypatch.setattr(aot, "topology", lambda name, slices: jax.devices()[:2])
    monkeypatch.setattr(aot, "peak_flops", lambda devices: 2e12)

    def needs(room, config, devices):
        if config.accumulate == 1:
            raise DoesNotFitError("Used 20 of 16")
        return Footprint(0, 32 // config.accumulate, 0, room, {}, 1.0, 2.0, 0.5)

    for room, fits, tried in ((8, True, [2, 4]), (7, False, [2, 4])):
        monkeypatch.setattr(aot, "training", functools.partial(needs, room))
        config = small_config(data=2)
        found = aot.report(config, "two", 0, search=True)
        output = capsys.readouterr().err
        assert found["fits"] == fits and "DOES NOT FIT: Used 20 of 16" in output
        assert [n for n in (2, 4, 8) if f"config.accumulate={n}" in output] == tried
    assert Footprint(0, 0, 0, 0, {}, 1.0, 2.0, 0.5).seconds == 3.0


@pytest.mark.slow  # two programs through XLA's GPU compiler take minutes on two cores
def test_report_for_gpus_that_are_not_here(capsys):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="`make test` brings XLA's GPU compiler")
    config = small_config(data=2)
    found = aot.report(config, "2xA100-80G", 1, search=False)
    output = capsys.readouterr().err
    assert "2 x NVIDIA A100-SXM4-80GB" in output
    check_report(found, config, output)


@pytest.mark.slow  # XLA's GPU compiler takes seconds for each
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("l, h, p, n, chunk", [(256, 24, 64, 128, 256), (77, 3, 32, 20, 64)])
def test_gradients_of_the_scan_compile_for_gpus(l, h, p, n, chunk, dtype):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="`make test` brings XLA's GPU compiler")
    sharding = jax.sharding.SingleDeviceSharding(topology("1xH100")[0])

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def loss(x, dt, A, B, C):
        return jnp.sum(ssd_scan(x, dt, A, B, C, chunk_size=chunk)[0].astype(jnp.float32))

    arguments = (array(2, l, h, p), array(2, l, h, dtype="float32"), array(h, dtype="float32"),
                 array(2, l, 1, n), array(2, l, 1, n))  # fmt: skip
    program = compiled(jax.grad(loss, range(5)), *arguments)
    # The squares of scores and decays, stored once per head, have the dtype of x.
    stored = " ".join(x.shape for name in program.runs for x in program.computations[name].values())
    squares = set(re.findall(rf"(\w+)\[{2 * h},{l},{l}\]", stored))
    assert l > chunk or squares == {"f32" if dtype == "float32" else "bf16"}


@pytest.mark.slow  # a program through XLA's TPU compiler takes a minute on two cores
@pytest.mark.parametrize("slices", [1, 2])
def test_report_for_tpus_that_are_not_here(capsys, slices):
    pytest.importorskip("libtpu", reason="XLA's TPU compiler is in the tpu extra")
    config = small_config(slices=slices)
    found = aot.report(config, "v5e:2x2", 0, search=False)
    assert found["fits"] and f"{4 * slices} x TPU v5 lite" in capsys.readouterr().err
