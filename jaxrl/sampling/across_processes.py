"""Rollouts among the processes of a run: each samples its share of the prompts, and then all have everything."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxrl.parallel import processes
from jaxrl.sampling.sampler import Sampler
from jaxrl.sampling.transports.base import Transport
from jaxrl.types import Prompt, Rollout, SamplingParams

LONGEST = 24 * 3600.0  # seconds; a process that is gone is noticed sooner


def share(count: int, process: int, processes: int) -> range:
    """The prompts that one process samples: contiguous, and as even as can be."""
    return range(count * process // processes, count * (process + 1) // processes)


class Shared:
    """The samplers of all processes as one: `generate` samples the own share, `gather` has everyone's."""

    def __init__(self, sampler: Sampler, processes: int):
        """Args: processes: how many sample, the first ones."""
        self._sampler, self._processes = sampler, processes

    def publish(self, params: Any, version: int) -> None:
        self._sampler.publish(params, version)

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        params: SamplingParams,
        seed: tuple[int, ...],
        each: Callable[[Rollout], Rollout],
    ) -> list[list[Rollout]]:
        """Rollouts of this process's share of the prompts; see `Sampler.generate`."""
        own = share(len(prompts), jax.process_index(), self._processes)
        return self._sampler.generate(prompts[own.start : own.stop], samples, params, seed, each, own.start)

    def gather(self, own: list[list[Rollout]], prompts: Sequence[Prompt], name: str) -> list[list[Rollout]]:
        """Rollouts of all prompts, at every process, which may wait long for whoever samples the longest."""
        if jax.process_count() == 1:
            return own
        processes.barrier(f"the rollouts of {name}", LONGEST)
        return from_bytes(processes.exchange(to_bytes(own)), prompts)


class Follower:
    """Of a process that leaves the talking to the first one: takes part in making weights whole."""

    def __init__(self, transport: Transport):
        self._transport = transport

    def publish(self, params: Any, version: int) -> None:
        self._transport.follow(params)

    def generate(self, *_: Any) -> list[list[Rollout]]:
        return []


def to_bytes(groups: Sequence[Sequence[Rollout]]) -> bytes:
    """NumPy arrays, without pickled objects, and without the prompts, which every process has."""
    flat = [rollout for group in groups for rollout in group]
    with io.BytesIO() as file:
        np.savez(
            file,
            samples=np.array([len(group) for group in groups], np.int32),
            lengths=np.array([len(r.tokens) for r in flat], np.int32),
            tokens=np.concatenate([np.zeros(0, np.int32), *(r.tokens for r in flat)]),
            logprobs=np.concatenate([np.zeros(0, np.float32), *(r.logprobs for r in flat)]),
            scores=np.array([r.score for r in flat], np.float64),
            penalties=np.array([r.penalty for r in flat], np.float64),
            versions=np.array([r.version for r in flat], np.int64),
            stopped=np.array([r.finish_reason == "stop" for r in flat], bool),
        )
        return file.getvalue()


def from_bytes(parts: Sequence[bytes], prompts: Sequence[Prompt]) -> list[list[Rollout]]:
    """What all processes sampled, for all prompts in order."""
    groups: list[list[Rollout]] = []
    for part in parts:
        with np.load(io.BytesIO(part), allow_pickle=False) as arrays:
            a = dict(arrays)
        ends = np.cumsum(a["lengths"])
        at = 0
        for samples in a["samples"]:
            prompt = prompts[len(groups)]
            groups.append([
                Rollout(
                    prompt, a["tokens"][ends[i] - a["lengths"][i] : ends[i]],
                    a["logprobs"][ends[i] - a["lengths"][i] : ends[i]], "stop" if a["stopped"][i] else "length",
                    int(a["versions"][i]), float(a["scores"][i]), float(a["penalties"][i]),
                )
                for i in range(at, at + samples)
            ])  # fmt: skip
            at += samples
    return groups
