"""The client of vLLM servers, with a server made up here: what it answers, and in which order."""

from __future__ import annotations

import _thread
import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.sampling import vllm
from jaxrl.sampling.vllm import SUPPORTED, VLLMSampler
from jaxrl.types import JsonObject, Prompt, Rollout, SamplingParams, silent

URL = "http://made-up"
SAMPLING = SamplingParams(max_tokens=4, stop_ids=(1,))
PROMPTS = [Prompt(str(p), np.array([p], np.int32), "") for p in range(6)]


class Server:
    """Answers as vLLM does; `asked` has the prompts so far."""

    def __init__(self) -> None:
        self.asked = list[int]()
        self.tokens = 4
        self.arrived = threading.Event()  # that a second request is here

    async def get(self, url: str, route: str, limit: float = 1.0) -> JsonObject:
        if route == "/version":
            return {"version": f"{SUPPORTED}.0"}
        if route == "/weight_info":
            return {"weight_version": "0"}
        return {"vllm_config": {"weight_transfer_config": {"backend": "made up"}}}

    async def order(self, *args: object, **_: object) -> JsonObject:
        return {}

    async def post(self, url: str, route: str, body: JsonObject, limit: float) -> JsonObject | str:
        count = min(self.tokens, body["sampling_params"]["max_tokens"])
        if "cache_salt" in body:
            self.asked.append(body["token_ids"][0])
            if len(self.asked) > 1:
                self.arrived.set()
        choice = {
            "index": 0,
            "token_ids": [5] * count,
            "logprobs": {"content": [{"logprob": 0.0}] * count},
            "weight_versions": [{"version": "0"}],
            "finish_reason": "length",
        }
        await asyncio.sleep(0)
        return {"choices": [choice]}

    async def close(self) -> None: ...


class Transport:
    backend = "made up"

    def prepare(self, *_: object) -> None: ...
    def done(self) -> None: ...
    async def greet(self, *_: object) -> None: ...
    async def connect(self, *_: object) -> None: ...
    async def deliver(self, *_: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr(vllm, "Client", lambda: made)
    return made


@pytest.fixture
def sampler(server: Server) -> Iterator[VLLMSampler]:
    section = config.Sampler(concurrency=1, patience_seconds=3)
    transport: Any = Transport()
    opened = VLLMSampler([URL], transport, section, say=silent)
    opened.publish({}, 0)  # type: ignore[arg-type]  # the transport looks at none
    yield opened
    opened.close()


def test_marking_does_not_stop_the_requests(sampler: VLLMSampler, server: Server) -> None:
    waited = list[bool]()

    def mark(rollout: Rollout) -> Rollout:
        if rollout.prompt.id == "0":  # a comparison that takes until the next request is there
            waited.append(server.arrived.wait(20))
        return rollout

    groups = sampler.generate(PROMPTS, 1, SAMPLING, (1,), mark)
    assert waited == [True] and [len(group) for group in groups] == [1] * 6


def test_what_marking_raises_reaches_the_caller(sampler: VLLMSampler) -> None:
    def mark(rollout: Rollout) -> Rollout:
        raise InputError("no such verifier")

    with pytest.raises(InputError, match="no such verifier"):
        sampler.generate(PROMPTS, 1, SAMPLING, (1,), mark)


def test_a_server_of_a_short_context_is_named_and_not_asked_for_ever(
    sampler: VLLMSampler, server: Server
) -> None:
    server.tokens = 2
    with pytest.raises(
        InputError, match=r"made-up cut a completion at 1 \+ 2 tokens; start it with --max-model-len 5"
    ):
        sampler.generate(PROMPTS, 1, SAMPLING, (1,))
    assert len(server.asked) == 1


def test_an_interruption_loses_no_answer(sampler: VLLMSampler, server: Server) -> None:
    called = list[int]()

    def keep(rollout: Rollout) -> Rollout:
        called.append(int(rollout.prompt.id))
        if len(called) == 1:
            assert server.arrived.wait(20)
            time.sleep(0.2)  # the other answers come
            _thread.interrupt_main()
        return rollout

    with pytest.raises(KeyboardInterrupt):
        sampler.generate(PROMPTS, 1, SAMPLING, (1,), keep)
    assert called == server.asked and len(called) == len(PROMPTS)
