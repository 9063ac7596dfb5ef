"""What a step computes on the host, by the vectors of released code: advantages, weights, corrections, lengths, groups.

Every name of a vector is in a table here or in vectors.LEFT_OUT, with the reason.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterator
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vectors
from evals.statistics import distinct_4grams
from jaxrl import config
from jaxrl.config.stages import reference_at
from jaxrl.grpo import groups
from jaxrl.grpo.advantages import relative_advantages, sequence_weights, token_weights
from jaxrl.grpo.mismatch import importance_weights
from jaxrl.grpo.update import make_optimizer
from jaxrl.rewards.length import (
    cosine_active,
    cosine_bonus,
    dropped,
    overlong_penalty,
    truncated_reward,
)
from jaxrl.types import Center, JsonObject, Level, Scale, Truncation

# center, scale, epsilon, and below the batch's ddof: verl has 1, and adds 1e-8 to the variance
ADVANTAGES: dict[str, tuple[Center, Scale, float]] = {
    "verl:grpo": ("group", "group", 1e-6),
    "verl:dr_grpo": ("group", "none", 0),
    "verl_float32:grpo_vectorized": ("group", "group", 1e-6),
    "verl:grpo_passk": ("second_best", "group", 1e-6),
    "verl:grpo_passk_no_std": ("second_best", "none", 0),
    "verl:rloo": ("leave_one_out", "none", 0),
    "verl:rloo_vectorized": ("leave_one_out", "none", 0),
    "verl:opo": ("length_weighted", "none", 0),
    "verl:reinforce_plus_plus_baseline": ("group", "batch", 1e-9),
    "verl:reinforce_plus_plus_gamma1": ("none", "batch", 1e-9),
    "openrlhf:reinforce": ("none", "batch", 0),
    "openrlhf:reinforce_baseline": ("group", "batch", 0),
    "openrlhf:rloo": ("leave_one_out", "none", 0),
    "openrlhf:group_norm": ("group", "group", 1e-9),
    "openrlhf:dr_grpo": ("group", "none", 0),
    "nemo_float32:grpo": ("group", "group", 1e-6),
    "nemo_float32:reinforce_plus_plus": ("none", "batch", 0),
    "nemo_float32:reinforce_plus_plus_baseline": ("group", "batch", 0),
    "trl:scale_group": ("group", "group", 1e-4),
    "trl:scale_none": ("group", "none", 0),
    "still:group_norm": ("group", "group", 1e-8),
    "rllm:grpo": ("group", "group", 1e-6),
    "rllm:grpo_mask_truncated": ("group", "group", 1e-6),
    # rewards times 5 there
    "questa:global_token_norm": ("none", "batch", 1e-5 / 5),
    "areal:group_reward_norm_then_global": ("group", "group", 1e-9),
}


def tolerance(name: str) -> float:
    """Float32 inside; verl's 1e-8 within the root, which is no epsilon; or float64 throughout."""
    if "float32" in name or name.startswith(("rllm", "questa", "areal")):
        return 1e-5
    return 1e-6 if "plus_plus" in name or name.startswith("openrlhf:reinforce") else 1e-9


def advantages_of(name: str, case: JsonObject, ids: np.ndarray) -> np.ndarray:
    rewards, lengths = np.array(case["rewards"], float), np.array(case["lengths"])
    center, scale, epsilon = ADVANTAGES[name]
    found = relative_advantages(
        rewards, ids, lengths, center=center, scale=scale, epsilon=epsilon, ddof=name.startswith("verl")
    )
    if name.startswith("areal"):
        found = relative_advantages(found, ids, lengths, center="none", scale="batch", epsilon=1e-5)
    if name == "rllm:grpo_mask_truncated":
        out = [
            dropped("drop_wrong", n == case["tokens"], r != 0) for n, r in zip(lengths, rewards, strict=True)
        ]
        found = np.where(out, 0, found)
    return found


