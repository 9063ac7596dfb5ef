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
LEFT_OUT: dict[str, str] = {}


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
