"""Executables that are compiled before they are needed."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import background, config
from jaxrl.errors import InputError
from jaxrl.grpo import packing
from jaxrl.models import Config, initialize
from jaxrl.models.decoder import parameters
from jaxrl.parallel.mesh import mesh_over, to_devices
from jaxrl.prepare import needs_logprobs
from jaxrl.programs import SHARE, Jitted, Program, Programs, build_programs, peak_bytes, require_room
from jaxrl.types import Prompt, Rollout

TINY = Config("qwen2", 16, 8, 1, 2, 1, 4, 16, 1e4, 1e-6, True, 64)
RECIPE = config.from_dict({
    "model": {"dtype": "float32", "remat": "none"},
    "data": {"max_prompt_tokens": 8},
    "rollout": {"prompts": 2, "samples": 8, "max_tokens": 8},
    "optimizer": {"minibatch_prompts": 2},
    "packing": {"stream_tokens": 32, "bucket_tokens": 16, "logprob_chunk": 16, "segments": 4},
})  # fmt: skip


@pytest.fixture
def programs() -> Programs:
    return build_programs(RECIPE, TINY, mesh_over(jax.devices()[:2]))


def batch_of(programs: Programs, stream: int) -> packing.PackedBatch:
    """A mini-batch in streams of that length."""
    rng = np.random.default_rng(0)
    layout = dataclasses.replace(programs.layout, streams=(stream,))
    rollouts = [
        Rollout(Prompt("", ids[:3], ""), ids[3:], -rng.random(9, np.float32), "stop", 0)
        for ids in rng.integers(0, 16, (16, 12)).astype(np.int32)
    ]
    packed = packing.pack(rollouts, rng.normal(size=16), programs.mesh.size, layout, learning_rate=0.01)
    return to_devices(packed, programs.mesh)


def test_a_reference_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside parameters and two moments in float32; half of a number where the model computes in bfloat16."""
    recipe = config.from_dict({"kl": {"coefficient": 0.1}})
    bytes_needed = parameters(TINY) / 2 * (12 + 2)  # on each of two devices
    for room, fits in ((bytes_needed, True), (bytes_needed - 1, False)):
        monkeypatch.setattr("jaxrl.programs.device_bytes", lambda _, room=room: room)
        require_room(config.Recipe(), TINY, mesh_over(jax.devices()[:2]))  # none without a KL term
        if fits:
            require_room(recipe, TINY, mesh_over(jax.devices()[:2]))
        else:
            with pytest.raises(
                InputError, match=r"kl.coefficient = 0.1: its reference takes .* raise mesh.fsdp"
            ):
                require_room(recipe, TINY, mesh_over(jax.devices()[:2]))


class OnlyLowered:
    """A jitted function that is compiled ahead, and never called."""

    def __init__(self, function: Jitted) -> None:
        self.lower = function.lower

    def __call__(self, *_: object) -> None:
        pytest.fail("it is compiled at the call")