@pytest.mark.parametrize("case", vectors.cases("advantages"))
def test_technique_advantages(case: JsonObject) -> None:
    ids = np.repeat(np.arange(case["groups"]), case["group_size"])
    for name in vectors.covered("advantages", case["advantages"]):
        vectors.near(advantages_of(name, case, ids), case["advantages"][name], tolerance(name), name)
    live = np.arange(case["tokens"]) < np.array(case["lengths"])[:, None]
    for name in vectors.covered("advantages", case["token_advantages"]):
        found = advantages_of(name, case, ids)[:, None] * live
        vectors.near(found, case["token_advantages"][name], tolerance(name), name)


@pytest.mark.parametrize("case", vectors.cases("advantages_uneven"))
def test_technique_advantages_of_uneven_groups(case: JsonObject) -> None:
    order = np.random.default_rng(case["seed"]).permutation(len(case["group"]))
    mixed = {name: np.array(case[name])[order] for name in ("group", "rewards", "lengths")}
    for name in vectors.covered("advantages_uneven", case["advantages"]):
        for some, ids in ((case, np.array(case["group"])), (mixed, -mixed["group"])):
            expected = np.array(case["advantages"][name])
            expected = expected[order] if some is mixed else expected
            # verl's std of a group of one is a float32
            vectors.near(advantages_of(name, some, ids), expected, max(tolerance(name), 1e-7), name)


def kl_costs(case: JsonObject, estimator: str, coef: float) -> list[np.ndarray]:
    """The released estimators of KL(old, ref) as the vectors have them, times the coefficient."""
    d = np.array(case["ref_logprob"]) - np.array(case["old_logprob"])
    value = {
        "kl": -d,
        "low_var_kl": np.expm1(np.clip(d, -20, 20)) - np.clip(d, -20, 20),
        "k1": -d,
        "k3": np.expm1(d) - d,
    }[estimator]
    value = value if estimator == "kl" else np.clip(value, -10, 10)
    return [coef * row[:n] for row, n in zip(value, case["lengths"], strict=True)]


# estimator of the cost, center, scale, epsilon
IN_REWARD: dict[str, tuple[str, Center, Scale, float]] = {
    "in_reward_verl/reinforce_plus_plus_gamma1_advantages": ("", "none", "batch", 1e-9),
    "in_reward_openrlhf_group_norm_k1/advantages": ("k1", "group", "group", 1e-9),
    "in_reward_openrlhf_reinforce_baseline_k1/advantages": ("k1", "group", "batch", 0),
    "in_reward_openrlhf_rloo_k3/advantages": ("k3", "leave_one_out", "none", 0),
    "in_reward_still_coef_0.001/advantages": ("k1", "group", "group", 1e-8),
}


@pytest.mark.parametrize("case", vectors.cases("kl_terms"))
def test_technique_kl_in_the_reward(case: JsonObject) -> None:
    entries = {
        f"{name}/{key}": value
        for name, entry in case.items()
        if name.startswith("in_reward")
        for key, value in entry.items()
        if key.endswith("advantages")
    }
    ids = np.repeat(np.arange(case["groups"]), case["group_size"])
    for name in vectors.covered("kl_terms", entries):
        estimator, center, scale, epsilon = IN_REWARD[name]
        coef = 0.001 if "coef_0.001" in name else case["coef"]
        found = relative_advantages(
            case["rewards"],
            ids,
            np.array(case["lengths"]),
            center=center,
            scale=scale,
            epsilon=epsilon,
            costs=kl_costs(case, estimator or case["in_reward_verl"]["kl_penalty"], coef),
            ddof="verl" in name,
        )
        for row, expected, n in zip(found, entries[name], case["lengths"], strict=True):
            assert len(row) == n and not any(expected[n:])
        flat = np.concatenate([row[:n] for row, n in zip(entries[name], case["lengths"], strict=True)])
        vectors.near(np.concatenate(found), flat, 5e-6, name)


REWARDS = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 1.0]), min_size=1, max_size=9)


