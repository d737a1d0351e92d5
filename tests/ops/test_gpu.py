"""On an NVIDIA GPU: the Triton kernels beside their references, and the engines beside the modules.

JAX_PLATFORMS=cuda,cpu pytest -m gpu
"""

import json
import math

import jax
import pytest

from aim_jax.ops.triton_availability import triton_unavailable_because
from benchmarks import gpu_day

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("JAX sees no GPU here; where there is one, set JAX_PLATFORMS=cuda,cpu")
    if reason := triton_unavailable_because():
        pytest.skip(reason)


@pytest.mark.parametrize(
    "cases", [gpu_day.kernel_cases, gpu_day.engine_cases], ids=["kernels", "engines"]
)
def test_the_device_computes_what_the_references_do(cases, tmp_path):
    """Values and, where a kernel has them, gradients; logits and samples of a two-layer model."""
    record = gpu_day.Record(tmp_path / "results.json", math.inf)
    for name, case in cases(gpu_day.REAL):
        assert record.run(name, case), record.cases[name]
    failed = {name: result for name, result in record.cases.items() if "failed" in result}
    assert record.cases and not failed, json.dumps(failed, indent=1)
