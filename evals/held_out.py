"""Accuracy on held-out problems by the training verifier or eval.verifier: the before and after of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from evals.grade import undecided_note
from evals.statistics import confidence
from jaxrl import config, data
from jaxrl.errors import InputError
from jaxrl.files import write_atomically
from jaxrl.marking import columns_for, finished, functions_of, make_marker
from jaxrl.models import hf
from jaxrl.parallel import processes
from jaxrl.parallel.mesh import make_mesh
from jaxrl.results import HeldOutResult
from jaxrl.sampling import servers
from jaxrl.sampling.across_processes import Shared
from jaxrl.sampling.open import open_sampler
from jaxrl.telemetry.progress import Progress
from jaxrl.types import Detokenize, Groups, OnRollout, Prompt, Rollout, SamplingParams, Say, Tokenizer

# Of [eval]: how answers are sampled
SAMPLED = ("samples", "benchmark_samples", "max_tokens", "temperature", "top_p")


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out problems, and how responses to them are sampled and marked."""

    recipe: config.Recipe
    problems: Sequence[Prompt]
    params: SamplingParams  # see `evaluation_params`
    mark: OnRollout

    def measure(
        self, sampler: Shared, progress: Progress, out: Path, name: str, step: int, identity: str = ""
    ) -> HeldOutResult:
        """Measures the accuracy of what the sampler holds, and writes it as JSON.

        Args:
          sampler: has the parameters.
          progress: shows the phase.
          out: the file to write, by the first process.
          name: of the result.
          step: steps that the model was trained.
          identity: of the run and its evaluation, kept in the result; empty for none.

        Raises:
          InputError: if the sampler refuses a problem.
        """
        samples, seed = self.recipe.eval.samples, (self.recipe.run.seed,)
        progress.phase("eval", total=len(self.problems) * samples)

        def on_rollout(rollout: Rollout) -> Rollout:
            progress.advance(rollout)
            return self.mark(rollout)

        own = finished(sampler.generate(self.problems, samples, self.params, seed, on_rollout))
        groups = sampler.gather(own, self.problems, f"evaluation {name} {step}")
        result = summary(groups, self.params, name, step)
        if identity:
            result["identity"] = identity
        if processes.chief():
            write_atomically(out, json.dumps(result, indent=2))
        return result


def as_marked(recipe: config.Recipe) -> config.Recipe:
    """A recipe whose verifier is that of evaluations."""
    if not recipe.eval.verifier:
        return recipe
    return dataclasses.replace(
        recipe, reward=dataclasses.replace(recipe.reward, verifier=recipe.eval.verifier)
    )


def marker(recipe: config.Recipe, detokenize: Detokenize) -> OnRollout:
    """Marks held-out answers."""
    marked = as_marked(recipe)
    return make_marker(marked, detokenize, functions_of(marked))


def load_problems(recipe: config.Recipe, tokenizer: Tokenizer, vocabulary: data.Vocabulary) -> list[Prompt]:
    """Loads the problems of `eval.path`.

    Raises:
      InputError: if it is empty or cannot be read.
    """
    if not recipe.eval.path:
        raise InputError("eval.path is empty; name a file, folder or Hub id of held-out problems")
    reward = as_marked(recipe).reward
    verifier, columns = reward.marked_by, columns_for(reward)
    return data.load_prompts(recipe.data, tokenizer, recipe.eval, verifier, vocabulary, columns).prompts


def evaluate(
    recipe: config.Recipe,
    model: str | Path,
    out: Path,
    name: str,
    step: int,
    devices: servers.Devices = servers.CPU,
    say: Say = print,
) -> HeldOutResult:
    """Evaluates a model on a recipe's held-out problems.

    Args:
      recipe: with [data], [reward], [eval], and how to sample.
      model: Hugging Face folder or Hub id.
      out: the JSON file to write.
      name: of the result.
      step: steps that the model was trained.
      devices: where started vLLM servers run.
      say: prints a line.

    Raises:
      InputError: if something cannot be used, or the sampler refuses a problem.
      RunError: if a server stops, does not get ready or does not answer.
    """
    folder = hf.resolve(model)
    mesh = make_mesh()  # the devices of this process, which may be fewer than training had
    loaded = hf.load(folder, mesh=mesh)
    tokenizer = data.load_tokenizer(str(folder))
    mark = marker(recipe, data.detokenizer(tokenizer))
    vocabulary = data.read_vocabulary(folder, tokenizer, loaded.config.vocab_size)
    say(vocabulary.summary)
    params = evaluation_params(recipe, vocabulary.stop_ids)
    held_out = HeldOut(recipe, load_problems(recipe, tokenizer, vocabulary), params, mark)
    with (
        open_sampler(recipe, folder, loaded.config, mesh, say, devices) as sampler,
        Progress(1, 0, title=f"eval {name}") as progress,
    ):
        sampler.publish(loaded.params, 0)
        result = held_out.measure(sampler, progress, out, name, step)
    low, high = result["ci95"]
    say(
        f"{name}: accuracy {result['accuracy']:.3f} (95% {low:.3f} to {high:.3f}) on {result['problems']} "
        f"problems x {result['samples']}, mean length {result['length_mean']:.1f} tokens -> {out}"
    )
    if result["undecided"]:
        say(f"{name}: {undecided_note(result['undecided'])}")
    return result


def evaluation_params(recipe: config.Recipe, stop_ids: tuple[int, ...]) -> SamplingParams:
    """How an evaluation samples: with the settings of [eval] and the model's stop tokens."""
    section = recipe.eval
    longest = section.max_tokens or recipe.rollout.max_tokens
    return SamplingParams(section.temperature, section.top_p, 0, longest, stop_ids)


def summary(groups: Groups, params: SamplingParams, name: str, step: int) -> HeldOutResult:
    """Summarizes marked responses [P][G] to held-out problems.

    Raises:
      InputError: if there is a problem without responses.
    """
    right, samples = right_ones(groups), len(groups[0])
    per_problem = right.mean(axis=1)
    flat = [rollout for group in groups for rollout in group]
    result: HeldOutResult = {
        "name": name,
        "step": step,
        "accuracy": float(per_problem.mean()),
        "ci95": confidence(per_problem),
        f"pass@{samples}": float(right.any(axis=1).mean()),  # type: ignore[misc]  # one key for each N
        "problems": len(groups),
        "samples": samples,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "length_mean": float(np.mean([len(r.tokens) for r in flat])),
        "truncated_fraction": float(np.mean([r.finish_reason == "length" for r in flat])),
        "undecided": sum(r.undecided for r in flat),
        "right": right.sum(axis=1).tolist(),
    }
    return result


def right_ones(groups: Groups) -> Bool[np.ndarray, "P G"]:
    """Which of the marked responses are right.

    Raises:
      InputError: if there is a problem without responses.
    """
    if not all(groups):
        refused = sum(not group for group in groups)
        raise InputError(f"{refused} of {len(groups)} problems were refused by the sampler; see above why")
    return np.array([[rollout.score for rollout in group] for group in groups]) > 0