def test_calls_take_what_was_compiled_ahead_and_change_no_bit(
    programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = programs.update.function, programs.logprobs.function
    assert programs.layout.streams == (16, 32) and not background.busy()
    expected, state = [], programs.init_state(initialize(TINY, 0, scale=0.3))
    for stream in (16, 32):
        batch = batch_of(programs, stream)
        batch = batch.replace(old_logprobs=functions[1](state.params, batch).logprobs)
        state, metrics = functions[0](state, batch)
        expected.append(jax.device_get((batch.old_logprobs, state, metrics)))
    with programs.compile_ahead():
        for program in (programs.update, programs.logprobs):
            monkeypatch.setattr(program, "function", OnlyLowered(program.function))
        state = programs.init_state(initialize(TINY, 0, scale=0.3))
        for stream, wanted in zip((16, 32), expected, strict=True):
            batch, donated = batch_of(programs, stream), state
            batch = batch.replace(old_logprobs=programs.logprobs(state.params, batch).logprobs)
            state, metrics = programs.update(state, batch)
            jax.tree.map(np.testing.assert_array_equal, (batch.old_logprobs, state, metrics), wanted)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    assert programs.waited() > 0 == programs.waited()


class Lowered:
    """Stands in for a program; compiling it waits for `gate`, and then fails where there is an error."""

    def __init__(self, gate: threading.Event, error: Exception | None = None) -> None:
        self.gate, self.error = gate, error
        self.calls = list[tuple[str, int]]()

    def __call__(self, state: object, batch: packing.PackedBatch) -> str:
        return "not ahead"

    def lower(self, state: object, batch: packing.PackedBatch) -> Lowered:
        self.calls.append((threading.current_thread().name, batch.tokens.shape[-1]))
        self.first = batch.tokens.shape[-1] == 32
        return self

    def compile(self) -> object:
        if self.first:
            self.gate.wait()
        if self.error:
            raise self.error
        return lambda state, batch: "ahead"


def with_stand_in(programs: Programs, function: Lowered) -> Programs:
    return dataclasses.replace(programs, update=Program("update", function))


def test_the_longest_comes_first_and_a_call_waits_for_its_own_alone(programs: Programs) -> None:
    function = Lowered(threading.Event())
    programs = with_stand_in(programs, function)
    with programs.compile_ahead(logprobs=False):
        assert programs.update({}, batch_of(programs, 16)) == "ahead"  # while the longest is compiled
        more = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch_of(programs, 32).tokens)
        unforeseen = batch_of(programs, 32).replace(tokens=more)
        assert programs.update({}, unforeseen) == "not ahead"
        function.gate.set()
        assert programs.update({}, batch_of(programs, 32)) == "ahead"
    assert function.calls == [(background.NAME, 32), (background.NAME, 16)]
    assert not programs.logprobs.executables


def test_an_executable_that_is_there_is_kept(programs: Programs) -> None:
    function, ready, batch = Lowered(threading.Event()), Future(), batch_of(programs, 32)
    ready.set_result(lambda state, batch: "given")
    programs = with_stand_in(programs, function)
    programs.update.executables[batch.tokens.shape] = ready
    with programs.compile_ahead(logprobs=False):
        assert programs.update({}, batch) == "given"
        assert programs.update({}, batch_of(programs, 16)) == "ahead"


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        ("RESOURCE_EXHAUSTED: 90G of 80G", InputError, r"^compiling update .* 32 tokens ran out of memory \(RES.*90G"),
        ("INTERNAL: a bug", jax.errors.JaxRuntimeError, "INTERNAL"),
    ],
)  # fmt: skip
def test_an_error_is_raised_where_its_program_is_needed(
    programs: Programs, error: str, raised: type[Exception], text: str
) -> None:
    gate = threading.Event()
    gate.set()
    programs = with_stand_in(programs, Lowered(gate, jax.errors.JaxRuntimeError(f"{error}\nmore")))
    with programs.compile_ahead(logprobs=False), pytest.raises(raised, match=text) as caught:
        programs.update({}, batch_of(programs, 32))
    assert raised is not InputError or "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, False),
        ({"optimizer": {"minibatch_prompts": 1}}, True),
        ({"sampler": {"correction": "masked"}}, True),
        ({"loss": {"skip_first_old_logprobs": False}}, True),
    ],
)
def test_logprobs_is_needed_where_the_recipe_can_call_it(changes: dict, needed: bool) -> None:
    values = config.to_dict(RECIPE)
    for section, own in changes.items():
        values[section] = {**values[section], **own}
    assert needs_logprobs(config.from_dict(values)) == needed


def test_auto_recomputes_the_least_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiler's count, with all mini-batches; the executable that was counted is the one that runs."""
    values = config.to_dict(RECIPE)
    values["model"]["remat"] = "auto"
    values["rollout"]["prompts"] = 3 * values["optimizer"]["minibatch_prompts"]
    recipe = config.from_dict(values)

    def built(room: float) -> tuple[Programs, str]:
        said: list[str] = []
        monkeypatch.setattr("jaxrl.programs.device_bytes", lambda _: room / SHARE)
        return build_programs(recipe, TINY, mesh_over(jax.devices()[:2]), said.append), said[0].split()[1]

    programs, chosen = built(1e12)
    assert chosen == "products,"
    batch = programs.abstract_batch(programs.layout.streams[-1])
    needed = peak_bytes(programs.update.executables[batch.tokens.shape].result())
    of_one = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch)) // 2  # devices
    needed += 2 * of_one  # those of the other mini-batches
    assert built(needed)[1] == "products,"
    assert built(needed - 1)[1] != "products,"
    least, chosen = built(1)
    assert chosen == "full,"
    assert not least.update.executables
