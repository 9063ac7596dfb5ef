"""Evaluation during training, by the run's own sampler: held-out problems, marked by its verifier, and benchmarks, with
its instruction and graded by rule."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evals import benchmarks, heldout, tables
from evals.generate import Response
from evals.grade import grade_many
from jaxrl import config, data, distributed, telemetry
from jaxrl.errors import InputError
from jaxrl.sampling.sampler import Prompt, Rollout, SamplingParams
from jaxrl.sampling.shares import Shared


@dataclasses.dataclass(frozen=True)
class Test:
    """A benchmark, ready to be sampled."""

    title: str
    prompts: list[Prompt]
    samples: int


def load_held_out(recipe: config.Recipe, tokenizer: Any) -> list[Any]:
    if not recipe.eval.path:
        raise InputError("eval.path is empty; name a .parquet or .jsonl file of held-out problems")
    return data.load_prompts(
        recipe.data, tokenizer, path=recipe.eval.path, limit=recipe.eval.problems
    ).prompts


def load_benchmarks(recipe: config.Recipe, tokenizer: Any) -> dict[str, Test]:
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


def run_evaluation(
    recipe: config.Recipe, sampler: Shared, prompts: list[Any], sampling: SamplingParams, verify: Any,
    progress: telemetry.Progress, out: Path, name: str, step: int,
) -> dict[str, Any]:  # fmt: skip
    """Held-out accuracy of what the sampler holds, written to `out` as JSON."""
    e = recipe.eval

    def each(rollout: Rollout) -> Rollout:
        progress.advance(1, len(rollout.tokens), rollout.server)
        return verify(rollout)

    params = evaluation_params(recipe, sampling)
    own = sampler.generate(prompts, e.samples, params, (recipe.run.seed,), each)
    result = heldout.summary(sampler.gather(own, prompts, f"evaluation {name} {step}"), params)
    result = {"name": name, "step": step} | result
    if distributed.chief():
        out.parent.mkdir(parents=True, exist_ok=True)
        telemetry.write_atomically(out, json.dumps(result, indent=2))
    return result


def run_benchmarks(
    recipe: config.Recipe, sampler: Shared, tests: dict[str, Test], sampling: SamplingParams,
    decode: Callable[[Any], str], progress: telemetry.Progress, out: Path, step: int, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Scores on benchmarks of what the sampler holds, by rule, written to `out` as JSON."""

    def each(rollout: Rollout) -> Rollout:
        progress.advance(1, len(rollout.tokens), rollout.server)
        return rollout

    began = time.monotonic()
    prompts = [prompt for test in tests.values() for prompt in test.prompts for _ in range(test.samples)]
    progress.phase("benchmarks", total=len(prompts))
    params = evaluation_params(recipe, sampling)
    own = sampler.generate(prompts, 1, params, (recipe.run.seed,), each)
    responses = sampler.gather(own, prompts, f"benchmarks after step {step}")
    if not distributed.chief():
        return
    progress.phase("grading")
    if not all(responses):
        say(
            f"no scores after step {step}: {responses.count([])} responses were refused by the sampler; see above why"
        )
        return
    result = {"step": step} | scores(tests, [group[0] for group in responses], decode)
    result |= {"temperature": params.temperature, "top_p": params.top_p, "max_tokens": params.max_tokens}
    out.parent.mkdir(parents=True, exist_ok=True)
    telemetry.write_atomically(out, json.dumps(result | {"seconds": time.monotonic() - began}, indent=2))


def evaluation_params(recipe: config.Recipe, sampling: SamplingParams) -> SamplingParams:
    e = recipe.eval
    longest = e.max_tokens or recipe.rollout.max_tokens
    return dataclasses.replace(
        sampling, temperature=e.temperature, top_p=e.top_p, top_k=0, max_tokens=longest
    )
