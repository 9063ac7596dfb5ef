"""Prompts: from a file or a Hub id to token ids. The batch of a step is a function of the seed and the step."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from jaxtyping import Int32

from jaxrl import config
from jaxrl.errors import InputError, first_line
from jaxrl.rewards.strict_boxed import BOX, extract
from jaxrl.types import Detokenize, JsonObject, Order, Prompt, Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Iterator[tuple[str, JsonObject]]  # where a row is, for messages, and its values by column

# The instruction that DAPO-Math-17k puts around every problem; JustRL's authors took it off.
DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'

ID_COLUMNS = ("id", "index", "extra_info.index")  # the first of these that a row has names its prompt
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
BATCH = 1024  # rows templated and tokenized at a time
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


def load_tokenizer(path: str) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face folder.

    Raises:
      InputError: if there is none, or it cannot be read.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing is intended
    from transformers import AutoTokenizer

    # Where all of these are missing, transformers makes up an empty tokenizer from config.json.
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in VOCABULARIES):
        raise InputError(f"{path}: no tokenizer; the folder needs tokenizer.json and tokenizer_config.json")
    try:
        return cast(Tokenizer, AutoTokenizer.from_pretrained(path))
    except Exception as error:  # whatever the many tokenizer classes raise
        why = first_line(error)
        raise InputError(
            f"{path}: no readable tokenizer ({why}); a model folder has tokenizer.json"
        ) from None


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


def read_rows(path: str, columns: Sequence[str], optional: Sequence[str] = ()) -> Rows:
    """Yields (where, {column: value}) from a .jsonl or .parquet file, or the training files of a Hub data set.

    Args:
      path: the file, or a Hub id.
      columns: to read; a dot enters a struct.
      optional: to read where a row or file has them.

    Raises:
      InputError: if there is no such file, data set or column, or a line is not JSON.
    """
    for file in _files(path):
        yield from (_parquet_rows if file.suffix == ".parquet" else _jsonl_rows)(file, columns, optional)


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


def _files(path: str) -> list[Path]:
    file = Path(path)
    if file.suffix in (".jsonl", ".parquet"):
        if not file.is_file():
            raise InputError(f"{path}: no such file; data.path takes a .jsonl or .parquet file or a Hub id")
        return [file]
    if path.count("/") != 1 or file.exists():
        raise InputError(f"{path}: neither a .jsonl nor a .parquet file nor a Hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(path, repo_type="dataset", allow_patterns=["*.parquet", "*.jsonl"]))
    except Exception as error:  # of the network, of the Hub, or about the name; the client has dozens
        raise InputError(f"{path}: no such file, and the Hub did not have it: {first_line(error)}") from None
    files = sorted(f for f in folder.rglob("*") if f.suffix in (".jsonl", ".parquet"))
    if not files:
        raise InputError(f"{path}: the data set has no .parquet or .jsonl file; convert it to one of them")
    return [f for f in files if "train" in str(f.relative_to(folder))] or files


def _jsonl_rows(file: Path, columns: Sequence[str], optional: Sequence[str]) -> Rows:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where}: not JSON ({error}); write one object a line") from None
            if not isinstance(row, dict):
                raise InputError(f"{where}: a {type(row).__name__}, not an object; write one object a line")
            flat = _flat(row)
            _require(columns, flat, where)
            yield where, {c: flat[c] for c in (*columns, *optional) if c in flat}


def _parquet_rows(file: Path, columns: Sequence[str], optional: Sequence[str]) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a parquet file ({first_line(error)}); get it again") from None
    there = _flat_table(parquet.schema_arrow.empty_table()).column_names
    _require(columns, there, str(file))
    wanted = [*columns, *(c for c in optional if c in there)]
    number = 0
    for chunk in parquet.iter_batches(columns=wanted):
        table = _flat_table(pa.Table.from_batches([chunk]))
        for values in zip(*(_first_message(table[c]).to_pylist() for c in wanted), strict=True):
            number += 1
            yield f"{file}, row {number}", dict(zip(wanted, values, strict=True))


def _flat(row: JsonObject, prefix: str = "") -> JsonObject:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: JsonObject = {}
    for key, value in row.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _flat_table(table: pa.Table) -> pa.Table:
    """The same for the columns of a table."""
    import pyarrow as pa

    while any(pa.types.is_struct(kind) for kind in table.schema.types):
        table = table.flatten()
    return table


def _first_message(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The text of each chat's first message, where the column holds chats.

    Arrow does it without Python objects: DAPO's file has 1.8 million rows.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    chats = pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)
    if not chats or kind.value_type.get_field_index("content") < 0:
        return column
    if not pc.min(pc.list_value_length(column)).as_py():
        return column  # `_problem_text` refuses the row whose chat is empty
    return pc.struct_field(pc.list_element(column, 0), "content")


def _require(columns: Sequence[str], there: Iterable[str], where: str) -> None:
    for name in columns:
        if name not in there:
            raise InputError(
                f"{where}: no column '{name}'; there are: {', '.join(there)}. Set data.problem_column and "
                "data.answer_column"
            )


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


def require_template(tokenizer: Tokenizer, section: config.Data) -> None:
    """Refuses a tokenizer without a chat template where the recipe wants one.

    Raises:
      InputError: if there is none.
    """
    if section.chat_template and not tokenizer.chat_template:
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; add one to tokenizer_config.json, "
            "or set data.chat_template = false for plain text"
        )


def detokenizer(tokenizer: Tokenizer) -> Detokenize:
    """Token ids to text, without special tokens."""

    def detokenize(ids: np.ndarray) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return detokenize


def encode(
    tokenizer: Tokenizer, section: config.Data, problems: Sequence[str]
) -> Iterator[Int32[np.ndarray, " T"]]:
    """Yields the token ids of each problem, inside the prefix, suffix and template of [data]."""
    for first in range(0, len(problems), BATCH):
        texts = [section.prefix + text + section.suffix for text in problems[first : first + BATCH]]
        if section.chat_template:  # the template writes its own special tokens
            chats = [[{"role": "user", "content": text}] for text in texts]
            texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        for ids in tokenizer(texts, add_special_tokens=not section.chat_template)["input_ids"]:
            yield np.array(ids, np.int32)
