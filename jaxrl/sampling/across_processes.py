"""Sampling by all processes of a run: each samples its share of the prompts, then all get every rollout."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxrl.models.decoder import Params
from jaxrl.parallel import processes
from jaxrl.sampling.sampler import Sampler, no_more, unchanged
from jaxrl.sampling.transports.base import Transport
from jaxrl.types import Groups, OnGroup, OnRollout, Prompt, Rollout, SamplingParams

LONGEST = 24 * 3600.0  # seconds that processes wait for the slowest; one that is gone is noticed sooner


def share(count: int, index: int, parts: int) -> range:
    """The prompts that process `index` of `parts` samples: contiguous, and as even as can be."""
    return range(count * index // parts, count * (index + 1) // parts)


class Shared:
    """The samplers of all processes: `generate` samples this process's share; `gather` returns the rollouts of all."""

    def __init__(self, sampler: Sampler, samplers: int) -> None:
        """
        Args:
          sampler: this process's own.
          samplers: number of processes that sample, which are the first ones.
        """
        self._sampler, self._samplers = sampler, samplers

    @property
    def alone(self) -> bool:
        """Whether a single process samples, so that it knows every group."""
        return self._samplers == 1

    def publish(self, params: Params, version: int) -> None:
        self._sampler.publish(params, version)

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        params: SamplingParams,
        seed: tuple[int, ...],
        on_rollout: OnRollout = unchanged,
        on_group: OnGroup = no_more,
        first: int = 0,
    ) -> list[list[Rollout]]:
        """Rollouts of this process's share of the prompts; see `Sampler.generate`. With `on_group` it is `alone`."""
        own = share(len(prompts), jax.process_index(), self._samplers)
        chosen = prompts[own.start : own.stop]
        return self._sampler.generate(chosen, samples, params, seed, on_rollout, first + own.start, on_group)

    def gather(self, own: list[list[Rollout]], prompts: Sequence[Prompt], name: str) -> list[list[Rollout]]:
        """Rollouts of all prompts, in every process; waits for the process that samples the longest.

        Args:
          own: what `generate` returned.
          prompts: all of them, as `generate` was given them, and then those that were asked for more.
          name: of the rollouts, unique in the run; error messages have it.
        """
        if jax.process_count() == 1:
            return own
        processes.barrier(f"the rollouts of {name}", LONGEST)
        return from_bytes(processes.exchange(to_bytes(own)), prompts)


class Follower:
    """The sampler of processes other than 0: it only joins the collectives that gather the parameters."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def publish(self, params: Params, version: int) -> None:
        self._transport.follow(params)

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        params: SamplingParams,
        seed: tuple[int, ...],
        on_rollout: OnRollout = unchanged,
        first: int = 0,
        on_group: OnGroup = no_more,
    ) -> list[list[Rollout]]:
        """Nothing: this process's share of the prompts is empty."""
        return []


def to_bytes(groups: Groups) -> bytes:
    """Rollouts as NumPy arrays, without pickled objects, and without the prompts, which every process has."""
    flat = [rollout for group in groups for rollout in group]
    names = sorted({name for r in flat for name in r.rewards or ()})
    with io.BytesIO() as file:
        np.savez(
            file,
            samples=np.array([len(group) for group in groups], np.int32),
            lengths=np.array([len(r.tokens) for r in flat], np.int32),
            tokens=np.concatenate([np.zeros(0, np.int32), *(r.tokens for r in flat)]),
            logprobs=np.concatenate([np.zeros(0, np.float32), *(r.logprobs for r in flat)]),
            scores=np.array([r.score for r in flat], np.float64),
            undecided=np.array([r.undecided for r in flat], bool),
            rewards=np.array([r.reward for r in flat], np.float64),
            versions=np.array([r.version for r in flat], np.int64),
            stopped=np.array([r.finish_reason == "stop" for r in flat], bool),
            **(_rewards(flat, names) if names else {}),  # type: ignore[arg-type]  # of savez's own options
        )
        return file.getvalue()


def _rewards(rollouts: Sequence[Rollout], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The values of reward functions: their names [K], and for each rollout [B, K] values and whether it has them."""
    each = [r.rewards or {} for r in rollouts]
    return {
        "parts": np.array(names, str),
        "values": np.array([[own.get(name, np.nan) for name in names] for own in each], np.float64),
        "has": np.array([[name in own for name in names] for own in each], bool),
    }


def from_bytes(parts: Sequence[bytes], prompts: Sequence[Prompt]) -> list[list[Rollout]]:
    """Rollouts of all prompts, from each process's `to_bytes` in order."""
    groups: list[list[Rollout]] = []
    for part in parts:
        with np.load(io.BytesIO(part), allow_pickle=False) as file:
            arrays = dict(file)
        ends = np.cumsum(arrays["lengths"])
        first = 0
        for samples in arrays["samples"]:
            prompt, numbers = prompts[len(groups)], range(first, first + samples)
            groups.append([_rollout(prompt, arrays, i, int(ends[i])) for i in numbers])
            first += samples
    return groups


def _rollout(prompt: Prompt, arrays: Mapping[str, np.ndarray], i: int, end: int) -> Rollout:
    """Rollout i of `to_bytes`, whose tokens end before `end`."""
    tokens = slice(end - int(arrays["lengths"][i]), end)
    rewards: dict[str, float] | None = None
    if "parts" in arrays:
        parts = zip(arrays["parts"], arrays["values"][i], arrays["has"][i], strict=True)
        rewards = {str(name): float(value) for name, value, has in parts if has}
    return Rollout(
        prompt,
        arrays["tokens"][tokens],
        arrays["logprobs"][tokens],
        "stop" if arrays["stopped"][i] else "length",
        version=int(arrays["versions"][i]),
        score=float(arrays["scores"][i]),
        undecided=bool(arrays["undecided"][i]),
        reward=float(arrays["rewards"][i]),
        rewards=rewards,
    )
