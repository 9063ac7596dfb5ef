"""Every reference vector in the folder named by the environment variable GOLDEN.

A vector is one JSON line with `response`, `ground_truth`, `expected` and, where known, `pred`. The strict
verifiers agree with all of them, the lenient ones with nearly all that the reference could decide.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evals import grade
from jaxrl.rewards import equivalent, minerva, strict_boxed
from jaxrl.rewards.minerva import extract as extract_minerva
from jaxrl.rewards.strict_boxed import extract as extract_strict_boxed
from jaxrl.types import JsonObject

pytestmark = [
    pytest.mark.golden,
    pytest.mark.skipif(
        "GOLDEN" not in os.environ,
        reason="GOLDEN is not set; it names a folder of reference vectors (make test-golden GOLDEN=DIR)",
    ),
]


Verify = Callable[[str, str], float]
Grade = Callable[[str, str], bool]
Extract = Callable[[str], str | None]


def is_equivalent(response: str, ground_truth: str) -> bool:
    return equivalent(response, ground_truth) == 1.0


@pytest.mark.parametrize(
    ("pattern", "verifier", "extract"),
    [
        ("*dapo_strict*.jsonl", strict_boxed, extract_strict_boxed),
        ("*dapo_minerva*.jsonl", minerva, extract_minerva),
    ],
    ids=["strict_boxed", "minerva"],
)
def test_reference_vectors(pattern: str, verifier: Verify, extract: Extract) -> None:
    rows = list(read_rows(Path(os.environ["GOLDEN"]), pattern))
    assert rows, f"no vectors in {pattern} in GOLDEN={os.environ['GOLDEN']!r}"
    problems = [problem for where, row in rows if (problem := mismatch(where, row, verifier, extract))]
    assert not problems, "\n".join([f"{len(problems)} of {len(rows)} vectors differ:", *problems[:5]])


@pytest.mark.parametrize(
    ("pattern", "is_right"),
    [
        ("*deepscaler*.jsonl", is_equivalent),
        ("*justrl_eval*.jsonl", grade),
    ],
    ids=["equivalent", "grade"],
)
def test_lenient_reference_vectors(pattern: str, is_right: Grade) -> None:
    rows = list(read_rows(Path(os.environ["GOLDEN"]), pattern))
    assert rows, f"no vectors in {pattern} in GOLDEN={os.environ['GOLDEN']!r}"
    problems = [
        f"  {where} tag={row.get('tag')} expected {row['expected']} ground_truth={row['ground_truth']!r}\n"
        f"    response ends {row['response'][-120:]!r}"
        for where, row in rows
        if row["expected"] is not None  # null where the reference did not come to an end
        and is_right(row["response"], row["ground_truth"]) != row["expected"]
    ]
    assert len(problems) <= 0.005 * len(rows), "\n".join(
        [f"{len(problems)} of {len(rows)} differ:", *problems[:9]]
    )


def read_rows(folder: Path, pattern: str) -> Iterator[tuple[str, JsonObject]]:
    for path in sorted(folder.glob(pattern)):
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                yield f"{path.name}:{number}", json.loads(line)


def mismatch(where: str, row: JsonObject, verifier: Verify, extract: Extract) -> str | None:
    """A description of the difference that can be pasted into a unit test; None if there is none."""
    score, pred = verifier(row["response"], row["ground_truth"]), extract(row["response"])
    if score == row["expected"] and pred == row.get("pred", pred):
        return None
    return (
        f"  {where} tag={row.get('tag')} ground_truth={row['ground_truth']!r}\n"
        f"    score {score}, expected {row['expected']}; pred {pred!r}, expected {row.get('pred', 'any')!r}\n"
        f"    response ends {row['response'][-120:]!r}"
    )
