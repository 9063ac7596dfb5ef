"""What becomes of a step's groups: which log-probabilities a recipe needs, and what its techniques put in a mini-batch.

The trainer's log-probabilities are stood in for: the sampler's, plus what "parameters" say of each token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import numpy as np
import pytest

from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.grpo import packing
from jaxrl.grpo.advantages import group_advantages
from jaxrl.grpo.update import Likelihoods
from jaxrl.models import decoder
from jaxrl.parallel.mesh import make_mesh, to_devices
from jaxrl.prepare import likelihoods, make_method, minibatches, needs_logprobs
from jaxrl.programs import Programs, build_programs, objective_of
from jaxrl.types import Prompt, Rollout

TINY = decoder.Config("qwen2", 16, 8, 1, 2, 1, 4, 16, 1e4, 1e-6, True, 64)
SIZES = {
    "model": {"remat": "full"},
    "data": {"max_prompt_tokens": 4},
    "rollout": {"prompts": 4, "samples": 3, "max_tokens": 12},
    "optimizer": {"minibatch_prompts": 2},
    "packing": {"stream_tokens": 32, "bucket_tokens": 16, "logprob_chunk": 16, "segments": 4},
}
POLICY, REFERENCE = 0.5, -0.25  # what each adds to the sampler's log-probabilities, by a token's number
RATE = 0.125


def recipe_of(**sections: Mapping[str, object]) -> config.Recipe:
    return config.from_dict(SIZES | {name: {**SIZES.get(name, {}), **own} for name, own in sections.items()})


class Scored:
    """Stands in for `programs.logprobs`; keeps the parameters that it was asked with."""

    def __init__(self, entropies: bool) -> None:
        self.asked: list[float] = []
        self.entropies = entropies

    def __call__(self, params: float, batch: packing.PackedBatch) -> Likelihoods:
        assert not [name for name in packing.Terms._fields if getattr(batch, name) is not None]
        self.asked.append(params)
        moved = batch.sampler_logprobs + params * wave(batch.tokens)
        return Likelihoods(moved, 2.0 + wave(batch.tokens) if self.entropies else None)


def wave(tokens: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    return jax.numpy.sin(tokens * 1.7)


def programs_of(recipe: config.Recipe) -> tuple[Programs, Scored]:
    scored = Scored(entropies=bool(recipe.entropy.quantile))
    built = build_programs(recipe, TINY, make_mesh())
    return dataclasses.replace(built, logprobs=scored), scored


def groups_of(
    right: Mapping[int, set[int]], version: int = 5, cut: set[int] = frozenset()
) -> list[list[Rollout]]:
    """Four groups of three; `right` has the numbers of the right ones in each, `cut` of those that were cut off."""
    rng, groups, number = np.random.default_rng(0), [], 0
    for p in range(4):
        group = []
        for g in range(3):
            ids = rng.integers(1, 16, 12).astype(np.int32)[: rng.integers(3, 12)]
            score = 1.0 if g in right.get(p, set()) else -1.0
            finish = "length" if number in cut else "stop"
            logprobs = -rng.random(len(ids)).astype(np.float32)
            prompt = Prompt(str(p), np.arange(1, 3, dtype=np.int32), "")
            group.append(Rollout(prompt, ids, logprobs, finish, version, score, reward=score))
            number += 1
        groups.append(group)
    return groups


MIXED = {0: {0}, 1: {0, 1}, 2: {2}, 3: {0, 1, 2}}


def prepare(
    recipe: config.Recipe, stale: bool = False, **options: set[int]
) -> tuple[list, Scored, list[Rollout]]:
    """The mini-batches on the host, and how they were scored."""
    programs, scored = programs_of(recipe)
    groups = groups_of(MIXED, **options)
    reference = functools.partial(likelihoods, programs, REFERENCE) if recipe.kl.coefficient else None
    found = minibatches(recipe, make_method(recipe), programs, groups, RATE, POLICY, reference, stale)
    assert {name for name, x in vars(found[0]).items() if x is not None} >= set(programs.terms)
    absent = set(packing.Terms._fields) - set(programs.terms)
    assert not [name for name in absent if getattr(found[0], name) is not None]
    return jax.device_get(found), scored, [rollout for group in groups for rollout in group]


def values(batch: packing.PackedBatch, name: str, rollout: Rollout) -> np.ndarray:
    """The values of a rollout's completion, wherever it lies."""
    whole = np.append(rollout.prompt.tokens, rollout.tokens)
    for g, m in np.ndindex(batch.tokens.shape[:2]):
        for start in batch.starts[g, m][batch.buckets[g, m] >= 0]:
            end = start + len(whole)
            if np.array_equal(batch.tokens[g, m, start:end], whole):
                return getattr(batch, name)[g, m, start + len(rollout.prompt.tokens) : end]
    raise LookupError(rollout.prompt.id)