@given(REWARDS, st.randoms(use_true_random=False))
def test_technique_advantages_by_their_formulas(rewards: list[float], random) -> None:
    """Each of a sequence's tokens counted one by one, in plain Python."""
    ids = [random.randrange(3) for _ in rewards]
    lengths = [random.randrange(1, 5) for _ in rewards]
    for center in get_args(Center):
        found = relative_advantages(
            rewards, np.array(ids), np.array(lengths), center=center, scale="none", costs=None
        )
        for i, r in enumerate(rewards):
            own = [j for j in range(len(rewards)) if ids[j] == ids[i]]
            others = [rewards[j] for j in own if j != i]
            own_tokens = [rewards[j] for j in own for _ in range(lengths[j])]
            all_tokens = [x for x, n in zip(rewards, lengths, strict=True) for _ in range(n)]
            expected = {
                "none": lambda r=r: r,
                "group": lambda r=r, own=own: r - sum(rewards[j] for j in own) / len(own),
                "leave_one_out": lambda r=r, others=others: r - sum(others) / len(others),
                "length_weighted": lambda r=r, t=own_tokens: r - sum(t) / len(t),
                "second_best": lambda r=r, others=others: max(0.0, r - max(others)),
                "batch": lambda r=r, t=all_tokens: r - sum(t) / len(t),
            }[center]
            alone = len(rewards) == 1 if center == "batch" else not others
            np.testing.assert_allclose(found[i], r if alone else expected(), atol=1e-12, err_msg=center)


def test_technique_costs_are_paid_from_a_token_on() -> None:
    rewards, ids, lengths = [1.0, 0.0], np.zeros(2, int), np.array([3, 1])
    costs = [np.array([0.5, 0.25, 0.125]), np.array([0.0625])]
    first, second = relative_advantages(rewards, ids, lengths, scale="none", costs=costs)
    np.testing.assert_array_equal(first, [0.5 - 0.875, 0.5 - 0.375, 0.5 - 0.125])
    np.testing.assert_array_equal(second, [-0.5 - 0.0625])
    whole = np.concatenate(relative_advantages(rewards, ids, lengths, scale="batch", epsilon=0, costs=costs))
    np.testing.assert_allclose([whole.mean(), whole.std()], [0, 1], atol=1e-12)
    free = relative_advantages(rewards, ids, lengths, costs=[np.zeros(3), np.zeros(1)])
    plain = relative_advantages(rewards, ids, lengths)
    np.testing.assert_array_equal([row[0] for row in free], plain)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -1.0])
@pytest.mark.parametrize(("center", "scale"), [*itertools.product(get_args(Center), get_args(Scale))])
def test_technique_equal_rewards_teach_nothing(reward: float, center: Center, scale: Scale) -> None:
    """Also where a mean of equal numbers is off by a rounding. Without a center they are rewards still."""
    rewards, ids, lengths = np.full(7, reward), np.array([0] * 3 + [1] * 4), np.array([1, 2, 3, 4, 5, 6, 7])
    found = relative_advantages(rewards, ids, lengths, center=center, scale=scale)
    if center == "none" and scale != "batch":
        np.testing.assert_allclose(found, rewards, rtol=2e-6)
    else:
        assert not found.any()


def test_technique_the_batch_moves_groups_of_equal_rewards() -> None:
    """The reason why ProRL v2 drops them: all right or all wrong, they have an advantage."""
    ids, lengths = np.array([0, 0, 1, 1]), np.array([1, 3, 2, 2])
    found = relative_advantages([1, 0, 1, 1], ids, lengths, scale="batch", epsilon=0)
    tokens = np.array([0.5, -0.5, -0.5, -0.5, 0, 0, 0, 0])
    np.testing.assert_allclose(
        found, (np.array([0.5, -0.5, 0, 0]) - tokens.mean()) / tokens.std(), rtol=1e-12
    )
    assert found[2] > 0


