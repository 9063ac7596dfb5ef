"""The roofline over compiled programs, on one written by hand whose every cost is known."""

from __future__ import annotations

import pytest

from jaxrl import hlo
from jaxrl.hardware import Hardware

# a FLOP takes 1 s, a byte 1 s; the elementwise rate is flops / 32, so that rows of 4 stay cheap
SLOW = Hardware(flops=1.0, bandwidth=1.0, memory=1e9, nvlink=1.0, network=1.0)
FAST_MEMORY = Hardware(flops=1.0, bandwidth=1e9, memory=1e9, nvlink=1.0, network=1.0)
FAST_PRODUCTS = Hardware(flops=1e9, bandwidth=1.0, memory=1e9, nvlink=1.0, network=1.0)

PROGRAM = """HloModule jit_step, is_scheduled=true

%product (a: bf16[4,8], b: bf16[8,2]) -> f32[4,2] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[8,2]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%window (whole: f32[100,4], at: s32[]) -> f32[1,4] {
  %whole = f32[100,4]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice.1 = f32[1,4]{1,0} dynamic-slice(%whole, %at, %zero), dynamic_slice_sizes={1,4}
}

%in_place (whole: f32[100,4], part: f32[1,4], at: s32[]) -> f32[100,4] {
  %whole = f32[100,4]{1,0} parameter(0)
  %part = f32[1,4]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %write.1 = f32[100,4]{1,0} dynamic-update-slice(%whole, %part, %at, %zero)
}

%body (carry: (s32[], f32[100,4])) -> (s32[], f32[100,4]) {
  %carry = (s32[], f32[100,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[100,4]{1,0} get-tuple-element(%carry), index=1
  %row = f32[1,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%window
  %written = f32[100,4]{1,0} fusion(%x, %row, %i), kind=kLoop, calls=%in_place
  ROOT %next = (s32[], f32[100,4]{1,0}) tuple(%i, %written)
}

%condition (carry: (s32[], f32[100,4])) -> pred[] {
  %carry = (s32[], f32[100,4]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (p: bf16[4,8], q: bf16[8,2], s: (s32[], f32[100,4])) -> f32[4,2] {
  %p = bf16[4,8]{1,0} parameter(0)
  %q = bf16[8,2]{1,0} parameter(1)
  %s = (s32[], /*index=1*/f32[100,4]{1,0}) parameter(2)
  %x = f32[100,4]{1,0} get-tuple-element(%s), index=1
  %at = s32[] get-tuple-element(%s), index=0
  %copy-beside = ((f32[100,4]{1,0}, s32[]), f32[1,4]{1,0}, u32[]) fusion-start(%x, %at), kind=kLoop, calls=%window
  %made = f32[4,2]{1,0} fusion(%p, %q), kind=kCustom, calls=%product, metadata={op_name="jit(step)/mlp/dot_general"}
  %copied = f32[1,4]{1,0} fusion-done(%copy-beside)
  %static = (s32[], f32[100,4]{1,0}) while(%s), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %dynamic = (s32[], f32[100,4]{1,0}) while(%static), condition=%condition, body=%body, \
metadata={op_name="jit(step)/padded_4/while"}
  %gathered = bf16[8,8]{1,0} all-gather(%p), dimensions={0}
  ROOT %copy.1 = f32[4,2]{1,0} copy(%made)
}
"""


def costs(hardware: Hardware = SLOW) -> dict[tuple[str, float], hlo.Cost]:
    """By name and times."""

    def loop(scope: str) -> hlo.Loop:
        assert scope == "jit(step)/padded_4/while"
        return hlo.Loop(5)

    found = hlo.costs(hlo.parse(PROGRAM), hardware, loop)
    return {(cost.name, cost.times): cost for cost in found}


def test_products_count_flops_and_bytes() -> None:
    made = costs()["made", 1]
    assert made.flops == {"bf16": 2 * 4 * 2 * 8}
    assert made.bytes == 2 * (4 * 8 + 8 * 2) + 4 * 4 * 2
    assert made.scope == "jit(step)/mlp/dot_general"
    assert [[array.shape for array in dot] for dot in made.dots] == [[(4, 8), (8, 2)]]


def test_a_kernel_takes_what_is_slower() -> None:
    flops, moved = 2 * 4 * 2 * 8, 2 * (4 * 8 + 8 * 2) + 4 * 4 * 2
    assert costs(FAST_MEMORY)["made", 1].seconds == flops
    assert costs(FAST_PRODUCTS)["made", 1].seconds == moved


def test_loops_count_their_trips() -> None:
    found = costs()
    assert {name for name, times in found if times == 3} == {"row", "written"}
    assert {name for name, times in found if times == 5} == {"row", "written"}


def test_windows_and_updates_in_place_move_no_whole_array() -> None:
    found = costs()
    # a row of four and its index
    assert found["row", 3].bytes == 3 * (16 + 16 + 4)
    assert found["written", 3].bytes == 3 * (16 + 16 + 4)


def test_copies_beside_a_product_take_the_bandwidth_that_it_leaves() -> None:
    flops, moved = 2 * 4 * 2 * 8, 2 * (4 * 8 + 8 * 2) + 4 * 4 * 2
    alone = 16 + 16 + 4
    bound_by_memory = costs(FAST_PRODUCTS)["copy-beside", 1]
    assert (bound_by_memory.seconds, bound_by_memory.hidden) == (alone, 0)
    # as fast as its memory: nothing is left; with half of its time left, the copy hides there
    assert costs()["copy-beside", 1].hidden == min(alone, max(0, flops - moved))
    half = Hardware(flops=flops / (2 * moved), bandwidth=1.0, memory=1e9, nvlink=1.0, network=1.0)
    beside = costs(half)["copy-beside", 1]
    assert (beside.seconds, beside.hidden) == pytest.approx((0, alone))


def test_collectives_send_and_take_no_time() -> None:
    gathered = costs()["gathered", 1]
    assert (gathered.sent, gathered.seconds, gathered.bytes) == (2 * 8 * 8, 0, 0)


def test_an_unfinished_line_is_an_error() -> None:
    with pytest.raises(ValueError, match="open parenthesis"):
        hlo.parse("%f (x: f32[2]) -> f32[2] {\n  %y = f32[2]{0} negate(%x\n}")
