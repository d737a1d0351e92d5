"""Choice of the implementation where jax-triton is missing, broken, or made for another JAX."""

import sys

import pytest
from absl import logging

from aim_jax.models import PRESETS
from aim_jax.ops import triton_availability
from aim_jax.ops.triton_availability import triton_unavailable_because
from aim_jax.sampling import engine
from aim_jax.sampling.engine import Engine, choose_implementation, resolve

INSTALLED = {
    "jax": "0.11.2",
    "jaxlib": "0.11.2",
    "jax-cuda13-plugin": "0.11.2",
    "jax-triton": "0.3.1",
    "triton": "3.7.1",
}


@pytest.fixture
def imported_anew(monkeypatch):
    """The kernels are imported once more, and no earlier answer or warning counts."""
    for name in list(sys.modules):
        if name.startswith("aim_jax.ops.triton") and not name.endswith("availability"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(engine, "newer_than_assembler", lambda: False)
    monkeypatch.setattr(logging, "_log_counter_per_token", {})
    triton_unavailable_because.cache_clear()
    yield
    triton_unavailable_because.cache_clear()


@pytest.fixture
def install(monkeypatch, imported_anew, tmp_path):
    """Stands in for `jax_triton` and `triton`, and for the versions of all packages."""

    def install(code, versions=None):
        monkeypatch.syspath_prepend(tmp_path)
        for name, text in (("triton", ""), ("jax_triton", code)):
            (tmp_path / f"{name}.py").write_text(text)
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delitem(sys.modules, "jax_triton.triton_lib", raising=False)
        known = INSTALLED | (versions or {})
        monkeypatch.setattr(triton_availability, "version_of", known.get)

    return install


def warnings_of_a_choice(monkeypatch):
    """Every line that `choose_implementation` logs while it falls back, twice, to XLA."""
    lines = []
    monkeypatch.setattr(logging, "log", lambda level, text, *args: lines.append(text % args))
    for _ in range(2):
        assert choose_implementation(PRESETS["B"], "cuda") == "xla"
    return lines


def test_what_is_not_installed_is_named(install, monkeypatch):
    install("")
    monkeypatch.setitem(sys.modules, "jax_triton", None)  # as Python marks what cannot be found
    (line,) = warnings_of_a_choice(monkeypatch)
    assert line == (
        "Decoding without fused kernels: jax-triton is not installed: pip install 'aim_jax[cuda]'"
    )


def test_a_plugin_of_another_version_is_named_with_both(install, monkeypatch):
    error = "raise ImportError('jax-triton requires JAX to be installed with GPU support.')"
    install(error, {"jax-cuda13-plugin": "0.10.2"})
    (line,) = warnings_of_a_choice(monkeypatch)
    assert "jax-cuda13-plugin 0.10.2 does not fit jaxlib 0.11.2: pip install" in line


@pytest.mark.parametrize(
    "code, text",
    [
        ("import jax; jax.nothing", "AttributeError: module 'jax' has no attribute 'nothing'"),
        ("import jax.nothing", "ModuleNotFoundError: No module named 'jax.nothing'"),
        ("raise RuntimeError('CUDA driver\\nsecond line')", "RuntimeError: CUDA driver"),
    ],
)
def test_another_failure_is_passed_on_with_the_versions(code, text, install, monkeypatch):
    install(code, {"jax-triton": "9.0"})
    (line,) = warnings_of_a_choice(monkeypatch)
    assert text in line
    assert "jax-triton 9.0, triton 3.7.1, jax 0.11.2" in line
    assert "\n" not in line and "second line" not in line


def test_a_release_without_the_names_that_launch_needs_is_not_used(install, monkeypatch):
    install("__path__ = []")  # imports, and is a package without `triton_lib`
    (line,) = warnings_of_a_choice(monkeypatch)
    assert "jax_triton" in line and "jax-triton 0.3.1" in line


def test_what_is_asked_for_by_name_fails_with_the_cause(install):
    install("raise RuntimeError('CUDA driver')")
    with pytest.raises(ValueError, match=r"implementation='triton': .*RuntimeError: CUDA driver"):
        resolve(Engine(implementation="triton"), PRESETS["B"], 2, "cuda")
    with pytest.raises(ImportError, match=r"aim_jax\.ops\.triton: .*RuntimeError: CUDA"):
        import aim_jax.ops.triton  # noqa: F401


def test_kernels_that_can_be_imported_are_chosen(monkeypatch):
    monkeypatch.setattr(engine, "newer_than_assembler", lambda: False)
    monkeypatch.setattr(engine, "triton_unavailable_because", lambda: "")
    assert choose_implementation(PRESETS["B"], "gpu") == "triton"
    assert resolve(Engine(), PRESETS["B"], 2, "cuda").implementation == "triton"
