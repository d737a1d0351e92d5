"""Memory traffic of hand-written programs whose bytes are known."""

import pytest

from aim_jax.perf.hlo import Program


def traffic(entry: str, *computations: str) -> int:
    """Bytes of a program: instructions of its entry, and computations before it."""
    body = "\n".join(f"  {line}" for line in entry.strip().splitlines())
    return Program(
        "\n".join([*computations, f"ENTRY %main () -> f32[] {{\n{body}\n}}\n"])
    ).memory_traffic()


def fused(body: str) -> str:
    """Computation `f` of a fusion."""
    lines = "\n".join(f"  {line}" for line in body.strip().splitlines())
    return f"%f (p: f32[]) -> f32[] {{\n{lines}\n}}\n"


LAYER = 4 * 8 * 16  # bytes of a layer of the stacked arrays
STACKED = """
%stack = f32[24,8,16]{2,1,0} parameter(0)
%row = f32[8,16]{1,0} parameter(1)
%i = s32[] parameter(2)
"""
UPDATE = """
%p0 = f32[24,8,16]{2,1,0} parameter(0)
%p1 = f32[8,16]{1,0} parameter(1)
%p2 = s32[] parameter(2)
%zero = s32[] constant(0)
%new = f32[1,8,16]{2,1,0} bitcast(%p1)
"""
CALL = "%y = f32[24,8,16]{2,1,0} fusion(%stack, %row, %i), kind=kLoop, calls=%f"


def test_a_fusion_that_updates_a_layer_in_place_moves_that_layer():
    root = "ROOT %u = f32[24,8,16]{2,1,0} dynamic-update-slice(%p0, %new, %p2, %zero, %zero)"
    assert traffic(STACKED + CALL, fused(UPDATE + root)) == 2 * LAYER + 4
    # Behind bitcasts, and as one of several results.
    root = """
%flat = f32[24,128]{1,0} bitcast(%p0)
%part = f32[1,128]{1,0} bitcast(%p1)
%u = f32[24,128]{1,0} dynamic-update-slice(%flat, %part, %p2, %zero)
%whole = f32[24,8,16]{2,1,0} bitcast(%u)
%twice = f32[8,16]{1,0} add(%p1, %p1)
ROOT %t = (f32[24,8,16]{2,1,0}, f32[8,16]{1,0}) tuple(%whole, %twice)
"""
    call = CALL.replace("= f32[24,8,16]{2,1,0}", "= (f32[24,8,16]{2,1,0}, f32[8,16]{1,0})")
    assert traffic(STACKED + call, fused(UPDATE + root)) == 3 * LAYER + 4
    # It adds to the layer that it reads.
    root = """
%old = f32[1,8,16]{2,1,0} dynamic-slice(%p0, %p2, %zero, %zero), dynamic_slice_sizes={1,8,16}
%sum = f32[1,8,16]{2,1,0} add(%old, %new)
ROOT %u = f32[24,8,16]{2,1,0} dynamic-update-slice(%p0, %sum, %p2, %zero, %zero)
"""
    assert traffic(STACKED + CALL, fused(UPDATE + root)) == 3 * LAYER + 4


def test_a_fusion_that_makes_the_array_it_updates_writes_all_of_it():
    root = """
%value = f32[] constant(0)
%empty = f32[24,8,16]{2,1,0} broadcast(%value), dimensions={}
ROOT %u = f32[24,8,16]{2,1,0} dynamic-update-slice(%empty, %new, %p2, %zero, %zero)
"""
    assert traffic(STACKED + CALL, fused(UPDATE + root)) == 24 * LAYER + LAYER + 4
    root = """
%doubled = f32[24,8,16]{2,1,0} add(%p0, %p0)
ROOT %u = f32[24,8,16]{2,1,0} dynamic-update-slice(%doubled, %new, %p2, %zero, %zero)
"""
    assert traffic(STACKED + CALL, fused(UPDATE + root)) == 2 * 24 * LAYER + LAYER + 4


