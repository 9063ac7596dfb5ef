"""The default recipe's programs are those from before there were techniques: the same operations, the same bytes."""

from __future__ import annotations

import re
from collections import Counter

import jax
import plain
import pytest

from jaxrl import config
from jaxrl.grpo import logprobs, update
from jaxrl.models import Config
from jaxrl.parallel.mesh import mesh_over
from jaxrl.programs import build_programs, peak_bytes

MODEL = Config("qwen2", 72, 20, 2, 4, 2, 6, 24, 1e4, 1e-6, tied=True, max_positions=64)
SIZES = {
    "model": {"dtype": "float32", "remat": "full"},
    "data": {"max_prompt_tokens": 8},
    "rollout": {"prompts": 4, "samples": 4, "max_tokens": 24},
    "optimizer": {"minibatch_prompts": 2},
    "packing": {"stream_tokens": 64, "bucket_tokens": 16, "logprob_chunk": 32, "segments": 8},
}
Program = tuple[Counter[str], int]


def programs(devices: int, more: dict[str, dict[str, object]]) -> dict[str, Program]:
    """Operations with their types, and bytes, of each program."""
    found = build_programs(config.from_dict(SIZES | more), MODEL, mesh_over(jax.devices()[:devices]))
    state, batch = found.abstract_state(), found.abstract_batch(64)
    lowered = {
        "update": found.update.lower(state, batch),
        "logprobs": found.logprobs.lower(state.params, batch),
    }
    return {
        name: (operations(program.as_text()), peak_bytes(program.compile()))
        for name, program in lowered.items()
    }


def operations(text: str) -> Counter[str]:
    """Lines without the names of values and functions."""
    return Counter(re.sub(r"[%@][\w#:.]+", "_", line).strip() for line in text.splitlines())


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_techniques_that_are_off_cost_no_operation_and_no_byte(
    devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = programs(devices, {})
    with_terms = programs(devices, {"entropy": {"bonus": 0.01}})
    monkeypatch.setattr(update._OnDevice, "_loss", plain.loss)
    monkeypatch.setattr(update._OnDevice, "logprobs", plain.logprobs)
    logprobs._token_logprobs.defvjp(logprobs._forward, plain.backward)
    try:
        before = programs(devices, {})
    finally:
        logprobs._token_logprobs.defvjp(logprobs._forward, logprobs._backward)
    assert now == before
    assert with_terms["update"] != before["update"]  # so a difference would show
