"""Evaluation during training by the run's own sampler.

Responses to held-out problems are marked by the run's verifier. Benchmarks have the run's instruction, and are graded
by rule.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from evals import benchmarks, held_out, measures
from evals.generate import Response
from evals.held_out import HeldOut
from evals.task import Task, load_tasks
from jaxrl import config, data
from jaxrl.errors import InputError
from jaxrl.files import write_atomically
from jaxrl.parallel import processes
from jaxrl.results import Average, TaskResult, TrainingResult
from jaxrl.run import Run
from jaxrl.types import Detokenize, Prompt, Rollout, SamplingParams, Tokenizer


@dataclasses.dataclass(frozen=True)
class InTraining:
    """The evaluations that a recipe wants during training."""

    problems: list[Prompt]  # held out
    tasks: list[Task]  # benchmarks

    def __call__(self, run: Run, steps: int) -> None:
        """Writes eval/step_N.json and eval/benchmarks/step_N.json, unless they exist since before a restart."""
        setup = run.setup
        params = held_out.evaluation_params(run.recipe, setup.sampling.stop_ids)
        out = setup.directory / "eval" / f"step_{steps:06d}.json"
        if self.problems and not out.exists():
            problems = HeldOut(run.recipe, self.problems, params, setup.mark)
            problems.measure(run.sampler, run.progress, out, "step", steps)
        out = setup.directory / "eval" / "benchmarks" / out.name
        if self.tasks and not out.exists():
            run_benchmarks(run, self.tasks, params, out, steps)


def load(recipe: config.Recipe, tokenizer: Tokenizer, vocabulary: data.Vocabulary) -> InTraining:
    """Loads the problems that `eval.path` and `eval.benchmarks` name.

    Raises:
      InputError: if something cannot be read.
    """
    problems = held_out.load_problems(recipe, tokenizer, vocabulary) if recipe.eval.path else []
    tasks = load_benchmarks(recipe, tokenizer, vocabulary) if recipe.eval.benchmarks else []
    return InTraining(problems, tasks)


def load_benchmarks(
    recipe: config.Recipe, tokenizer: Tokenizer, vocabulary: data.Vocabulary | None = None
) -> list[Task]:
    """Loads the benchmarks of `eval.benchmarks`.

    Raises:
      InputError: if one cannot be read, or has a prompt that is too long for the recipe.
    """
    section, limit = recipe.eval, recipe.data.max_prompt_tokens
    folder = Path(section.benchmark_folder).expanduser() if section.benchmark_folder else None
    chosen = benchmarks.select(section.benchmarks)
    tasks = load_tasks(chosen, recipe, tokenizer, folder, section.benchmark_samples, vocabulary)
    for task in tasks:
        if task.longest > limit:
            raise InputError(
                f"eval.benchmarks: a prompt of {task.name} has {task.longest} tokens; raise "
                f"data.max_prompt_tokens = {limit}, or leave {task.name} to jaxrl eval"
            )
    return tasks


def run_benchmarks(run: Run, tasks: Sequence[Task], params: SamplingParams, out: Path, steps: int) -> None:
    """Evaluates what the sampler holds on benchmarks, by rule, and writes the result to `out` as JSON."""
    progress, sampler = run.progress, run.sampler

    def on_rollout(rollout: Rollout) -> Rollout:
        progress.advance(rollout)
        return rollout

    began = time.monotonic()
    prompts = [prompt for task in tasks for prompt in task.prompts for _ in range(task.samples)]
    progress.phase("benchmarks", total=len(prompts))
    own = sampler.generate(prompts, 1, params, (run.recipe.run.seed,), on_rollout)
    responses = sampler.gather(own, prompts, f"benchmarks after step {steps}")
    if not processes.chief():
        return
    progress.phase("grading")
    if not all(responses):
        refused = responses.count([])
        run.say(
            f"no result after step {steps}: {refused} responses were refused by the sampler; see above why"
        )
        return
    found, average, corrected = measure(tasks, [group[0] for group in responses], run.setup.detokenize)
    result: TrainingResult = {
        "step": steps,
        "benchmarks": found,
        "average": average,
        "corrected": corrected,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_tokens": params.max_tokens,
        "seconds": time.monotonic() - began,
    }
    write_atomically(out, json.dumps(result, indent=2))


def measure(
    tasks: Sequence[Task], rollouts: Sequence[Rollout], detokenize: Detokenize
) -> tuple[dict[str, TaskResult], Average, Average]:
    """Grades responses by both rules, and measures each benchmark as `jaxrl eval` does.

    Args:
      tasks: benchmarks, each of P problems with G responses.
      rollouts: the responses to each one's problems in order, those to one problem side by side.
      detokenize: token ids to text.

    Returns:
      the result of each benchmark, by name, and their averages by rule and by the corrected rules.
    """
    texts = [detokenize(r.tokens) for r in rollouts]
    pairs = [(text, r.prompt.answer) for text, r in zip(texts, rollouts, strict=True)]
    marks = measures.grade_by_both(pairs)
    found, per_problem, at = dict[str, TaskResult](), [], 0
    for task in tasks:
        own = slice(at, at + task.total)
        rows = [
            Response(*divmod(i, task.samples), r.prompt.answer, len(r.tokens), r.finish_reason, text)
            for i, (r, text) in enumerate(zip(rollouts[own], texts[own], strict=True))
        ]
        responses = [rows[i : i + task.samples] for i in range(0, task.total, task.samples)]
        shape = len(task.prompts), task.samples
        grades, corrected, undecided = (each[own].reshape(shape) for each in marks)
        found[task.name] = {
            "title": task.title,
            "undecided": int(undecided.sum()),
            **measures.describe(responses),
            **measures.measure(grades, responses),
            "corrected": measures.measure(corrected, responses),
        }
        per_problem.append((grades.mean(axis=1), corrected.mean(axis=1)))
        at += task.total
    by_rule, by_corrected = (measures.average(values) for values in zip(*per_problem, strict=True))
    return found, by_rule, by_corrected
