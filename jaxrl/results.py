"""The result files of evaluations: written by evals/, read by the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

EvalProtocol = Literal["default", "justrl_released"]  # of `jaxrl eval --benchmarks`
# By the released rules; by these or a judge; by the corrected rules.
Grading = Literal["rule", "rule+model", "corrected"]


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
    undecided: int  # responses that count as wrong because comparing the answer is too much work
    right: NotRequired[list[int]]  # of each problem's samples; not in older files
    identity: NotRequired[str]  # digest of the run and its evaluation, where it was made during training


class ResponseStats(TypedDict):
    """The properties of a benchmark's responses that do not depend on grading; the last three are shares."""

    problems: int
    samples: int
    length_mean: float  # tokens
    truncated: float  # of responses
    no_box: float  # of responses
    distinct_4gram: float  # of the 4-word sequences of a problem's responses


Average = TypedDict("Average", {"pass@1": float, "ci95": list[float]})
"""Mean over benchmarks, each counting the same, and its interval."""

Measures = TypedDict(
    "Measures",
    {"pass@1": float, "ci95": list[float], "pass@k": dict[int, float], "majority@k": dict[int, float]},
)
"""Measures of the graded responses to one benchmark; pass@1 is the accuracy. In the file, each k is a string."""


class TaskResult(ResponseStats, Measures):
    """One benchmark during training, graded by rule."""

    title: str
    corrected: NotRequired[Measures]  # by the corrected rules; not in older files
    undecided: int  # as in HeldOutResult; by either rules
    right: NotRequired[list[int]]  # as in HeldOutResult


class TrainingResult(TypedDict):
    """eval/benchmarks/step_N.json: benchmarks during training."""

    step: int  # steps trained before
    benchmarks: dict[str, TaskResult]
    average: Average
    corrected: NotRequired[Average]  # as in TaskResult
    temperature: float
    top_p: float
    max_tokens: int
    seconds: float  # duration of the evaluation
    identity: NotRequired[str]  # as in HeldOutResult


class Settings(TypedDict):
    """settings.json of `jaxrl eval --benchmarks`: all that its responses depend on."""

    model: str  # its name, for people
    weights: str  # hash of the model's safetensors files
    protocol: EvalProtocol
    seed: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_ids: list[int]  # that end a response
    tokenizer: str  # hash of its files, the chat template among them
    config: str  # hash of config.json
    engine: str
    dtype: str
    vllm_options: str  # of started servers, those on memory left out
    prompts: dict[str, str]  # hash of each benchmark's token ids


class JudgeSettings(TypedDict):
    """All that the labels of a judge depend on."""

    model: str
    prompt: str  # hash of its text
    tail: int  # characters of a response that it sees
    released: bool  # asked as JustRL's released scripts do


class Released(TypedDict):
    """The figures of JustRL's released script, under its names."""

    mean_score: float
    best_score: float
    solve_none: int
    solve_all: int
    distinct_4gram: float
    avg_output_length: int
    format_error_rollouts: int


Gradings = TypedDict("Gradings", {"rule": Measures, "rule+model": Measures | None, "corrected": Measures})


class BenchmarkResult(ResponseStats, Gradings):
    """One benchmark of `jaxrl eval`."""

    undecided: int  # as in HeldOutResult; by either rules
    right: NotRequired[list[int]]  # as in HeldOutResult
    judge: dict[str, int] | None  # how often it gave each label
    released: NotRequired[Released]  # with the protocol of that name


class BenchmarksResult(TypedDict):
    """results.json of `jaxrl eval --benchmarks`."""

    model: str
    settings: Settings
    judge: JudgeSettings | None
    benchmarks: dict[str, BenchmarkResult]
    average: dict[Grading, Average | None]


def evaluation_metrics(directory: Path, steps: int) -> dict[str, float]:
    """Accuracies that a run's folder has after so many steps, as metrics: eval/held_out/pass@1, eval/BENCHMARK/pass@1.

    Where there are several benchmarks, eval/average/pass@1 too.
    """
    found, name = dict[str, float](), f"step_{steps:06d}.json"
    held_out, benchmarks = (directory / "eval" / name, directory / "eval" / "benchmarks" / name)
    if held_out.exists():
        found["held_out"] = json.loads(held_out.read_text(encoding="utf-8"))["accuracy"]
    if benchmarks.exists():
        result: TrainingResult = json.loads(benchmarks.read_text(encoding="utf-8"))
        found |= {task: each["pass@1"] for task, each in result["benchmarks"].items()}
        if len(result["benchmarks"]) > 1:
            found["average"] = result["average"]["pass@1"]
    return {f"eval/{task}/pass@1": value for task, value in found.items()}
