"""The real programs as the GPU's own compiler leaves them: `make aot`, on any machine.

R1-Distill-Qwen-1.5B in JustRL's recipe, whole: bytes, operands of matrix products, copies and collectives of the update
and of the scoring pass; for TPUs, bytes. How long they take is benchmarks/update_aot.py's question.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest

from jaxrl import aot, config, hlo
from jaxrl.grpo.packing import without_terms
from jaxrl.hardware import HARDWARE
from jaxrl.parallel.mesh import mesh_over
from jaxrl.plan import KNOWN
from jaxrl.programs import Programs, build_programs, peak_bytes
from jaxrl.types import Gather, Remat

pytestmark = pytest.mark.aot
RECIPE = Path(__file__).parents[1] / "recipes" / "justrl-deepseek-1.5b.toml"
MODEL = next(iter(KNOWN.values()))
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Case:
    """A program, and the bytes that it may take of each device."""

    most: float
    hardware: str = "H100"
    devices: int = 8
    hosts: int = 1
    remat: Remat = "products"
    gather: Gather = "step"
    stream: int = 32_768
    scoring: bool = False
    more: tuple[str, ...] = ()  # of the recipe


CASES = {
    "products": Case(72 * GB),
    "score": Case(10 * GB, scoring=True),
    "a100": Case(30 * GB, hardware="A100", remat="attention"),
}
SLOW = {
    "a100_products": Case(72 * GB, hardware="A100"),
    "a100_score": Case(10 * GB, hardware="A100", scoring=True),
    "full": Case(27 * GB, remat="full"),
    "attention": Case(30 * GB, remat="attention"),
    "projections": Case(36 * GB, remat="projections"),
    "terms": Case(
        72 * GB, more=("--kl.coefficient", "1e-3", "--entropy.bonus", "1e-3", "--entropy.quantile", "0.8")
    ),
    "none": Case(100 * GB, remat="none", stream=16_384),
    "layer": Case(62 * GB, gather="layer"),
    "one": Case(50 * GB, devices=1, remat="attention"),
    "two_hosts": Case(72 * GB, devices=16, hosts=2),
    "many": Case(72 * GB, devices=256, hosts=32),
}
# of 95 and 32 GB; libtpu itself refuses a program that takes more
TPU = {
    "v5p": Case(40 * GB, hardware="v5p", remat="attention", stream=16_384),
    "v6e": Case(31 * GB, hardware="v6e", remat="attention", stream=16_384),
    "v6e_score": Case(10 * GB, hardware="v6e", stream=16_384, scoring=True),
}
ALL = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is left of a case once it is compiled."""

    case: Case
    bytes: int
    size: int  # characters of the program
    costs: list[hlo.Cost]  # every loop with a dynamic number of trips taken once
    twice: list[hlo.Cost]  # and taken twice


@functools.cache
def compiled(name: str) -> Compiled:
    case = (CASES | SLOW | TPU)[name]
    if not aot.available(case.hardware):
        pytest.skip(f"no compiler for {case.hardware} here: make aot")
    changes = ["--model.remat", case.remat, "--mesh.gather", case.gather, "--mesh.data", str(case.hosts)]
    changes += ["--packing.stream_tokens", str(case.stream), *case.more]
    recipe = config.load(RECIPE, changes)
    mesh = mesh_over(aot.devices(case.hardware, case.devices, case.hosts), recipe.mesh.data)
    programs: Programs = build_programs(recipe, MODEL, mesh)
    state, batch = programs.abstract_state(), programs.abstract_batch(case.stream)
    if case.scoring:
        program = programs.logprobs.lower(state.params, without_terms(batch)).compile()
    else:
        program = programs.update.lower(state, batch).compile()
    text = program.as_text()
    parsed, hardware = hlo.parse(text), HARDWARE[case.hardware]
    once, twice = (hlo.costs(parsed, hardware, lambda _, n=n: hlo.Loop(n)) for n in (1, 2))
    return Compiled(case, peak_bytes(program), len(text), once, twice)


@pytest.mark.parametrize("name", [*ALL, *(pytest.param(name, marks=pytest.mark.slow) for name in TPU)])
def test_fits(name: str) -> None:
    assert compiled(name).bytes < compiled(name).case.most


@pytest.mark.parametrize("name", ALL)
def test_matrix_products_take_half_precision(name: str) -> None:
    """All but tiny ones: tensor cores multiply float32 at half the rate or, to full precision, not at all."""
    found = compiled(name)
    assert sum(cost.flops.get("bf16", 0) for cost in found.costs) > 1e14
    assert not [cost for cost in found.costs if cost.flops.get("f32", 0) / max(cost.times, 1) > 1e9]


@pytest.mark.parametrize("name", ALL)
def test_no_loop_copies_streams(name: str) -> None:
    """None in attention's loops over segments. In the scan over layers there are some, which cost next to nothing but
    where all is kept for the backward pass."""
    found = compiled(name)
    stream = found.case.stream * MODEL.kv_heads * MODEL.head_dim  # elements of a stream's keys
    copies = [c for c in found.twice if c.op == "copy" and c.times > 1 and c.arrays[0].size >= stream]
    # twice through a device's micro-batches; a loop over segments inside of it would make it four times
    assert not [c for c in copies if c.times > 2 * MODEL.layers]
    share = sum(c.seconds for c in copies) / sum(c.seconds for c in found.twice)
    assert share < (0.06 if found.case.remat == "none" else 0.02)


@pytest.mark.parametrize("name", ALL)
def test_logits_of_a_stream_never_exist(name: str) -> None:
    found = compiled(name)
    largest = max(
        array.size for cost in found.costs for array in cost.arrays if MODEL.vocab_size in array.shape
    )
    assert largest <= config.load(RECIPE).packing.logprob_chunk * MODEL.vocab_size < found.case.stream * 1e5


@pytest.mark.parametrize("name", ALL)
def test_collectives_are_where_the_design_has_them(name: str) -> None:
    """Once an update with gather = "step"; with "layer" also in the scan over layers, forward and backward, of which
    the compiler may take one trip apart."""
    found = compiled(name)
    large = [cost for cost in found.costs if cost.sent / max(cost.times, 1) > 1e6]
    if found.case.devices == 1:
        assert not large
        return
    times, of_layers = {cost.times for cost in large}, {MODEL.layers - 1, MODEL.layers}
    assert 1 in times and (times - {1} <= of_layers) and (times > {1}) == (found.case.gather == "layer")
    kinds = {cost.op.removesuffix("-start") for cost in large}
    assert kinds <= {"all-gather", "reduce-scatter", "all-reduce"}
    assert ("all-reduce" in kinds) == (found.case.hosts > 1 and not found.case.scoring)


@pytest.mark.slow
def test_256_devices_take_no_more_than_16() -> None:
    """Neither bytes on each device, nor a larger program to compile."""
    many, few = compiled("many"), compiled("two_hosts")
    assert many.bytes <= few.bytes
    assert many.size < 1.1 * few.size
