"""Reference vectors of techniques: some are here, in golden/techniques; all of $GOLDEN/techniques run as golden tests.

Each was made by running (or, where a file says so, retyping) the released code that its name begins with.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import ArrayLike

from jaxrl.types import JsonObject

HERE = Path(__file__).parent / "golden" / "techniques"

# What no function here computes, by "family/name", and why.
LEFT_OUT: dict[str, str] = {
    "kl/straight_through_*": "verl's names with + raise an error in verl itself",
    "kl/nemo_score_function_*": "multiplies by a ratio of 1 whose gradient spoils k2; a choice of NeMo RL's alone",
    "kl/trl_k3_bias_corrected": "multiplies k3 by the ratio; off by default, and in none of the systems",
    "advantages/verl:gpg": "a factor on the step, sequences over those whose reward is not 0: 1 for rewards of +-1",
    "advantages/verl:remax": "another answer to each prompt has to be sampled greedily",
    "advantages/openrlhf:reinforce_baseline_no_std": "less two means, undivided, in no recipe",
    "advantages/trl:scale_batch": "divides by the std of rewards over sequences, not of advantages over tokens",
    "advantages/nemo_float32:grpo_leave_one_out": "a std of its own for each response, without that one",
    "advantages/verl:reinforce_plus_plus_gamma0.9": "discounts tokens by their distance to the end, in no recipe",
    "advantages/verl:optimal_token_baseline": "needs the sum of squared probabilities at each token",
    "advantages_uneven/verl:rloo_vectorized": "gives a group of one nothing; here it keeps its reward, as in verl:rloo",
    "advantages_uneven/rllm:grpo": "gives a group of one nothing; here it keeps its reward, as in verl:grpo",
    "aggregation/*:global": "a share of a larger denominator, times ranks; here a mini-batch's denominators are whole",
    "kl_terms/in_reward_verl/grpo_advantages": "sums KL over a sequence before the group's mean and std",
    "kl_terms/in_reward_nemo*": "a token pays its own KL, not later ones",
    "corrections/verl:*:normalised": "divides weights by their mean over the batch, in no recipe",
    "corrections/losses/verl:token_tis_and_token_k1": "with a rejection, see there",
    "corrections/losses/verl:bypass_*": "with a rejection, see there",
    "corrections/losses/verl:geo_mean_tis": "the correction is inside of the mean of log-ratios",
    "corrections/losses/openrlhf:gspo_uses_rollout_ratio": "takes the sampler's for the old log-probs as well",
    "corrections/losses/nemo:gspo_sequence_correction": "cuts the correction off nowhere",
    "policy_losses/trl:vespo": "a weight from the product of a sequence's ratios, in no recipe",
    "policy_losses/verl:kl_cov": "chooses tokens by covariance; no recipe does, though its terms could",
    "kl/full": "needs both distributions of every token; nobody's objective",
    "kl_terms/adaptive": "a coefficient that follows the KL of the step before; in no recipe",
    "kl_terms/still_annealed": "a coefficient over steps, of STILL-3's study at 7B; its 1.5B has a constant one",
    "kl_terms/in_loss_nemo_k2": "multiplies by a ratio of 1 whose gradient spoils k2; a choice of NeMo RL's alone",
    "entropy/adaptive": "a coefficient that follows the entropy of the step before; in no recipe",
    "schedules/reference_on_kl": "a condition on a metric; a stage's end is a number, which none of the systems lacks",
    "schedules/reference_on_plateau": "a condition on evaluations, likewise",
    "schedules/brorl_learning_rate": "a rule by which a recipe's author chooses a number",
    "schedules/e3_budget": "a rule by which a recipe's author chooses a number",
    "systems/prorl_v2_nemo": "its KL term multiplies by a ratio of 1 whose gradient spoils k2; OpenRLHF's is covered",
    "corrections/rejection": "replaces the mask and with it the denominators, in 12 modes; here those stay",
    "corrections/mismatch_metrics": "perplexities and divergences of a batch; here quantiles of the ratios",
    "length/openrlhf:stop_properly_-0.5": "a negative coefficient replaces the reward; a penalty is taken off it",
    "length/demystify:cosine": "a reward by length and correctness in place of the reward, with four bounds",
    "length/still": "a rule of marking: an answer without a box gets -2 + 1, what a wrong one gets",
    "groups/openrlhf_refill": "keeps the surplus of a step for the next one, when it is of an older policy",
    "groups/drop_no_refill/rows_*": "cuts to a multiple of ranks, through groups; here any number of sequences packs",
    "groups/polaris_substitute/by": "torch's random draw",
    "groups/polaris_substitute/*_public_code": "marks copies against the answer of the group that they replaced",
}


def cases(family: str) -> list:
    """The cases of a family as parameters of a test."""
    found = [pytest.param(case, id=f"seed{case['seed']}") for case in read(HERE / f"{family}.json")]
    folder = os.environ.get("GOLDEN")
    if folder:
        golden = read(Path(folder) / "techniques" / f"{family}.json")
        found += [
            pytest.param(case, id=f"golden-seed{case['seed']}", marks=pytest.mark.golden) for case in golden
        ]
    return found


def read(path: Path) -> list[JsonObject]:
    return json.loads(path.read_text(encoding="utf-8"))["cases"]


def covered(family: str, values: Mapping[str, object]) -> Iterator[str]:
    """The names of a case's values that are not left out."""
    for name in values:
        if not any(fnmatch.fnmatch(f"{family}/{name}", pattern) for pattern in LEFT_OUT):
            yield name


def near(found: ArrayLike, expected: ArrayLike, tolerance: float = 1e-5, what: str = "") -> None:
    """Equal within `tolerance` of the largest expected value."""
    expected = np.asarray(expected, np.float64)
    scale = max(float(np.abs(expected).max(initial=0)), 1e-30)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale, err_msg=what)