def test_a_slice_is_read_through_elementwise_operations():
    root = """
%narrow = bf16[24,8,16]{2,1,0} convert(%p0)
%turned = bf16[24,16,8]{2,1,0} transpose(%narrow), dimensions={0,2,1}
%s = bf16[1,16,8]{2,1,0} dynamic-slice(%turned, %p2, %zero, %zero), dynamic_slice_sizes={1,16,8}
%both = bf16[1,16,8]{2,1,0} multiply(%s, %s)
%wide = bf16[5,16,8]{2,1,0} broadcast(%both), dimensions={0,1,2}
ROOT %r = f32[5,16,8]{2,1,0} convert(%wide)
"""
    call = CALL.replace("f32[24,8,16]{2,1,0} fusion", "f32[5,16,8]{2,1,0} fusion")
    # The layer and the index are read; the row is not used.
    assert traffic(STACKED + call, fused(UPDATE + root)) == LAYER + 4 + 5 * LAYER


def test_a_slice_is_read_in_a_nested_fusion():
    """As TPU programs have them: a product reads the layer that a fusion inside of it slices."""
    nested = """%g (q: f32[]) -> f32[] {
  %q0 = f32[24,8,16]{2,1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %none = s32[] constant(0)
  ROOT %s = f32[1,8,16]{2,1,0} dynamic-slice(%q0, %q1, %none, %none), dynamic_slice_sizes={1,8,16}
}
"""
    root = """
%layer = f32[1,8,16]{2,1,0} fusion(%p0, %p2), kind=kLoop, calls=%g
%matrix = f32[8,16]{1,0} bitcast(%layer)
ROOT %product = f32[8,8]{1,0} dot(%matrix, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
"""
    call = CALL.replace("f32[24,8,16]{2,1,0} fusion", "f32[8,8]{1,0} fusion")
    assert traffic(STACKED + call, nested, fused(UPDATE + root)) == 2 * LAYER + 4 + 4 * 8 * 8


def test_reductions_and_products_read_everything():
    root = """
%value = f32[] constant(0)
%sums = f32[24]{0} reduce(%p0, %value), dimensions={1,2}, to_apply=%add
ROOT %s = f32[1]{0} dynamic-slice(%sums, %p2), dynamic_slice_sizes={1}
"""
    call = CALL.replace("f32[24,8,16]{2,1,0} fusion", "f32[1]{0} fusion")
    assert traffic(STACKED + call, fused(UPDATE + root)) == 24 * LAYER + 4 + 4


def test_a_scatter_in_place_reads_and_writes_its_rows():
    entry = """
%table = f32[1000,64]{1,0} parameter(0)
%rows = s32[7,1]{1,0} parameter(1)
%g = f32[7,64]{1,0} parameter(2)
%y = f32[1000,64]{1,0} fusion(%table, %rows, %g), kind=kInput, calls=%f
"""
    body = """
%p0 = f32[1000,64]{1,0} parameter(0)
%p1 = s32[7,1]{1,0} parameter(1)
%p2 = f32[7,64]{1,0} parameter(2)
ROOT %s = f32[1000,64]{1,0} scatter(%p0, %p1, %p2), update_window_dims={1}, to_apply=%add
"""
    assert traffic(entry, fused(body)) == 3 * 4 * 7 * 64 + 4 * 7
    call = "fusion(%table, %rows, %g), kind=kInput, calls=%f"
    alone = "scatter(%table, %rows, %g), update_window_dims={1}, to_apply=%add"
    assert traffic(entry.replace(call, alone)) == 3 * 4 * 7 * 64


KERNEL = """
%state = f32[24,8,16]{2,1,0} parameter(0)
%weight = f32[24,100]{1,0} parameter(1)
%x = f32[8,100]{1,0} parameter(2)
%layer = s32[] parameter(3)
%y = (f32[8,16]{1,0}, f32[24,8,16]{2,1,0}) custom-call(%x, %weight, %layer, %state)"""
ALIAS = ", output_to_operand_aliasing={{1}: (3, {})}"


@pytest.mark.parametrize("in_place", [True, False])
def test_a_kernel_on_stacked_arrays_moves_one_layer(in_place):
    x, y = 4 * 8 * 100, 4 * 8 * 16
    text = KERNEL + ', custom_call_target="k"' + (ALIAS if in_place else "")
    layers = 1 if in_place else 24  # without an alias nothing says that it is in place
    assert traffic(text) == x + y + 4 + layers * (4 * 100 + 2 * LAYER)


def test_a_kernel_without_an_index_updates_whole_arrays():
    entry = """
%state = f32[24,8,16]{2,1,0} parameter(0)
%y = f32[24,8,16]{2,1,0} custom-call(%state), output_to_operand_aliasing={{}: (0, {})}
"""
    assert traffic(entry) == 2 * 24 * LAYER
