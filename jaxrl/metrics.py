"""The metrics of a step, from what its phases left behind. Arithmetic only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float

from jaxrl import config
from jaxrl.grpo.mismatch import mismatch, ratio_quantiles
from jaxrl.hardware import HARDWARE
from jaxrl.models import decoder
from jaxrl.telemetry import agreement
from jaxrl.types import Groups

# What compares sampler and trainer starts so.
MISMATCH = ("sampler/logprob_diff", "sampler/ratio", "sampler/k3_kl", "sampler/ess")

Measured = Mapping[str, np.ndarray]  # an update's metrics, on the host


@dataclasses.dataclass(frozen=True)
class Record:
    """What is reported of a step."""

    sampled: Groups  # [N][G], all groups
    groups: Groups  # [P][G] that were trained on
    rescued: int  # groups that got a right answer of an earlier step
    rounds: int  # of sampling
    refused: int  # prompts that the sampler refused
    passes: float  # through the prompts of the present order so far
    stale: bool  # whether older parameters sampled some
    rate: float  # of the optimizer
    updates: Sequence[Measured]  # of each update, in order
    sampling_seconds: float = 0.0  # of this process, maybe during an earlier step
    phases: dict[str, float] = dataclasses.field(default_factory=dict)  # time/PHASE: seconds
    seconds: float = 0.0  # from the first phase to the last

    def timed(self, sampling_seconds: float, phases: dict[str, float], seconds: float) -> Record:
        return dataclasses.replace(self, sampling_seconds=sampling_seconds, phases=phases, seconds=seconds)


def step_metrics(recipe: config.Recipe, model: decoder.Config, step: int, record: Record) -> dict[str, float]:
    """All metrics of a step that follow from its record; `step` is 0 for the first."""
    metrics = rollout_metrics(record.sampled) | update_metrics(record.updates)
    metrics |= record.phases | sampler_metrics(record, step) | group_metrics(recipe, record)
    if record.stale and recipe.sampler.correction == "none":  # the trainer's log-probs were not computed
        metrics |= {name: np.nan for name in metrics if name.startswith(MISMATCH)}
    metrics |= {
        "data/epochs": record.passes,
        "update/learning_rate": record.rate,
        "time/step": record.seconds,
        "perf/devices": float(jax.device_count()),
    }
    return metrics | performance(model, record)


def rollout_metrics(groups: Groups) -> dict[str, float]:
    """Means over all rollouts of a step, [N][G], those that are not trained on included.

    Correctness is the verifier's score alone; what a reward has besides does not change it.
    """
    flat = [rollout for group in groups for rollout in group]
    lengths = np.array([len(r.tokens) for r in flat])
    rewards = np.array([r.reward for r in flat])
    right = np.array([[rollout.score > 0 for rollout in group] for group in groups])
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/accuracy": float(right.mean()),
        "reward/undecided_fraction": float(np.mean([r.undecided for r in flat])),
        "groups/all_correct_fraction": float(right.all(axis=1).mean()),
        "groups/all_wrong_fraction": float((~right).all(axis=1).mean()),
        "response/length_mean": float(lengths.mean()),
        "response/length_min": float(lengths.min()),
        "response/length_max": float(lengths.max()),
        "response/length_mean_right": _mean(lengths[right.ravel()]),
        "response/length_mean_wrong": _mean(lengths[~right.ravel()]),
        "response/truncated_fraction": float(np.mean([r.finish_reason == "length" for r in flat])),
        "prompt/length_mean": float(np.mean([len(r.prompt.tokens) for r in flat])),
    } | function_metrics([r.rewards for r in flat if r.rewards is not None])


def function_metrics(rewards: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of the values that the recipe's functions gave, by name, and the share of rollouts where one failed.

    Args:
      rewards: of each rollout; NaN where a function failed.
    """
    if not rewards:
        return {}
    found: dict[str, float] = {}
    for name in sorted({name for each in rewards for name in each}):
        known = [each[name] for each in rewards if name in each and not np.isnan(each[name])]
        found[f"reward/{name}/mean"] = float(np.mean(known)) if known else np.nan
    failed = [any(map(np.isnan, each.values())) for each in rewards]
    return found | {"reward/failed_fraction": float(np.mean(failed))}


def _mean(values: Float[np.ndarray, " N"]) -> float:
    """NaN of no values."""
    return float(values.mean()) if len(values) else np.nan


