"""Prompts: from rows to what is sampled. The batch of a step is a function of the seed and the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrl import config
from jaxrl.data.rows import read_rows
from jaxrl.data.tokens import encode, require_template
from jaxrl.errors import InputError
from jaxrl.rewards.strict_boxed import BOX, extract
from jaxrl.types import Order, Prompt, Tokenizer

# The instruction that DAPO-Math-17k puts around every problem; JustRL's authors took it off.
DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'

ID_COLUMNS = ("id", "index", "extra_info.index")  # the first of these that a row has names its prompt
COPIES = 100  # of each row, in the released DAPO-Math-17k


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts ready for sampling, and counts of the rows that they come from."""

    prompts: list[Prompt]
    path: str
    rows: int
    duplicates: int
    overlong: int

    def summary(self) -> str:
        """A line for people."""
        return (
            f"{self.path}: {len(self.prompts):,} prompts from {self.rows:,} rows "
            f"({self.duplicates:,} duplicates, {self.overlong:,} over-long left out)"
        )


def load_prompts(
    section: config.Data, tokenizer: Tokenizer, path: str | None = None, limit: int = 0
) -> PromptSet:
    """Reads, cleans, templates and tokenizes problems.

    Args:
      section: the recipe's [data].
      tokenizer: of the model.
      path: of other rows than section.path's (held-out problems).
      limit: takes the first n that are not over-long; 0 takes all.

    Raises:
      InputError: naming the file, and the row or column, for anything that cannot be used as it is.
    """
    source = path or section.path
    require_template(tokenizer, section)
    rows, problems = _read_problems(source, section)
    texts = [problem.text for problem in problems]
    prompts: list[Prompt] = []
    overlong = 0
    for problem, tokens in zip(problems, encode(tokenizer, section, texts), strict=False):
        if limit and len(prompts) == limit:
            break
        if len(tokens) > section.max_prompt_tokens:
            overlong += 1
        else:
            prompts.append(Prompt(problem.id, tokens, problem.answer))
    if not prompts:
        raise InputError(
            f"{source}: all {overlong} prompts are longer than data.max_prompt_tokens = "
            f"{section.max_prompt_tokens}; raise it"
        )
    return PromptSet(prompts, source, rows, rows - len(problems), overlong)


def batch(prompts: Sequence[Prompt], seed: int, step: int, size: int, order: Order) -> list[Prompt]:
    """The prompts of one step, a pure function of the arguments.

    `shuffle` goes through epochs, each a permutation of its own, and a batch may span two or more; an epoch of
    `copies` has every prompt COPIES times; `replacement` draws independently.
    """
    n = len(prompts)
    if order == "replacement":
        return [prompts[i] for i in np.random.default_rng((seed, step)).integers(n, size=size)]
    rows = n * COPIES if order == "copies" else n
    positions = range(step * size, (step + 1) * size)
    epochs = {e: np.random.default_rng((seed, e)).permutation(rows) for e in {p // rows for p in positions}}
    return [prompts[epochs[p // rows][p % rows] % n] for p in positions]


class _Kept(NamedTuple):
    """A row that was kept."""

    id: str
    text: str
    answer: str


def _read_problems(source: str, section: config.Data) -> tuple[int, list[_Kept]]:
    """The number of rows, and the problems in them, without duplicates where the recipe wants that.

    Raises:
      InputError: if there are none, or a row cannot be used.
    """
    problems: list[_Kept] = []
    seen: set[str] = set()
    rows = 0
    for where, row in read_rows(source, (section.problem_column, section.answer_column), ID_COLUMNS):
        rows += 1
        text = _problem_text(row[section.problem_column], section, where)
        if section.deduplicate and text in seen:
            continue
        seen.add(text)
        name = next((str(row[c]) for c in ID_COLUMNS if row.get(c) is not None), str(rows))
        problems.append(_Kept(name, text, _answer_text(row[section.answer_column], section, where)))
    if not problems:
        raise InputError(f"{source}: no rows in it; give a file with problems")
    return rows, problems


def _problem_text(value: object, section: config.Data, where: str) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = value[0].get("content")
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{where}: '{section.problem_column}' holds neither text nor chat messages; remove the row or fill it in"
        )
    return value.removeprefix(DAPO_PREFIX).removesuffix(DAPO_SUFFIX) if section.strip_dapo_wrapper else value


def _answer_text(value: object, section: config.Data, where: str) -> str:
    """The answer as the strict verifier compares it: only a box around the whole of it is taken off."""
    column = section.answer_column
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise InputError(f"{where}: '{column}' is {value!r}, neither text nor an integer; write it as text")
    text = "" if value is None else str(value)
    inside = extract(text)
    text = inside if inside is not None and text == f"{BOX}{inside}}}" else text
    if not text.strip():
        raise InputError(f"{where}: '{column}' is empty; every row needs an answer, remove it or fill it in")
    return text
