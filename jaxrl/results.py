"""What files of evaluations hold: written by evals/, read by the report."""

from __future__ import annotations

from typing import TypedDict


class HeldOutResult(TypedDict):
    """eval/NAME.json: accuracy on held-out problems. There is also pass@N, for N samples."""

    name: str
    step: int  # steps trained before
    accuracy: float  # mean over problems of the share of their samples that is right
    ci95: list[float]  # low, high: bootstrap over problems
    problems: int
    samples: int
    temperature: float
    top_p: float
    length_mean: float  # tokens
    truncated_fraction: float


class Responses(TypedDict):
    """What does not depend on the grading of a benchmark's responses; the last four are shares of responses."""

    problems: int
    samples: int
    length_mean: float  # tokens
    truncated: float
    no_box: float
    distinct_4gram: float


Average = TypedDict("Average", {"pass@1": float, "ci95": list[float]})
"""Mean over benchmarks, each counting the same, and its interval."""

Measures = TypedDict(
    "Measures",
    {"pass@1": float, "ci95": list[float], "pass@k": dict[int, float], "majority@k": dict[int, float]},
)
"""What is measured on marked responses to one benchmark; accuracy of one response is pass@1."""


class TaskResult(Responses, Measures):
    """One benchmark during training, graded by rule."""

    title: str


class TrainingResult(TypedDict):
    """eval/benchmarks/step_N.json: benchmarks during training."""

    step: int  # steps trained before
    benchmarks: dict[str, TaskResult]
    average: Average
    temperature: float
    top_p: float
    max_tokens: int
    seconds: float  # that the evaluation took
