"""The table of results, beside what the paper prints."""

from __future__ import annotations

import numpy as np
import pytest

from evals import tables
from jaxrl.results import BenchmarkResult, BenchmarksResult, Measures

# The averages as the paper prints them.
PRINTED = {
    "DeepSeek-R1-Distill-Qwen-1.5B": 37.65,
    "DeepScaleR-1.5B-Preview": 44.88,
    "ProRL-V2": 53.08,
    "JustRL-DeepSeek-1.5B": 54.87,
    "OpenMath-Nemotron-1.5B": 56.74,
    "QuestA-Nemotron-1.5B": 63.81,
    "JustRL-Nemotron-1.5B": 64.32,
}


def test_the_papers_averages_are_those_of_its_numbers_but_one() -> None:
    found = {r["model"]: np.mean(list(r["scores"].values())) for r in tables.paper() if len(r["scores"]) == 9}
    assert found.keys() == PRINTED.keys()
    off = {model for model, mean in found.items() if abs(mean - PRINTED[model]) > 0.0051}
    assert off == {"DeepScaleR-1.5B-Preview"}
    assert found["DeepScaleR-1.5B-Preview"] == pytest.approx(44.90, abs=0.005)


def test_the_table_has_all_gradings_and_the_papers_rows_of_the_same_benchmarks() -> None:
    rule: Measures = {"pass@1": 0.25, "ci95": [0.125, 0.5], "pass@k": {4: 0.75}, "majority@k": {4: 0.5}}
    result: BenchmarkResult = {
        "problems": 30,
        "samples": 4,
        "length_mean": 1234.5,
        "truncated": 0.5,
        "no_box": 0.25,
        "distinct_4gram": 0.9,
        "undecided": 0,
        "rule": rule,
        "rule+model": None,
        "corrected": rule | {"pass@1": 0.5},
        "judge": {"A": 2, "pending": 1},
    }
    results: BenchmarksResult = {
        "model": "mine",
        "settings": {
            "model": "mine",
            "weights": "",
            "protocol": "default",
            "seed": 1,
            "temperature": 0.7,
            "top_p": 0.9,
            "max_tokens": 31744,
            "engine": "vllm",
            "dtype": "bfloat16",
            "prompts": {},
        },
        "judge": None,
        "benchmarks": {"aime24": result, "amc23": {**result, "undecided": 1234}},
        "average": {
            "rule": {"pass@1": 0.25, "ci95": [0.2, 0.3]},
            "rule+model": None,
            "corrected": {"pass@1": 0.5, "ci95": [0.2, 0.6]},
        },
    }
    lines = tables.markdown(results, {"aime24": "AIME 2024", "amc23": "AMC 2023"}).splitlines()
    cell = "25.00 (12.5 to 50.0)"
    assert f"| **mine**, rule only | {cell} | {cell} | 25.00 (20.0 to 30.0) |" in lines
    assert "| **mine**, rule + model | - | - | - |" in lines
    cell = "50.00 (12.5 to 50.0)"
    assert f"| **mine**, corrected rules | {cell} | {cell} | 50.00 (20.0 to 60.0) |" in lines
    assert [line for line in lines if "undecided" in line] == [
        "AMC 2023: 1,234 responses are undecided (too much work to compare) and count as wrong."
    ]
    assert "| ProRL-V2 (paper) | 51.87 | 88.75 | 70.31 |" in lines
    assert "| BroRL (paper) | 57.50 | - | - |" in lines
    assert "at most 31,744 tokens, seed 1, protocol default." in lines[3]
    row = "| 30 x 4 | 75.0% | 50.0% | 1,234 | 50.0% | 25.0% | 0.900 | 2 A, 1 pending |"
    assert [line for line in lines if line.endswith(row)] == [f"| AIME 2024 {row}", f"| AMC 2023 {row}"]
