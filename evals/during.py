"""Benchmarks during training: with the run's own instruction, answered by its sampler, graded by rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evals import benchmarks, tables
from evals.generate import Response
from evals.grade import grade_many
from jaxrl import config, data
from jaxrl.errors import InputError
from jaxrl.sampling.sampler import Prompt, Rollout


@dataclasses.dataclass(frozen=True)
class Test:
    """A benchmark, ready to be sampled."""

    title: str
    prompts: list[Prompt]
    samples: int


def load(recipe: config.Recipe, tokenizer: Any) -> dict[str, Test]:
    """The benchmarks of `eval.benchmarks` by name.

    Raises:
      InputError: if one cannot be read, or has a prompt that is too long for the recipe.
    """
    e, longest = recipe.eval, recipe.data.max_prompt_tokens
    tests = {}
    for name, benchmark in benchmarks.select(e.benchmarks).items():
        folder = Path(e.benchmark_folder).expanduser() if e.benchmark_folder else None
        problems = benchmarks.load(name, benchmark, folder)[: e.problems or None]
        encoded = list(data.encode(tokenizer, recipe.data, [problem.question for problem in problems]))
        if max(map(len, encoded)) > longest:
            raise InputError(
                f"eval.benchmarks: a prompt of {name} has {max(map(len, encoded))} tokens; raise "
                f"data.max_prompt_tokens = {longest}, or leave {name} to jaxrl eval"
            )
        prompts = [
            Prompt(f"{name}.{i}", tokens, problem.answer)
            for i, (problem, tokens) in enumerate(zip(problems, encoded, strict=True))
        ]
        samples = (
            (e.benchmark_samples or benchmark.samples) if e.temperature else 1
        )  # greedy ones are all the same
        tests[name] = Test(benchmark.title or name, prompts, samples)
    return tests


def scores(
    tests: dict[str, Test], rollouts: Sequence[Rollout], decode: Callable[[Any], str]
) -> dict[str, Any]:
    """What `jaxrl eval` measures by rule of each benchmark, and the average.

    Args:
      tests: benchmarks by name.
      rollouts: the responses to each one's problems in order, `samples` to each.
      decode: token ids to text.
    """
    texts = [decode(r.tokens) for r in rollouts]
    right = np.array(grade_many([(text, r.prompt.answer) for text, r in zip(texts, rollouts, strict=True)]))
    found, marks, at = {}, {}, 0
    for name, test in tests.items():
        groups = []
        for p, prompt in enumerate(test.prompts):
            own = slice(at + p * test.samples, at + (p + 1) * test.samples)
            groups.append([
                Response(p, g, prompt.answer, len(r.tokens), r.finish_reason, text)
                for g, (r, text) in enumerate(zip(rollouts[own], texts[own], strict=True))
            ])  # fmt: skip
        end = at + len(test.prompts) * test.samples
        marks[name], at = right[at:end].reshape(len(test.prompts), test.samples), end
        found[name] = {"title": test.title} | tables.describe(groups) | tables.measure(marks[name], groups)
    average = tables.average({name: each.mean(axis=1) for name, each in marks.items()})
    return {"benchmarks": found, "average": average}