@pytest.mark.parametrize("case", vectors.cases("aggregation"))
def test_technique_aggregation(case: JsonObject) -> None:
    mask = np.array(case["mask"], float)
    live = mask.any(axis=1)
    modes = {
        "token": "token_mean",
        "token-mean": "token_mean",
        "bnpo": "token_mean",
        "dapo": "token_mean",
        "sample": "sequence_mean",
        "grpo": "sequence_mean",
        "seq-mean-token-mean": "sequence_mean",
        "seq-mean-token-sum": "sequence_sum",
        "dr_grpo": "dr_grpo",
        "seq-mean-token-sum-norm": "dr_grpo",
        "seq-mean-token-sum-norm:scale_factor": "dr_grpo",
    }
    for name in vectors.covered("aggregation", case["modes"]):
        system, mode = name.split(":", 1)
        norm = mode.startswith("seq-mean-token-sum-norm")
        # sequences without a live token count in verl 0.4, STILL and TRL only
        rows = live if system in ("verl", "openrlhf") and not norm else np.ones(len(mask), bool)
        longest = case["scale_factor"] if mode in ("dr_grpo", f"{mode[:23]}:scale_factor") else mask.shape[1]
        found = np.zeros_like(mask)
        found[rows] = mask[rows] * sequence_weights(mask[rows].sum(axis=1), modes[mode], longest)[:, None]
        if longest == mask.shape[1]:
            vectors.near(token_weights(mask[rows], modes[mode]), found[rows], 1e-6, name)
        # verl leaves the division by sequences to the learning rate
        found *= len(mask) if norm else 1
        vectors.near(found, case["modes"][name]["weights"], 1e-7, name)
        value = (found * np.array(case["loss_matrix"])).sum()
        np.testing.assert_allclose(value, case["modes"][name]["value"], rtol=1e-6, atol=1e-7, err_msg=name)


CORRECTIONS: dict[str, tuple[Truncation, Level]] = {
    "verl:token": ("truncated", "token"),
    "verl:sequence": ("truncated", "sequence"),
    "trl:token_truncate": ("truncated", "token"),
    "trl:token_mask": ("masked", "token"),
    "trl:sequence_truncate": ("truncated", "sequence"),
    "trl:sequence_mask": ("masked", "sequence"),
}


def correct(
    case: JsonObject, correction: Truncation, cap: float, floor: float | None, level: Level
) -> np.ndarray:
    """The weights of a case as a matrix, 0 outside the mask."""
    lengths = case["lengths"]
    trainer, sampler = (
        [np.array(row[:n]) for row, n in zip(case[name], lengths, strict=True)]
        for name in ("old_logprob", "rollout_logprob")
    )
    found = np.zeros(np.shape(case["mask"]))
    for row, weights in zip(
        found, importance_weights(trainer, sampler, correction, cap, floor, level), strict=True
    ):
        row[: len(weights)] = weights
    return found


@pytest.mark.parametrize("case", vectors.cases("corrections"))
def test_technique_corrections(case: JsonObject) -> None:
    for name in vectors.covered("corrections", case["weights"]):
        correction, level = CORRECTIONS[name]
        floor = case["low"] if name.startswith("trl") else None
        vectors.near(correct(case, correction, case["high"], floor, level), case["weights"][name], 1e-7, name)


@pytest.mark.parametrize("case", vectors.cases("corrections"))
@pytest.mark.parametrize(
    ("name", "plain", "correction", "level"),
    [
        ("openrlhf:icepop", "nemo:untruncated", "masked", "token"),
        ("nemo:tis", "nemo:untruncated", "truncated", "token"),
        ("openrlhf:seq-mask-tis", "nemo:untruncated", "filtered", "geometric"),
        ("nemo:seq-mask-tis", "nemo:untruncated", "filtered", "geometric"),
        ("areal_float32:mask_sequence", "areal_float32:clamp_token", "masked", "geometric"),
        ("areal_float32:clamp_sequence", "areal_float32:clamp_token", "truncated", "geometric"),
    ],
)
def test_technique_corrections_as_gradients_show_them(
    case: JsonObject, name: str, plain: str, correction: Truncation, level: Level
) -> None:
    """Their losses' gradients, from the one whose weights are known."""
    losses = case["losses"]
    known = np.exp(np.array(case["old_logprob"]) - case["rollout_logprob"])
    if plain.startswith("areal"):
        known = np.clip(known, losses[plain]["params"]["low"], losses[plain]["params"]["high"])
    limits = losses[name]["params"]
    found = correct(case, correction, limits["high"], limits["low"], level)
    vectors.near(losses[plain]["grad"] / known * found, losses[name]["grad"], 1e-5, name)


