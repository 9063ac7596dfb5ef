"""Benchmarks, loaded and tokenized for a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from evals import benchmarks
from jaxrl import config, data
from jaxrl.types import Prompt, Tokenizer


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark, ready to be sampled: P problems with G responses to each."""

    name: str
    title: str
    problems: list[benchmarks.Problem]
    prompts: list[Prompt]
    samples: int  # G

    @property
    def total(self) -> int:
        """P x G responses."""
        return len(self.prompts) * self.samples

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.tokens) for prompt in self.prompts)


def load_tasks(
    chosen: Mapping[str, benchmarks.Benchmark],
    recipe: config.Recipe,
    tokenizer: Tokenizer,
    folder: Path | None,
    samples: int,
    vocabulary: data.Vocabulary | None = None,
) -> list[Task]:
    """Loads benchmarks.

    Args:
      chosen: by name.
      recipe: with [data], whose instruction is put around each problem, and [eval].
      tokenizer: the model's.
      folder: with local copies of the benchmarks; None takes them from the Hub.
      samples: responses to each problem; 0 takes each benchmark's own number. At temperature 0 there is one.
      vocabulary: the model's, to which token ids are held; None holds them to none.

    Raises:
      InputError: if one cannot be read, or the model or its chat template does not take a problem.
    """
    tasks = []
    for name, benchmark in chosen.items():
        problems = benchmarks.load(name, benchmark, folder)[: recipe.eval.problems or None]
        chats = [
            data.chat_of(
                problem.chat or problem.question,
                recipe.data,
                problem.where or name,
                column=benchmark.problem_column,
            )
            for problem in problems
        ]
        encoded = data.encode(tokenizer, recipe.data, chats, vocabulary)
        prompts = [
            Prompt(f"{name}.{i}", tokens, problem.answer)
            for i, (problem, tokens) in enumerate(zip(problems, encoded, strict=True))
        ]
        count = (samples or benchmark.samples) if recipe.eval.temperature else 1
        tasks.append(Task(name, benchmark.title or name, problems, prompts, count))
    return tasks