def moved(rollout: Rollout, by: float) -> np.ndarray:
    return rollout.logprobs + by * np.sin(rollout.tokens * 1.7)


def test_the_plain_recipe_looks_at_nothing_but_rewards() -> None:
    recipe = recipe_of()
    batches, scored, rollouts = prepare(recipe)
    assert scored.asked == [POLICY]  # of the second mini-batch alone
    first, second = batches
    assert first.on_policy.all() and not second.on_policy.any()
    advantages = group_advantages([[r.reward for r in rollouts[i : i + 3]] for i in range(0, 12, 3)]).reshape(
        -1
    )
    for k, batch in enumerate(batches):
        np.testing.assert_array_equal(batch.learning_rate, np.float32(RATE))
        own = rollouts[6 * k : 6 * k + 6]
        total = sum(len(r.tokens) for r in own)
        for rollout, advantage in zip(own, advantages[6 * k :], strict=False):
            if not advantage:
                with pytest.raises(LookupError):
                    values(batch, "weights", rollout)
                continue
            np.testing.assert_allclose(values(batch, "weights", rollout), 1 / total, rtol=1e-6)
            np.testing.assert_allclose(values(batch, "advantages", rollout), advantage, rtol=1e-6)
            if k:
                found = values(batch, "old_logprobs", rollout)
                np.testing.assert_allclose(found, moved(rollout, POLICY), rtol=1e-5)