def test_technique_ratios_at_the_limits_are_kept() -> None:
    """The defaults of `floor`, and which end of a sequence a level looks at."""
    trainer, sampler = [np.log([2.0, 0.5, 4.0, 0.25])], [np.zeros(4)]
    for correction, expected in (("truncated", [2, 0.5, 2, 0.25]), ("masked", [2, 0.5, 0, 0])):
        found = importance_weights(trainer, sampler, correction, 2.0)
        np.testing.assert_allclose(found[0], expected, rtol=1e-12)
    # the product of all is 1, which is inside
    found = importance_weights(trainer, sampler, "filtered", 1.0, level="sequence")
    np.testing.assert_allclose(found[0], [2, 0.5, 4, 0.25], rtol=1e-12)
    far = importance_weights([np.full(30, 1.0)], [np.zeros(30)], "masked", np.inf, level="sequence")
    np.testing.assert_allclose(far[0], np.exp(20), rtol=1e-12)


def overlong(case: JsonObject, i: int, factor: float | None = None) -> float:
    factor = case["factor"] if factor is None else factor
    return overlong_penalty(case["lengths"][i], case["cap"], case["buffer"], factor)


def stopped(coef: float) -> Callable[[JsonObject, int], float]:
    def shape(case: JsonObject, i: int) -> float:
        reward = case["rewards"][i]
        return truncated_reward(reward, coef) if case["truncated"][i] else reward

    return shape


def overlong_then_stopped(case: JsonObject, i: int) -> float:
    reward = case["rewards"][i] + overlong(case, i)
    return truncated_reward(reward, 0.5) if case["truncated"][i] else reward


def cosine(case: JsonObject, i: int) -> float:
    low, high, weight = (case["prorl_v2"][name] for name in ("eta_min", "eta_max", "weight"))
    # a constant for all answers, which every baseline takes off
    return weight * low + cosine_bonus(case["lengths"][i], case["prorl_v2"]["cap"], weight * (high - low))


SHAPED: dict[str, Callable[[JsonObject, int], float]] = {
    **dict.fromkeys(
        ("openrlhf:overlong", "nemo:overlong", "areal:overlong", "verl:overlong"),
        lambda case, i: case["rewards"][i] + overlong(case, i),
    ),
    "openr1:soft_overlong_addend": lambda case, i: overlong(case, i, 1.0),
    "openrlhf:stop_properly_0": stopped(0),
    "openrlhf:stop_properly_0.5": stopped(0.5),
    "openrlhf:stop_properly_1": stopped(1),
    "nemo:stop_properly_0.25_overlong_ignored": stopped(0.25),
    "openrlhf:overlong_then_stop_properly_0.5": overlong_then_stopped,
    "prorl_v2:cosine_addend": cosine,
}


@pytest.mark.parametrize("case", vectors.cases("length"))
def test_technique_length(case: JsonObject) -> None:
    for name in vectors.covered("length", case["shaped"]):
        found = [SHAPED[name](case, i) for i in range(len(case["lengths"]))]
        vectors.near(found, case["shaped"][name], 1e-6 if name.startswith("areal") else 1e-9, name)
    cycle = case["cycle"]
    assert [cosine_active(step, cycle["on"], cycle["off"]) for step in cycle["step"]] == cycle["active"]


