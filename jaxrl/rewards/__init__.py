"""Verifiers: functions that mark a response as right or wrong.

A verifier is `(response, ground_truth) -> +1.0 | -1.0`. It gets decoded text without special tokens, is pure, never
raises on any text, and is quick on adversarial text: it runs inline, between sampling and the update, on whatever a
policy has found to write.

To add one, write a module here with the function and an `extract(response)` that returns the answer it compares (for
reading rollouts). Add its name to `Verifier` in `jaxrl/types.py` and the function to `VERIFIERS`; recipes choose by
that name. The functions shadow their modules as attributes of this package, so import other names by
`from jaxrl.rewards.minerva import extract`. Keep imports light: samplers mark rollouts without JAX.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxrl.rewards.deepscaler import equivalent
from jaxrl.rewards.minerva import minerva
from jaxrl.rewards.strict_boxed import strict_boxed
from jaxrl.types import Verifier

VERIFIERS: dict[Verifier, Callable[[str, str], float]] = {
    "strict_boxed": strict_boxed,
    "minerva": minerva,
    "equivalent": equivalent,
}

__all__ = ["VERIFIERS", "equivalent", "minerva", "strict_boxed"]
