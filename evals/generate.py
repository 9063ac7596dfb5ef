"""Responses to a benchmark's problems: each is on disk as soon as it ends, and is never generated again."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from evals.task import Task
from jaxrl.errors import InputError
from jaxrl.files import append
from jaxrl.sampling.sampler import Sampler, unchanged
from jaxrl.types import Detokenize, FinishReason, OnRollout, Rollout, SamplingParams


@dataclasses.dataclass(frozen=True)
class Response:
    """A row of NAME.jsonl."""

    problem: int
    sample: int
    answer: str  # the reference answer
    tokens: int
    finish_reason: FinishReason
    response: str


Responses = Sequence[Sequence[Response]]  # [P][G]
Found = Mapping[tuple[int, int], Response]  # by (problem, sample)


def read(path: Path, problems: int, samples: int) -> dict[tuple[int, int], Response]:
    """Reads the wanted responses that a file has; cuts off a last row that a killed process left incomplete.

    Args:
      path: the file; there may be none.
      problems: P, wanted are the first ones.
      samples: G, wanted are the first ones.

    Raises:
      InputError: if the file has rows of another kind.
    """
    found: dict[tuple[int, int], Response] = {}
    if not path.exists():
        return found
    whole = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                os.truncate(path, whole)
                break
            whole += len(line)
            try:
                row = Response(**json.loads(line))
            except (ValueError, TypeError):
                raise InputError(f"{path}:{number}: not a response; delete the line, or the file") from None
            if row.problem < problems and row.sample < samples:
                found.setdefault((row.problem, row.sample), row)
    return found


def in_order(found: Found, problems: int, samples: int) -> list[list[Response]]:
    """All responses as [P][G]."""
    return [[found[p, g] for g in range(samples)] for p in range(problems)]


def runs(numbers: Iterable[int]) -> list[range]:
    """Ascending numbers as ranges, as few as possible."""
    groups = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    return [range((one := [n for _, n in group])[0], one[-1] + 1) for _, group in groups]


def generate(
    task: Task,
    params: SamplingParams,
    seed: tuple[int, ...],
    sampler: Sampler,
    path: Path,
    detokenize: Detokenize,
    on_rollout: OnRollout = unchanged,
    parallel: int = 1,
) -> list[list[Response]]:
    """Samples the responses that a file lacks, and adds each to it as it ends.

    The randomness of sample g of problem p depends on (*seed, g x P + p) alone: neither on what the file had before,
    nor on `samples`, which may be raised later.

    Args:
      task: P problems with G responses to each.
      params: how to sample.
      seed: of all responses.
      sampler: has the model's parameters.
      path: the file.
      detokenize: token ids to text.
      on_rollout: called with each new rollout, by one thread at a time.
      parallel: calls of the sampler at one time, where it can take several. An interruption leaves gaps, and each gap
        is a call.

    Returns:
      all responses, [P][G].

    Raises:
      InputError: from the sampler, or where it refuses a prompt.
    """
    count, one_at_a_time = len(task.prompts), threading.Lock()
    found = read(path, count, task.samples)

    def keep(rollout: Rollout) -> Rollout:
        row = _row(rollout, detokenize)
        line = json.dumps(dataclasses.asdict(row), ensure_ascii=True) + "\n"
        with one_at_a_time:
            append(path, line)  # after an error of one call, the others write what they still get
            found[row.problem, row.sample] = row
            return on_rollout(rollout)

    def sample(numbers: range) -> None:
        pairs = [(task.prompts[n % count], f"{n % count}.{n // count}") for n in numbers]
        prompts = [dataclasses.replace(prompt, id=name) for prompt, name in pairs]
        sampler.generate(prompts, 1, params, seed, keep, numbers.start)

    _each(sample, runs(n for n in range(task.total) if (n % count, n // count) not in found), parallel)
    if len(found) < task.total:
        raise InputError(
            f"{path}: {task.total - len(found)} of {task.total} responses are missing, because the sampler refused "
            "their prompts (see above); give it a longer context, or repeat the command"
        )
    return in_order(found, count, task.samples)


def _row(rollout: Rollout, detokenize: Detokenize) -> Response:
    """The response of a rollout whose prompt has the id "problem.sample"."""
    problem, sample = map(int, rollout.prompt.id.split("."))
    text, tokens = detokenize(rollout.tokens), len(rollout.tokens)
    return Response(problem, sample, rollout.prompt.answer, tokens, rollout.finish_reason, text)


def _each(call: Callable[[range], None], gaps: Sequence[range], parallel: int) -> None:
    """Calls with each gap, several at a time where that is asked for."""
    if parallel == 1 or len(gaps) <= 1:
        for gap in gaps:
            call(gap)
        return
    pool = ThreadPoolExecutor(min(parallel, len(gaps)))
    try:
        for done in as_completed([pool.submit(call, gap) for gap in gaps]):
            done.result()
    finally:
        # After an error or Ctrl-C it does not wait for the other calls: the sampler's owner ends them.
        pool.shutdown(wait=False, cancel_futures=True)