@pytest.mark.parametrize("case", vectors.cases("length"))
def test_technique_truncated_responses_drop_out(case: JsonObject) -> None:
    case = case["mask_truncated"]
    rewards, lengths = np.array(case["rewards"], float), np.array(case["lengths"])
    cut, right = lengths == case["tokens"], rewards > 0

    def out(rule) -> np.ndarray:
        return np.array([dropped(rule, *each) for each in zip(cut.tolist(), right.tolist(), strict=True)])

    advantages = relative_advantages(rewards, np.array(case["group"]), lengths)
    vectors.near(np.where(out("train"), 0, advantages), case["advantages_off"], 5e-6)
    vectors.near(np.where(out("drop_wrong"), 0, advantages), case["advantages_on"], 5e-6)
    np.testing.assert_array_equal(~out("drop"), np.array(case["overlong_filter_mask"], bool))
    assert cut.any() and not out("train").any()


def test_technique_length_by_hand() -> None:
    assert [cosine_bonus(n, 100, 0.5) for n in (0, 100)] == [0.5, 0]
    np.testing.assert_allclose([cosine_bonus(n, 100, 0.5) for n in (25, 50)], [0.25 + 0.125 * 2**0.5, 0.25])
    assert all(cosine_active(step, 0, 0) and cosine_active(step, 3, 0) for step in range(5))
    assert not any(cosine_active(step, 0, 3) for step in range(5))
    assert [truncated_reward(1, 0.25, 0.5), truncated_reward(-1, penalty=2)] == [-0.25, -3]


# error 1: given up; 2: no more data. NeMo RL gives up one round later than verl
@pytest.mark.parametrize("case", vectors.cases("groups"))
@pytest.mark.parametrize(
    ("rule", "limit", "later"),
    [("dapo_refill", "max_num_gen_batches", 0), ("nemo_refill", "max_gen_batches", 1)],
)
def test_technique_groups_are_refilled(case: JsonObject, rule: str, limit: str, later: int) -> None:
    case = case[rule]
    missing, trained, surplus, error, used = case["train_prompts"], [], [], 2, 0
    for k, rewards in enumerate(case["generation_rewards"]):
        good = groups.in_band(np.array(rewards) > 0)
        taken, missing = groups.refill(missing, good)
        trained += [[k, p] for p in taken]
        surplus = [[k, p] for p in np.flatnonzero(good) if p not in taken]
        used = k + 1
        if not missing or 0 < case[limit] + later <= used:
            error = int(missing > 0)
            break
    assert (error, used) == (case["error"], case["generation_batches_used"])
    if not error:
        assert trained == case["trained"] and len(trained) == case["train_prompts"]
        assert surplus == case.get("discarded_surplus", surplus)


@given(st.integers(0, 9), st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=6))
def test_technique_refilling_is_taking_the_first_good_of_all_rounds(
    wanted: int, rounds: list[list[bool]]
) -> None:
    missing, taken = wanted, []
    for k, good in enumerate(rounds):
        places, missing = groups.refill(missing, np.array(good))
        taken += (3 * k + places).tolist()
    every = np.flatnonzero(np.concatenate(rounds)).tolist()
    assert taken == every[:wanted] and missing == wanted - len(taken)


@pytest.mark.parametrize("case", vectors.cases("groups"))
def test_technique_groups_in_a_band(case: JsonObject) -> None:
    drop = case["drop_no_refill"]
    for rewards, kept in zip(drop["rewards"], drop["group_kept"], strict=True):
        # rllm and Archer know wrong answers of 0 only: they keep a group that is all -1
        expected = bool(kept) and rewards != [-1] * len(rewards)
        assert groups.in_band(np.array([rewards]) > 0)[0] == expected
    band = case["questa_band"]
    right = np.arange(band["samples"]) < np.array(band["rewards_positive"])[:, None]
    # its bounds are inclusive
    found = groups.in_band(right, (band["lower"] - 1e-9, band["upper"] + 1e-9))
    np.testing.assert_array_equal(found, np.array(band["accepted"], bool))
    rate = case["pass_rate"]
    for samples, expected in zip(rate["samples"], rate["kept_probability"], strict=True):
        vectors.near(groups.mixed_probability(rate["success"], samples), expected, 1e-9)


