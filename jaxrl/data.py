"""Prompts: from a file or a Hub id to token ids. Which of them make up batch k is a function of the seed and k."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.sampling.sampler import Prompt

# The instruction that DAPO-Math-17k puts around every problem; JustRL's authors took it off.
DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts ready for sampling, and what became of the rows they were made from."""

    prompts: list[Prompt]
    path: str
    rows: int
    duplicates: int
    overlong: int

    def summary(self) -> str:
        return (
            f"{self.path}: {len(self.prompts):,} prompts from {self.rows:,} rows "
            f"({self.duplicates:,} duplicates, {self.overlong:,} over-long left out)"
        )


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a Hugging Face folder.

    Raises:
      InputError: if there is none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever the many tokenizer classes raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path}: no readable tokenizer ({reason}); a model folder has tokenizer.json"
        ) from None


def load_prompts(section: config.Data, tokenizer: Any, path: str | None = None, limit: int = 0) -> PromptSet:
    """Reads, cleans, templates and tokenizes problems.

    Args:
      section: the recipe's [data].
      tokenizer: of transformers.
      path: other rows than section.path's (held-out problems).
      limit: take the first n that are left; 0 takes all.

    Raises:
      InputError: naming the file, and the row or column, for anything that cannot be used as it is.
    """
    source = path or section.path
    if section.chat_template and not tokenizer.chat_template:
        raise InputError(
            "the model's tokenizer has no chat template; set data.chat_template = false for plain text"
        )
    seen: set[str] = set()
    kept: list[tuple[str, str, str]] = []
    rows = 0
    for where, row in read_rows(source, (section.problem_column, section.answer_column)):
        rows += 1
        text = _problem(_column(row, section.problem_column, where), section.strip_dapo_wrapper)
        answer = _answer(_column(row, section.answer_column, where), section.answer_column, where)
        if section.deduplicate and text in seen:
            continue
        seen.add(text)
        kept.append((str(row.get("id", row.get("index", rows - 1))), text, answer))
    if not kept:
        raise InputError(f"{source}: has no rows; give a file with problems")
    prompts: list[Prompt] = []
    overlong = 0
    for name, text, answer in kept:
        tokens = _encode(tokenizer, section.prefix + text + section.suffix, section.chat_template)
        if len(tokens) > section.max_prompt_tokens:
            overlong += 1
        elif not limit or len(prompts) < limit:
            prompts.append(Prompt(name, tokens, answer))
    if not prompts:
        raise InputError(
            f"{source}: all {overlong} prompts are longer than data.max_prompt_tokens = "
            f"{section.max_prompt_tokens}; raise it"
        )
    return PromptSet(prompts, source, rows, rows - len(kept), overlong)


def batch(prompts: Sequence[Prompt], seed: int, step: int, size: int, order: str) -> list[Prompt]:
    """The prompts of one step, a pure function of the arguments.

    `shuffle` walks through epochs, each a permutation of its own; `replacement` draws independently.
    """
    n = len(prompts)
    if order == "replacement":
        return [prompts[i] for i in np.random.default_rng((seed, step)).integers(n, size=size)]
    positions = range(step * size, (step + 1) * size)
    epochs = {e: np.random.default_rng((seed, e)).permutation(n) for e in {p // n for p in positions}}
    return [prompts[epochs[p // n][p % n]] for p in positions]


def read_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, row) from a .jsonl or .parquet file, or from the training files of a Hub data set.

    Raises:
      InputError: if there is no such file or data set, or a line is not JSON.
    """
    file = Path(path)
    if file.suffix in (".jsonl", ".parquet"):
        if not file.is_file():
            raise InputError(f"{path}: no such file; data.path takes a .jsonl or .parquet file or a Hub id")
        yield from (_parquet_rows if file.suffix == ".parquet" else _jsonl_rows)(file, columns)
        return
    if path.count("/") != 1 or file.exists():
        raise InputError(f"{path}: neither a .jsonl nor a .parquet file nor a Hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(path, repo_type="dataset", allow_patterns=["*.parquet", "*.jsonl"]))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: no such file, and the Hub did not have it: {reason}") from None
    files = sorted(f for f in folder.rglob("*") if f.suffix in (".jsonl", ".parquet"))
    training = [f for f in files if "train" in f.stem] or files
    for part in training:
        yield from (_parquet_rows if part.suffix == ".parquet" else _jsonl_rows)(part, columns)


def _jsonl_rows(file: Path, _: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{file}:{number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(
                    f"{file}:{number}: a row is an object with columns, this is a {type(row).__name__}"
                )
            yield f"{file}:{number}", row


def _parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except Exception as error:
        raise InputError(f"{file}: not a parquet file ({error}); get it again") from None
    there = set(table.schema_arrow.names)
    wanted = [c for c in {*(c.split(".")[0] for c in columns), "id", "index"} if c in there]
    number = 0
    for chunk in table.iter_batches(columns=wanted):
        for row in chunk.to_pylist():
            number += 1
            yield f"{file}, row {number}", row
    if number and not wanted:
        raise InputError(f"{file}: has the columns {', '.join(sorted(there))}, not {' and '.join(columns)}")


def _column(row: dict[str, Any], name: str, where: str) -> Any:
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            there = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise InputError(
                f"{where}: no column '{name}'; there are: {there}. Set data.problem_column or data.answer_column"
            )
        value = value[part]
    return value


def _problem(value: Any, strip_wrapper: bool) -> str:
    text = value if isinstance(value, str) else value[0]["content"]
    return text.removeprefix(DAPO_PREFIX).removesuffix(DAPO_SUFFIX) if strip_wrapper else text


def _answer(value: Any, column: str, where: str) -> str:
    text = "" if value is None else str(value)
    if not text.strip():
        raise InputError(f"{where}: '{column}' is empty; every row needs an answer, remove it or fill it in")
    boxed = text.startswith("\\boxed{") and text.endswith("}")
    return text[len("\\boxed{") : -1] if boxed else text


def _encode(tokenizer: Any, text: str, chat_template: bool) -> np.ndarray:
    if chat_template:  # the template writes its own special tokens
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
    return np.array(tokenizer.encode(text, add_special_tokens=not chat_template), np.int32)