@pytest.mark.parametrize("correction", ["none", "truncated", "masked"])
@pytest.mark.parametrize("stale", [False, True])
def test_what_ratios_are_relative_to(correction: str, stale: bool) -> None:
    sampler = {"correction": correction, "correction_cap": 1.3}
    sampler |= {"correction_floor": 0.8} if correction == "masked" else {}
    batches, scored, rollouts = prepare(recipe_of(sampler=sampler), stale)
    assert batches[0].on_policy.all() == (correction == "none" and not stale)
    expected = {("none", False): 1, ("none", True): 0}.get((correction, stale), 2)
    assert scored.asked == [POLICY] * expected
    batch, total = batches[1], sum(len(r.tokens) for r in rollouts[6:])
    assert (batch.corrections is None) == (correction == "none")
    for rollout in rollouts[6:9]:  # the last group is all right
        ratio = np.exp(POLICY * np.sin(rollout.tokens * 1.7))
        weight = {"none": np.ones_like(ratio), "truncated": np.minimum(ratio, 1.3)}
        weight["masked"] = np.where((ratio > 1.3) | (ratio < 0.8), 0, ratio)
        old = rollout.logprobs if stale and correction == "none" else moved(rollout, POLICY)
        np.testing.assert_allclose(values(batch, "old_logprobs", rollout), old, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(values(batch, "weights", rollout), 1 / total, rtol=1e-6)
        if correction != "none":
            found = values(batch, "corrections", rollout)
            np.testing.assert_allclose(found, weight[correction], rtol=1e-5)


def test_technique_kl_and_bonus_keep_all_sequences_and_are_weighted_as_the_loss() -> None:
    recipe = recipe_of(
        kl={"coefficient": 0.25}, entropy={"bonus": 0.5}, loss={"normalization": "sequence_mean"}
    )
    batches, scored, rollouts = prepare(recipe)
    assert scored.asked == [REFERENCE, REFERENCE, POLICY]
    for k, batch in enumerate(batches):
        for rollout in rollouts[6 * k : 6 * k + 6]:
            weights = values(batch, "weights", rollout)
            np.testing.assert_allclose(weights, 1 / (6 * len(rollout.tokens)), rtol=1e-6)
            np.testing.assert_allclose(values(batch, "kl_weights", rollout), 0.25 * weights, rtol=1e-6)
            np.testing.assert_allclose(values(batch, "entropy_weights", rollout), 0.5 * weights, rtol=1e-6)
            found = values(batch, "ref_logprobs", rollout)
            np.testing.assert_allclose(found, moved(rollout, REFERENCE), rtol=1e-5, atol=1e-6)


def test_technique_corrections_leave_the_other_terms_alone() -> None:
    sampler = {"correction": "masked", "correction_cap": 1.2, "correction_floor": 0.5}
    batches, _, rollouts = prepare(recipe_of(kl={"coefficient": 0.25}, sampler=sampler))
    total, out = sum(len(r.tokens) for r in rollouts[:6]), 0
    for rollout in rollouts[:6]:
        out += np.sum(values(batches[0], "corrections", rollout) == 0)
        np.testing.assert_allclose(values(batches[0], "weights", rollout), 1 / total, rtol=1e-6)
        np.testing.assert_allclose(values(batches[0], "kl_weights", rollout), 0.25 / total, rtol=1e-6)
    assert out


def test_technique_kl_in_the_reward_is_taken_off_each_token_with_all_later_ones() -> None:
    recipe = recipe_of(kl={"coefficient": 0.5, "place": "reward", "estimator": "k1"})
    batches, scored, rollouts = prepare(recipe)
    assert scored.asked == [POLICY, REFERENCE] * 2
    rewards = np.array([r.reward for r in rollouts]).reshape(4, 3)
    for k, (rollout, advantage) in enumerate(
        zip(rollouts, group_advantages(rewards).reshape(-1), strict=True)
    ):
        cost = 0.5 * (moved(rollout, POLICY) - moved(rollout, REFERENCE))
        expected = [advantage - cost[t:].sum() for t in range(len(cost))]
        found = values(batches[k // 6], "advantages", rollout)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalization", ["token_mean", "sequence_mean"])
def test_technique_gate_by_entropy(normalization: str) -> None:
    """Archer: wide bounds and no KL above the quantile; the KL of the others is averaged over these alone."""
    more = {"loss": {"normalization": normalization, "clip_low": 0.2, "clip_high": 0.3}}
    recipe = recipe_of(entropy={"quantile": 0.6, "clip": 0.5}, kl={"coefficient": 0.25}, **more)
    batches, scored, rollouts = prepare(recipe)
    assert scored.asked == [POLICY, REFERENCE] * 2
    for k, batch in enumerate(batches):
        own = rollouts[6 * k : 6 * k + 6]
        high = [2 + np.sin(r.tokens * 1.7) > np.quantile(2 + np.sin(r.tokens * 1.7), 0.6) for r in own]
        low = [np.sum(~h) for h in high]
        for rollout, h, n in zip(own, high, low, strict=True):
            np.testing.assert_allclose(values(batch, "ratio_low", rollout), np.where(h, 0.5, 0.8), rtol=1e-6)
            np.testing.assert_allclose(values(batch, "ratio_high", rollout), np.where(h, 1.5, 1.3), rtol=1e-6)
            weight = 1 / sum(low) if normalization == "token_mean" else 1 / (6 * n)
            expected = np.where(h, 0, 0.25 * weight)
            np.testing.assert_allclose(values(batch, "kl_weights", rollout), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "normalization", ["token_mean", "sequence_mean", "sequence_sum", "dr_grpo", "verl_dynamic"]
)
def test_technique_answers_that_are_dropped_have_no_term_at_all(normalization: str) -> None:
    """Half of them, and then all of a step."""
    sections = {"loss": {"normalization": normalization, "verl_ranks": 2, "verl_tokens": 64}}
    sections |= {"kl": {"coefficient": 0.5}, "entropy": {"bonus": 0.1}, "length": {"on_truncated": "drop"}}
    for cut in ({0, 1, 5, 7, 9, 10, 11}, set(range(12))):
        batches, _, rollouts = prepare(recipe_of(**sections), cut=cut)
        found = {i for i in range(12) if any(lies(batch, rollouts[i]) for batch in batches)}
        assert found == set(range(12)) - cut


def lies(batch: packing.PackedBatch, rollout: Rollout) -> bool:
    try:
        return bool(values(batch, "weights", rollout).any())
    except LookupError:
        return False


@pytest.mark.parametrize("rule", ["train", "drop", "drop_wrong"])
def test_technique_truncated_answers(rule: str) -> None:
    """Number 0 is right and 2 wrong; both keep their part in the group's mean."""
    batches, _, rollouts = prepare(recipe_of(length={"on_truncated": rule}), cut={0, 2})
    out = {"train": set(), "drop": {0, 2}, "drop_wrong": {2}}[rule]
    total = sum(len(r.tokens) for i, r in enumerate(rollouts[:6]) if rule != "drop" or i not in out)
    expected = group_advantages([[1.0, -1.0, -1.0]])[0]
    for i, rollout in enumerate(rollouts[:3]):
        if i in out:
            with pytest.raises(LookupError):
                values(batches[0], "weights", rollout)
        else:
            np.testing.assert_allclose(values(batches[0], "weights", rollout), 1 / total, rtol=1e-6)
            np.testing.assert_allclose(values(batches[0], "advantages", rollout), expected[i], rtol=1e-6)


def test_technique_looks_are_in_the_order_of_sequences_however_they_are_dealt() -> None:
    """verl_dynamic deals a step's sequences to ranks; KL in the reward is computed before."""
    loss = {"normalization": "verl_dynamic", "verl_ranks": 2, "verl_tokens": 64}
    recipe = recipe_of(loss=loss, kl={"coefficient": 0.5, "place": "reward", "estimator": "k1"})
    batches, _, rollouts = prepare(recipe)
    rewards = np.array([r.reward for r in rollouts]).reshape(4, 3)
    for rollout, advantage in zip(rollouts, group_advantages(rewards).reshape(-1), strict=True):
        last = 0.5 * (moved(rollout, POLICY) - moved(rollout, REFERENCE))[-1]
        found = None
        for batch in batches:
            try:
                found = values(batch, "advantages", rollout)
            except LookupError:
                continue
        assert found is not None and found[-1] == pytest.approx(advantage - last, rel=1e-4, abs=1e-5)


def test_several_epochs_need_the_log_probs_of_the_first_mini_batch() -> None:
    batches, scored, _ = prepare(recipe_of(optimizer={"epochs": 2}))
    assert scored.asked == [POLICY] * 2 and not batches[0].on_policy.any()
    assert recipe_of(optimizer={"epochs": 2}).updates_per_step == 4


def test_refused_prompts_change_no_shape() -> None:
    """Fewer survivors are no other program."""
    recipe = recipe_of()
    programs, _ = programs_of(recipe)
    shapes = set()
    for count in (4, 3, 1):
        groups = groups_of(MIXED)[:count]
        found = minibatches(recipe, make_method(recipe), programs, groups, RATE, POLICY)
        shapes |= {batch.tokens.shape[:2] for batch in found}
    assert len(shapes) == 1


def test_batch_scale_trains_on_groups_that_agree() -> None:
    batches, _, rollouts = prepare(recipe_of(advantage={"scale": "batch"}))
    assert values(
        batches[1], "advantages", rollouts[9]
    ).all()  # all right, and not zero: less the batch's mean


@pytest.mark.parametrize(
    ("sections", "needed"),
    [
        ({"optimizer": {"minibatch_prompts": 4}}, False),
        ({}, True),
        ({"optimizer": {"minibatch_prompts": 4}, "sampler": {"correction": "masked"}}, True),
        ({"optimizer": {"minibatch_prompts": 4}, "loss": {"skip_first_old_logprobs": False}}, True),
        ({"optimizer": {"minibatch_prompts": 4, "epochs": 2}}, True),
        ({"optimizer": {"minibatch_prompts": 4}, "kl": {"coefficient": 0.1}}, True),
        ({"optimizer": {"minibatch_prompts": 4}, "entropy": {"quantile": 0.5}}, True),
    ],
)
def test_logprobs_are_needed_where_the_recipe_can_ask_for_them(sections: dict, needed: bool) -> None:
    recipe = recipe_of(**sections)
    assert needs_logprobs(recipe) == needed
    assert bool(prepare(recipe)[1].asked) == needed


# Functions of one's own


def raw(rewards: np.ndarray, groups: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return 10 * rewards + groups


def squared(logprobs, ratio, advantages, low, high):
    return -advantages * ratio**2, ratio > high


def test_a_recipe_names_its_own_advantage_and_surrogate() -> None:
    recipe = recipe_of(
        advantage={"center": f"{__name__}:raw", "scale": "none"}, loss={"surrogate": f"{__name__}:squared"}
    )
    batches, _, rollouts = prepare(recipe)
    assert values(batches[1], "advantages", rollouts[7])[0] == -8
    assert objective_of(recipe).surrogate is squared


def test_anothers_surrogate_gets_sequences_without_advantage_too() -> None:
    batches, _, rollouts = prepare(recipe_of(loss={"surrogate": f"{__name__}:squared"}))
    assert all(lies(batches[1], rollout) for rollout in rollouts[6:])


def test_log_ratios_are_bounded_where_sequences_without_advantage_are_computed() -> None:
    """0 times an infinite ratio is not 0."""
    for sections, bound in (
        ({}, math.inf),
        ({"kl": {"coefficient": 0.1}}, 20),
        ({"entropy": {"bonus": 0.1}}, 20),
    ):
        assert objective_of(recipe_of(**sections)).log_ratio_bound == bound


def scalar(logprobs, ratio, advantages, low, high):
    return (-advantages * ratio).sum(), ratio > high


def single(rewards: np.ndarray, groups: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return rewards[:1]


def undefined(rewards: np.ndarray, groups: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return rewards * np.nan


def failing(*arrays: np.ndarray) -> np.ndarray:
    raise ZeroDivisionError("a bug\nof mine")


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (single, "gave float64 of shape .1,.; it has to give 12 finite numbers"),
        (undefined, "it has to give 12 finite numbers"),
        (failing, "ZeroDivisionError: a bug$"),
    ],
)
def test_what_a_function_of_ones_own_gives_is_checked(function: object, text: str) -> None:
    name = f"{__name__}:{function.__name__}"
    with pytest.raises(InputError, match=f"advantage.center = .*{text}"):
        prepare(recipe_of(advantage={"center": name}))


@pytest.mark.parametrize(
    ("function", "text"), [(scalar, "float32.. and bool.7."), (failing, "ZeroDivisionError")]
)
def test_a_surrogate_is_called_before_it_is_compiled(function: object, text: str) -> None:
    with pytest.raises(InputError, match=f"loss.surrogate = .*{text}"):
        objective_of(recipe_of(loss={"surrogate": f"{__name__}:{function.__name__}"}))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no_such_module:f", 'advantage.center = "no_such_module:f": ModuleNotFoundError: No module named'),
        (f"{__name__}:missing", "AttributeError"),
        (f"{__name__}:RATE", "is no function"),
    ],
)
def test_a_function_that_cannot_be_had_is_named(name: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make_method(recipe_of(advantage={"center": name}))


def test_to_devices_keeps_what_is_absent() -> None:
    programs, _ = programs_of(recipe_of())
    rollouts = [r for group in groups_of(MIXED) for r in group]
    batch = packing.pack(rollouts, np.ones(12), programs.mesh.size, programs.layout, learning_rate=RATE)
    assert to_devices(batch, programs.mesh).kl_weights is None