@pytest.mark.parametrize("samples", [4, 8, 16, 32])
def test_technique_bounds_of_a_band_are_not_in_it(samples: int) -> None:
    right = np.arange(samples) < np.arange(samples + 1)[:, None]
    share = np.arange(samples + 1) / samples
    for keep in ((0.0, 1.0), (0.25, 0.75)):
        np.testing.assert_array_equal(groups.in_band(right, keep), (share > keep[0]) & (share < keep[1]))
    # QuestA's bounds lie between shares
    np.testing.assert_array_equal(groups.in_band(right, (0.05, 0.95)), (share >= 0.05) & (share <= 0.95))


@pytest.mark.parametrize("case", vectors.cases("groups"))
def test_technique_bad_groups_are_substituted(case: JsonObject) -> None:
    case = case["polaris_substitute"]
    good = groups.in_band(np.array(case["rewards"]) > 0)
    np.testing.assert_array_equal(good, np.array(case["good"], bool))
    places = groups.substitutes(good, seed=1)
    assert (places is None) == bool(case["skip_batch"])
    if places is not None:
        bad = np.flatnonzero(places != np.arange(len(good)))
        assert bad.tolist() == case["replaced"] and good[places].all()
        assert not case["with_replacement"] or len(bad) > good.sum()
        assert case["with_replacement"] or len(set(places[bad])) == len(bad)


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 99))
def test_technique_substitutes_are_good_and_seldom_twice(marks: list[bool], seed: int) -> None:
    good = np.array(marks)
    places = groups.substitutes(good, seed)
    if 3 * good.sum() <= len(good) - len(good) % 3:
        assert places is None
        return
    assert good[places].all() and (places[good] == np.flatnonzero(good)).all()
    drawn = places[~good].tolist()
    assert len(set(drawn)) == len(drawn) or len(drawn) > good.sum()
    np.testing.assert_array_equal(places, groups.substitutes(good, seed))


def test_technique_every_good_group_may_be_a_substitute() -> None:
    good = np.array([True, False, True, True])
    assert {int(groups.substitutes(good, seed)[1]) for seed in range(50)} == {0, 2, 3}


@pytest.mark.parametrize("case", vectors.cases("groups"))
def test_technique_groups_are_rescued(case: JsonObject) -> None:
    case = case["rollout_rescue"]
    right, stored = np.array(case["rewards"]) > 0, np.array(case["sink_before"]) >= 0
    found = groups.rescuable(right, stored)
    np.testing.assert_array_equal(found, np.array(case["rescued"], bool))
    assert [list(range(right.shape[1])) if one else [] for one in found] == case["candidates"]
    np.testing.assert_array_equal(right.sum(axis=1) + found, case["rewards_sum_after"])


@pytest.mark.parametrize("case", vectors.cases("groups"))
def test_technique_easy_prompts_are_dropped(case: JsonObject) -> None:
    case = case["easy_data_drop"]
    prompts, shares = np.array(case["history"]).T
    found = groups.too_easy(prompts.astype(int), shares, case["threshold"])
    assert found.tolist() == case["removed"]
    assert not groups.too_easy(np.zeros(2, int), np.array([0.75, 1.0]), 0.875).size
    names = np.array([f"id{p:.0f}" for p in prompts])
    assert groups.too_easy(names, shares, case["threshold"]).tolist() == [f"id{p}" for p in case["removed"]]


USED = {
    "groups": {
        "dapo_refill",
        "nemo_refill",
        "drop_no_refill",
        "polaris_substitute",
        "questa_band",
        "rollout_rescue",
        "easy_data_drop",
        "pass_rate",
    },
    "length": {"shaped", "cycle", "mask_truncated"},
    "corrections": {"weights", "losses"},
}


