"""GRPO: advantages, objective, log-probabilities, packing, and the update that joins them."""

from jaxrl.grpo.advantages import group_advantages, sequence_weights, token_weights
from jaxrl.grpo.logprobs import token_logprobs
from jaxrl.grpo.objective import policy_objective

__all__ = ["group_advantages", "policy_objective", "sequence_weights", "token_logprobs", "token_weights"]
