"""Evaluation during training, by the run's own sampler: held-out problems, marked by its verifier, and benchmarks,
with its instruction and graded by rule."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evals import benchmarks, held_out, tables
from evals.generate import Response
from evals.grade import grade_many
from evals.task import Task, load_tasks
from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.files import write_atomically
from jaxrl.parallel import processes
from jaxrl.results import TaskResult, TrainingResult
from jaxrl.run import Run
from jaxrl.types import Detokenize, Prompt, Rollout, Tokenizer


@dataclasses.dataclass(frozen=True)
class InTraining:
    """What a recipe wants evaluated during training."""

    problems: list[Prompt]  # held out
    tasks: list[Task]  # benchmarks

    def __call__(self, run: Run, steps: int) -> None:
        """Writes eval/step_N.json and eval/benchmarks/step_N.json, unless they are there from before a restart."""
        setup = run.setup
        out = setup.directory / "eval" / f"step_{steps:06d}.json"
        if self.problems and not out.exists():
            held_out.measure(
                run.recipe,
                run.sampler,
                self.problems,
                setup.sampling,
                setup.mark,
                run.progress,
                out,
                "step",
                steps,
            )
        out = setup.directory / "eval" / "benchmarks" / out.name
        if self.tasks and not out.exists():
            run_benchmarks(run, self.tasks, out, steps)


def load(recipe: config.Recipe, tokenizer: Tokenizer) -> InTraining:
    """Loads what `eval.path` and `eval.benchmarks` name.

    Raises:
      InputError: if something cannot be read.
    """
    problems = held_out.load_problems(recipe, tokenizer) if recipe.eval.path else []
    tasks = load_benchmarks(recipe, tokenizer) if recipe.eval.benchmarks else []
    return InTraining(problems, tasks)


def load_benchmarks(recipe: config.Recipe, tokenizer: Tokenizer) -> list[Task]:
    """Loads the benchmarks of `eval.benchmarks`.

    Raises:
      InputError: if one cannot be read, or has a prompt that is too long for the recipe.
    """
    e, longest = recipe.eval, recipe.data.max_prompt_tokens
    folder = Path(e.benchmark_folder).expanduser() if e.benchmark_folder else None
    tasks = load_tasks(benchmarks.select(e.benchmarks), recipe, tokenizer, folder, e.benchmark_samples)
    for task in tasks:
        tokens = max(len(prompt.tokens) for prompt in task.prompts)
        if tokens > longest:
            raise InputError(
                f"eval.benchmarks: a prompt of {task.name} has {tokens} tokens; raise "
                f"data.max_prompt_tokens = {longest}, or leave {task.name} to jaxrl eval"
            )
    return tasks


def run_benchmarks(run: Run, tasks: Sequence[Task], out: Path, steps: int) -> None:
    """Evaluates what the sampler holds on benchmarks, by rule, and writes it to `out` as JSON."""
    progress, sampler = run.progress, run.sampler

    def on_rollout(rollout: Rollout) -> Rollout:
        progress.advance(rollout)
        return rollout

    began = time.monotonic()
    prompts = [prompt for task in tasks for prompt in task.prompts for _ in range(task.samples)]
    progress.phase("benchmarks", total=len(prompts))
    params = held_out.evaluation_params(run.recipe, run.setup.sampling)
    own = sampler.generate(prompts, 1, params, (run.recipe.run.seed,), on_rollout)
    responses = sampler.gather(own, prompts, f"benchmarks after step {steps}")
    if not processes.chief():
        return
    progress.phase("grading")
    if not all(responses):
        refused = responses.count([])
        run.say(f"no result after step {steps}: {refused} responses were refused by the sampler; see above")
        return
    found = measure(tasks, [group[0] for group in responses], run.setup.detokenize)
    result: TrainingResult = {
        "step": steps,
        "benchmarks": {name: task for name, (task, _) in found.items()},
        "average": tables.average({name: right.mean(axis=1) for name, (_, right) in found.items()}),
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_tokens": params.max_tokens,
        "seconds": time.monotonic() - began,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(result, indent=2))


def measure(
    tasks: Sequence[Task], rollouts: Sequence[Rollout], detokenize: Detokenize
) -> dict[str, tuple[TaskResult, np.ndarray]]:
    """What `jaxrl eval` measures by rule of each benchmark, and its marks [P, N].

    Args:
      tasks: benchmarks.
      rollouts: the responses to each one's problems in order, `samples` to each.
      detokenize: token ids to text.
    """
    texts = [detokenize(r.tokens) for r in rollouts]
    right = np.array(grade_many([(text, r.prompt.answer) for text, r in zip(texts, rollouts, strict=True)]))
    found, at = dict[str, tuple[TaskResult, np.ndarray]](), 0
    for task in tasks:
        end = at + len(task.prompts) * task.samples
        marks = right[at:end].reshape(len(task.prompts), task.samples)
        responses = [
            Response(i // task.samples, i % task.samples, r.prompt.answer, len(r.tokens), r.finish_reason, text)
            for i, (r, text) in enumerate(zip(rollouts[at:end], texts[at:end], strict=True))
        ]
        groups = [responses[i : i + task.samples] for i in range(0, len(responses), task.samples)]
        found[task.name] = (
            {"title": task.title, **tables.describe(groups), **tables.measure(marks, groups)},
            marks,
        )
        at = end
    return found