@pytest.mark.parametrize(
    ("family", "case"),
    [pytest.param(f, *p.values, id=f"{f}-{p.id}", marks=p.marks) for f in USED for p in vectors.cases(f)],
)
def test_technique_vectors_are_used_or_left_out(family: str, case: JsonObject) -> None:
    """The tables above hold the names below these."""
    results = {name: value for name, value in case.items() if isinstance(value, dict)}
    settings = {"cosine", "prorl_v2"}
    assert set(vectors.covered(family, results)) - settings == USED[family]


# Schedules


@pytest.mark.parametrize("case", vectors.cases("schedules"))
def test_technique_optimizer_kept_and_reset(case: JsonObject) -> None:
    """torch's AdamW: a restart of the optimizer is a new state, and with it the bias correction begins anew."""
    given = case["adamw"]
    with jax.enable_x64(True):
        for name, resets in (("kept", []), ("reset", given["reset_before_update"])):
            names = {"beta1": "beta1", "beta2": "beta2", "epsilon": "eps", "weight_decay": "weight_decay"}
            section = config.Optimizer(
                max_grad_norm=1e9, **{ours: float(given[theirs]) for ours, theirs in names.items()}
            )
            optimizer, params = make_optimizer(section), {"p": jnp.asarray(given["start"], jnp.float64)}
            state = optimizer.init(params)
            for k, grad in enumerate(given["grads"]):
                state = optimizer.init(params) if k in resets else state
                grads = {"p": jnp.asarray(grad, jnp.float64)}
                updates, state = optimizer.update(grads, state, params, learning_rate=given["lr"])
                params = optax.apply_updates(params, updates)
                vectors.near(params["p"], given["params"][name][k], 1e-9, f"{name} {k}")


@pytest.mark.parametrize("case", vectors.cases("schedules"))
def test_technique_the_reference_of_every_step(case: JsonObject) -> None:
    every, on_stage = case["reference_every"], case["reference_on_stage"]
    expected = every["reference_of_step"]
    kl = {"coefficient": 0.1, "reset_every": every["every"]}
    stages = config.stages_of(config.from_dict({"run": {"steps": len(expected)}, "kl": kl}))
    assert [reference_at(stages, step) for step in range(len(expected))] == expected
    expected = on_stage["reference_of_step"]
    ends = [*on_stage["stage_starts"], len(expected)]
    entries = [{"until": end, "restart": ["reference"] * (number > 0)} for number, end in enumerate(ends)]
    stages = config.stages_of(config.from_dict({"stages": entries}))
    assert [reference_at(stages, step) for step in range(len(expected))] == expected


@pytest.mark.parametrize("case", vectors.cases("schedules"))
def test_technique_distinct_4grams(case: JsonObject) -> None:
    given = case["distinct_4gram"]
    assert distinct_4grams(given["sequences"]) == pytest.approx(given["value"], abs=1e-9)


def test_technique_list_of_what_is_left_out(capsys: pytest.CaptureFixture) -> None:
    """Each entry matches a vector that there is."""
    with capsys.disabled():
        print("\nleft out of the vectors of techniques:")
        for name, reason in sorted(vectors.LEFT_OUT.items()):
            print(f"  {name}: {reason}")
    names = set[str]()
    for path in vectors.HERE.glob("*.json"):
        for case in vectors.read(path):
            names |= set(paths(case, path.stem))
    for pattern in vectors.LEFT_OUT:
        assert fnmatch.filter(names, pattern) or fnmatch.filter(names, f"{pattern}/*"), pattern


def paths(values: object, prefix: str) -> Iterator[str]:
    """family/key/key of all that is in a case; values and their groups of names have none of their own."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield f"{prefix}/{key}"
            yield from paths(value, f"{prefix}/{key}")
            if key in (
                "advantages",
                "token_advantages",
                "modes",
                "estimators",
                "weights",
                "shaped",
                "systems",
            ):
                yield from paths(value, prefix)
            if key == "losses":
                yield from paths(value, prefix)
