"""Prompts among servers, some of which are gone for good. No server is real here; test_vllm.py has those."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from jaxrl import config
from jaxrl.errors import RunError
from jaxrl.models import Config
from jaxrl.sampling.client import ServerError
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