def group_metrics(recipe: config.Recipe, record: Record) -> dict[str, float]:
    """What a filter and a rescue made of the groups; nothing where the recipe has neither."""
    found: dict[str, float] = {}
    if recipe.groups.filter != "none":
        found["groups/sampled"] = float(len(record.sampled) + record.refused)
        found["groups/rounds"] = float(record.rounds)
        found["groups/trained"] = float(len(record.groups))
        found["groups/trained_fraction"] = len({id(group) for group in record.groups}) / len(record.sampled)
    if recipe.groups.rescue:
        found["groups/rescued_fraction"] = record.rescued / len(record.sampled)
    return found


def sampler_metrics(record: Record, step: int) -> dict[str, float]:
    """How the step's batch was sampled; seconds are this process's."""
    rollouts = [r for group in record.sampled for r in group]
    tokens, versions = sum(len(r.tokens) for r in rollouts), [r.version for r in rollouts]
    return {
        "time/sampling": record.sampling_seconds,
        "perf/sampling_tokens_per_second": tokens / record.sampling_seconds,
        "sampler/tokens": float(tokens),
        "sampler/refused": float(record.refused),
        "sampler/staleness": float(step - np.mean(versions)),
        "sampler/staleness_max": float(step - min(versions)),
    }


def update_metrics(updates: Sequence[Measured]) -> dict[str, float]:
    """Means over a step's updates, weighted by trained tokens where they are means over tokens; maxima and counts."""

    def values(name: str) -> Float[np.ndarray, " U"]:
        return np.array([float(u[name]) for u in updates])

    def mean(name: str, counts: Float[np.ndarray, " U"] | None = None) -> float:
        counts = tokens if counts is None else counts
        trained = np.where(counts > 0, values(name) * counts, 0)
        return float(np.sum(trained) / counts.sum()) if counts.sum() else np.nan

    if not updates:  # no group was left to train on
        counts = dict.fromkeys(("update/tokens", "update/sequences", "update/skipped"), 0.0)
        return counts | {agreement.METRIC: np.nan}
    tokens = values("tokens")
    terms = {"policy/kl_reference": mean("kl", values("kl_tokens"))} if "kl" in updates[0] else {}
    # the dual clip's, verl's "lower", would be read as the lower bound's
    clipped = {"": "", "_low": "_low", "_high": "_high", "_dual": "_lower"}
    terms |= {
        f"update/clip_fraction{side}": float(np.nanmean(values(f"clip_fraction{own}")))
        for side, own in clipped.items()
    }
    sums = {name: float(values(f"mismatch_{name}").sum()) for name in ("k3", "ratio", "square")}
    k3, ess = mismatch(**sums, tokens=float(tokens.sum()))
    ratios = np.sum([u["ratio_histogram"] for u in updates], axis=0)
    low, median, high = ratio_quantiles(ratios, (0.01, 0.5, 0.99))
    return {
        "policy/entropy": mean("entropy"),
        "update/loss": float(values("loss").mean()),
        "update/grad_norm": float(values("grad_norm").mean()),
        "update/approx_kl": mean("approx_kl"),
        "update/ratio_max": float(values("ratio_max").max()),
        "update/skipped": float(values("skipped").sum()),
        "update/tokens": float(tokens.sum()),
        "update/sequences": float(values("sequences").sum()),
        "sampler/logprob_diff_mean": mean("logprob_diff_mean"),
        "sampler/logprob_diff_max": float(values("logprob_diff_max").max()),
        "sampler/k3_kl": k3,
        "sampler/ess": ess,
        "sampler/ratio_p01": low,
        "sampler/ratio_p50": median,
        "sampler/ratio_p99": high,
    } | terms


def performance(model: decoder.Config, record: Record) -> dict[str, float]:
    """Tokens a second of the whole step, and the update's model FLOPs over the devices' peak where it is known."""
    lengths = np.array([len(r.prompt.tokens) + len(r.tokens) for g in record.groups for r in g], float)
    speed = float(lengths.sum() / record.seconds)  # of those trained on
    metrics = {
        "perf/tokens_per_second": speed,
        "perf/tokens_per_second_per_device": speed / jax.device_count(),
    }
    kind = jax.devices()[0].device_kind
    peak = next((hardware.flops for name, hardware in HARDWARE.items() if name in kind), None)
    if peak and len(lengths):
        dense, attended = decoder.forward_flops(model)
        forward = dense * lengths.sum() + attended * (lengths**2).sum() / 2
        share = sum(float(u["sequences"]) for u in record.updates) / len(lengths)
        seconds = record.phases["time/update"]
        metrics["perf/mfu"] = float(3 * forward * share / (seconds * peak * jax.device_count()))
    return metrics
