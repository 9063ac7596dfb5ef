"""Prompts among servers, some of which are gone for good. No server is real here; test_vllm.py has those."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from jaxrl import config
from jaxrl.errors import InputError, RunError
from jaxrl.models import Config
from jaxrl.sampling.client import BadAnswer, Refused, ServerError
from jaxrl.sampling.lanes import Ask, share_out
from jaxrl.sampling.transports.files import Files
from jaxrl.sampling.vllm import VLLMSampler
from jaxrl.types import Prompt, Rollout, SamplingParams, silent

MODEL = Config(
    "qwen2", 24, 32, 2, 4, 2, 8, 48, rope_theta=1e4, norm_epsilon=1e-6, tied=True, max_positions=64
)
PROMPTS = [Prompt(str(i), np.array([2, 3], np.int32), "") for i in range(9)]


def make_sampler(urls: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> VLLMSampler:
    """One whose servers have model weights and answer, but for those called "gone"."""

    async def inspect(self: VLLMSampler) -> None: ...

    async def ask(
        self: VLLMSampler,
        url: str,
        prompt: Prompt,
        samples: int,
        params: SamplingParams,
        seed: tuple[int, ...],
    ) -> list[Rollout]:
        if url == "gone":
            raise ServerError("no answer")
        await asyncio.sleep(0.01)
        return [Rollout(prompt, prompt.tokens, np.zeros(2, np.float32), "stop", 0, server=url)] * samples

    monkeypatch.setattr(VLLMSampler, "_inspect_all", inspect)
    monkeypatch.setattr(VLLMSampler, "_ask", ask)
    section = config.Sampler(concurrency=2, patience_seconds=0)
    sampler = VLLMSampler(urls, Files(MODEL, folder), section, say=silent)
    sampler._version = 0
    return sampler


def test_a_server_that_is_gone_fails_nothing_that_others_can_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = make_sampler(["gone", "here"], tmp_path, monkeypatch)
    groups = sampler.generate(PROMPTS, 2, SamplingParams(), (0,))
    sampler.close()
    assert [[rollout.prompt for rollout in group] for group in groups] == [[p, p] for p in PROMPTS]
    assert {rollout.server for group in groups for rollout in group} == {"here"}


def test_no_server_left_ends_the_run_which_may_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make_sampler(["gone"], tmp_path, monkeypatch)
    with pytest.raises(RunError, match=r"gone: no answer; it was not back after 0 s"):
        sampler.generate(PROMPTS, 2, SamplingParams(), (0,))
    sampler.close()


def share(urls: list[str], ask: Ask, revived: list[str] | None = None) -> dict[int, Refused]:
    """Shares prompts out among servers that do not come back; adds those that were waited for to `revived`."""

    async def revive(url: str, error: ServerError) -> None:
        if revived is not None:
            revived.append(url)
        await asyncio.sleep(0)
        raise RunError(f"{url}: {error}; it was not back")

    work = share_out(9, urls, 8, ask, revive, 0, lambda url, error: None)
    return asyncio.run(asyncio.wait_for(work, 20))


def test_the_lanes_of_a_server_wait_for_it_together() -> None:
    """One after the other, they would wait as many times as long."""
    revived = []

    async def ask(url: str, p: int) -> None:
        raise ServerError("no answer")

    with pytest.raises(RunError, match="it was not back"):
        share(["a", "b"], ask, revived)
    assert sorted(revived) == ["a", "b"]


@pytest.mark.parametrize("how", [BadAnswer, InputError, ServerError])
def test_a_prompt_waits_for_no_server_that_has_left(how: type[Exception]) -> None:
    """One server refuses it, and the other leaves by something else."""

    async def ask(url: str, p: int) -> None:
        await asyncio.sleep(0.01 * p)
        if url == "leaves" and p > 2:
            raise how("wrong")
        if url == "stays" and p == 2:
            raise Refused("too long")
        if url == "leaves":
            await asyncio.sleep(0.2)
            raise how("wrong")

    dropped = share(["leaves", "stays"], ask)
    assert {p: str(error) for p, error in dropped.items()} == {2: "too long"}


def test_an_error_of_the_input_is_what_ends_a_batch_that_no_server_can_finish() -> None:
    async def ask(url: str, p: int) -> None:
        raise {"wrong": InputError, "bad": BadAnswer, "gone": ServerError}[url](url)

    with pytest.raises(InputError, match="wrong"):
        share(["gone", "wrong", "bad"], ask)
    with pytest.raises(RunError, match=r"bad: bad|gone: gone; it was not back"):
        share(["gone", "bad"], ask)


def test_what_is_no_error_of_a_server_ends_the_batch() -> None:
    async def ask(url: str, p: int) -> None:
        raise KeyError(p)

    with pytest.raises(KeyError):
        share(["a", "b"], ask)
