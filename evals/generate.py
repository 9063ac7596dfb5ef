"""Responses to a benchmark's problems: each is on disk as soon as it ends, and is never generated again."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxrl.errors import InputError
from jaxrl.sampling.sampler import Sampler
from jaxrl.types import Prompt, Rollout, SamplingParams


@dataclasses.dataclass(frozen=True)
class Response:
    """A row of the file."""

    problem: int
    sample: int
    answer: str  # the reference answer
    tokens: int
    finish_reason: str  # stop or length
    response: str


def read(path: Path, problems: int, samples: int) -> dict[tuple[int, int], Response]:
    """What the file has of the wanted (problem, sample); a row that a killed process left torn is cut off it.

    Raises:
      InputError: if there is something else in it.
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


def runs(numbers: Iterable[int]) -> list[range]:
    """Ascending numbers as ranges, as few as possible."""
    groups = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    return [range((one := [n for _, n in group])[0], one[-1] + 1) for _, group in groups]


def generate(
    prompts: Sequence[Prompt],
    samples: int,
    params: SamplingParams,
    seed: tuple[int, ...],
    sampler: Sampler,
    path: Path,
    decode: Callable[[Any], str],
    told: Callable[[Rollout], None] = lambda rollout: None,
    parallel: int = 1,
) -> list[list[Response]]:
    """`samples` responses to each prompt, [P][G]: those that the file has, and the others, which are added to it.

    The randomness of sample g of problem p depends on (*seed, g x P + p) alone: not on what was there before, nor on
    `samples`, which may be raised later.

    Args:
      decode: token ids to text.
      told: hears of every new one.
      parallel: calls of the sampler at one time, where it can take several; what is left of an interrupted call needs
        one for every gap.

    Raises:
      InputError: from the sampler, or where it refuses a prompt.
    """
    count = len(prompts)
    done = read(path, count, samples)

    with path.open("a", encoding="utf-8") as file:

        def each(rollout: Rollout) -> Rollout:
            p, g = map(int, rollout.prompt.id.split("."))
            row = Response(
                p,
                g,
                rollout.prompt.answer,
                len(rollout.tokens),
                rollout.finish_reason,
                decode(rollout.tokens),
            )
            file.write(json.dumps(dataclasses.asdict(row), ensure_ascii=True) + "\n")
            file.flush()
            done[p, g] = row
            told(rollout)
            return rollout

        def sample(numbers: range) -> None:
            work = [dataclasses.replace(prompts[n % count], id=f"{n % count}.{n // count}") for n in numbers]
            sampler.generate(work, 1, params, seed, each, numbers.start)

        left = runs(n for n in range(count * samples) if (n % count, n // count) not in done)
        if parallel == 1 or len(left) == 1:
            for numbers in left:
                sample(numbers)
        elif left:
            pool = ThreadPoolExecutor(min(parallel, len(left)))
            try:
                list(pool.map(sample, left))
            finally:  # not to wait for others after an error or Ctrl-C: the sampler's owner ends them
                pool.shutdown(wait=False, cancel_futures=True)
    if len(done) < count * samples:
        raise InputError(
            f"{path}: {count * samples - len(done)} of {count * samples} responses are missing, because the sampler "
            "refused their prompts (see above); give it a longer context, or repeat the command"
        )
    return [[done[p, g] for g in range(samples)] for p in range(count)]
