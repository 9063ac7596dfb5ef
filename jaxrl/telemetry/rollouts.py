"""rollouts/: the sampled answers of a step as parquet, and the text of the tokens in them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import numpy as np

from jaxrl.errors import InputError, first_line
from jaxrl.files import reading, replacing, write_atomically, writing
from jaxrl.types import Detokenize, FinishReason, Groups, Rollout

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP = 256  # answers that are in memory at once


class Parts(TypedDict, total=False):
    """Columns that only some files have."""

    rewards: dict[str, float | None]  # the parts of the reward by name


class Answer(Parts):
    """What a row of rollouts/step_NNNNNN.parquet has of an answer, but for its tokens."""

    step: int  # 0 for the first
    prompt_id: str
    sample: int  # within its group
    prompt: str
    answer: str
    completion: str
    score: float
    reward: float
    finish_reason: FinishReason
    tokens: int
    version: int
    logprob_mean: float  # nats


class RolloutRow(Answer):
    """A row of rollouts/step_NNNNNN.parquet."""

    token_ids: list[int]
    logprobs: list[float]  # nats, as they were sampled; rounded in the .jsonl of older runs


def write_rollouts(directory: Path, step: int, groups: Groups, detokenize: Detokenize, keep: int = 0) -> None:
    """Writes rollouts/step_NNNNNN.parquet, a row a rollout; the newest `keep` files stay, or all for 0.

    rollouts/vocabulary.json has the text of every token id that the files hold, so that no reader needs the tokenizer.
    The same rollouts give the same bytes.

    Raises:
      InputError, RunError: see `writing`.
    """
    import pyarrow.parquet as pq

    folder = directory / "rollouts"
    _add_to_vocabulary(folder / "vocabulary.json", groups, detokenize)
    path = folder / f"step_{step:06d}.parquet"
    parts = sorted({name for group in groups for r in group for name in _parts(r)})
    schema = _schema(parts)
    rows = ((g, r) for group in groups for g, r in enumerate(group))
    with (
        replacing(path) as file,
        # few of the log-probs are equal, but their signs and exponents are alike; ids repeat in phrases, as text does
        pq.ParquetWriter(
            file,
            schema,
            compression="zstd",
            compression_level=3,
            use_dictionary=["prompt_id", "prompt", "answer", "finish_reason"],
            column_encoding={"logprobs.list.element": "BYTE_STREAM_SPLIT"},
            write_statistics=False,
            write_page_checksum=True,
        ) as writer,
    ):
        while some := list(itertools.islice(rows, ROW_GROUP)):
            writer.write_table(_table(step, some, parts, schema, detokenize))
    older = path.with_suffix(".jsonl")  # of the same step, begun by a version that wrote lines
    for old in [older, *(rollout_files(directory)[:-keep] if keep else [])]:
        with writing(old):
            old.unlink(missing_ok=True)


def rollout_files(directory: Path) -> list[Path]:
    """The rollout files of a run folder, in order of steps: .parquet, and .jsonl of older runs."""
    folder = directory / "rollouts"
    found = [*folder.glob("step_*.jsonl"), *folder.glob("step_*.parquet")]
    return sorted({path.stem: path for path in found}.values())


def step_of(file: Path) -> int:
    """The step of a rollout file, 0 for the first; -1 where its name has none."""
    number = file.stem.removeprefix("step_")
    return int(number) if number.isdecimal() else -1


def read_vocabulary(directory: Path) -> dict[str, str]:
    """The text of each token id in a run's rollout files; empty where none was written, or it is damaged.

    It is made again as its ids are sampled.
    """
    path = directory / "rollouts" / "vocabulary.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, IsADirectoryError):
        return {}
    return found if isinstance(found, dict) else {}


def read_rollouts(file: Path, size: int) -> Iterator[RolloutRow | None]:
    """Reads the first rollouts of a file: at least one, and no more after `size` of its bytes.

    None stands for a damaged line, or for the rest of a damaged parquet file.
    """
    return cast(Iterator[RolloutRow | None], _read(file, RolloutRow.__required_keys__, size))


def read_answers(file: Path) -> Iterator[Answer | None]:
    """Reads all rollouts of a file without their tokens; None as `read_rollouts` has it."""
    return cast(Iterator[Answer | None], _read(file, Answer.__required_keys__))


def read_prompts(file: Path) -> Iterator[tuple[str, str]]:
    """Reads the id and the prompt of each rollout of a file, without what is damaged."""
    for row in _read(file, frozenset({"prompt_id", "prompt"})):
        if row:
            yield str(row["prompt_id"]), str(row["prompt"])


def read_exactly(file: Path) -> list[RolloutRow]:
    """All rollouts of a .parquet file, with token_ids and logprobs as the arrays that were written, int32 and float32.

    Raises:
      InputError: if the file is damaged.
    """
    import pyarrow.parquet as pq

    with reading(file):
        try:
            table = pq.read_table(file, page_checksum_verification=True, partitioning=None)
            lists = [table[name].combine_chunks() for name in ("token_ids", "logprobs")]
            arrays = [np.split(np.asarray(each.values), np.asarray(each.offsets)[1:-1]) for each in lists]
            rows = table.drop_columns(["token_ids", "logprobs"]).to_pylist()
        except Exception as error:  # damage shows as any of Arrow's errors or Python's of text
            if isinstance(error, OSError) and error.errno:
                raise
            raise InputError(f"{file} is damaged ({first_line(error)[:200]}); put back a copy") from None
    return [
        cast(RolloutRow, row | {"token_ids": ids, "logprobs": logprobs})
        for row, ids, logprobs in zip(rows, *arrays, strict=True)
    ]


def _read(file: Path, needed: frozenset[str], size: float = np.inf) -> Iterator[dict[str, object] | None]:
    if file.suffix == ".parquet":
        yield from _read_parquet(file, needed, size)
        return
    with file.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield row if isinstance(row, dict) and row.keys() >= needed else None
            size -= len(line)
            if size <= 0:
                return


def _read_parquet(file: Path, needed: frozenset[str], size: float) -> Iterator[dict[str, object] | None]:
    import pyarrow.parquet as pq

    with file.open("rb") as opened:
        try:
            whole = pq.ParquetFile(opened, page_checksum_verification=True)
            wanted = [name for name in whole.schema_arrow.names if name in {*needed, "rewards"}]
            if not needed <= {*wanted}:
                raise ValueError("it lacks columns")
            share = file.stat().st_size / max(1, whole.metadata.num_rows)  # of a row in the bytes
            for batch in whole.iter_batches(ROW_GROUP // 4, columns=wanted):
                for row in batch.to_pylist():
                    yield row
                    size -= share
                    if size <= 0:
                        return
        # damage shows as any of Arrow's errors or Python's of text; a read that the disk fails has a number
        except Exception as error:
            if isinstance(error, OSError) and error.errno:
                raise
            yield None


def _parts(rollout: Rollout) -> dict[str, float]:
    """The parts of a rollout's reward by name, without those of functions that failed."""
    return {name: value for name, value in (rollout.rewards or {}).items() if not np.isnan(value)}


def _schema(parts: Sequence[str]) -> pa.Schema:
    import pyarrow as pa

    of_rewards = pa.struct([pa.field(name, pa.float64()) for name in parts])
    return pa.schema(
        {
            "step": pa.int64(),
            "prompt_id": pa.string(),
            "sample": pa.int32(),
            "prompt": pa.string(),
            "answer": pa.string(),
            "completion": pa.string(),
            "score": pa.float64(),
            "reward": pa.float64(),
            **({"rewards": of_rewards} if parts else {}),
            "finish_reason": pa.string(),
            "tokens": pa.int32(),
            "version": pa.int64(),
            "logprob_mean": pa.float32(),
            "token_ids": pa.list_(pa.int32()),
            "logprobs": pa.list_(pa.float32()),
        }
    )


def _table(
    step: int,
    rows: Sequence[tuple[int, Rollout]],
    parts: Sequence[str],
    schema: pa.Schema,
    detokenize: Detokenize,
) -> pa.Table:
    """Rollouts with their places in their groups, as rows of the file."""
    import pyarrow as pa

    samples, rollouts = zip(*rows, strict=True)
    lengths = [len(r.tokens) for r in rollouts]
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    # a prompt's text once, not for each of its rollouts
    prompts = {id(r.prompt): r.prompt for r in rollouts}
    texts = {key: detokenize(prompt.tokens) for key, prompt in prompts.items()}
    columns: dict[str, object] = {
        "step": [step] * len(rows),
        "prompt_id": [r.prompt.id for r in rollouts],
        "sample": samples,
        "prompt": [texts[id(r.prompt)] for r in rollouts],
        "answer": [r.prompt.answer for r in rollouts],
        "completion": [detokenize(r.tokens) for r in rollouts],
        "score": [r.score for r in rollouts],
        "reward": [r.reward for r in rollouts],
        "rewards": [{name: _parts(r).get(name) for name in parts} for r in rollouts],
        "finish_reason": [r.finish_reason for r in rollouts],
        "tokens": lengths,
        "version": [r.version for r in rollouts],
        "logprob_mean": [float(r.logprobs.mean()) for r in rollouts],
    }
    # lists from arrays as they are: a step may have hundreds of millions of tokens
    ids = np.concatenate([r.tokens for r in rollouts]).astype(np.int32, copy=False)
    logprobs = np.concatenate([r.logprobs for r in rollouts]).astype(np.float32, copy=False)
    lists = {
        "token_ids": pa.ListArray.from_arrays(ends, ids),
        "logprobs": pa.ListArray.from_arrays(ends, logprobs),
    }
    return pa.table(
        [lists[f.name] if f.name in lists else pa.array(columns[f.name], f.type) for f in schema],
        schema=schema,
    )


def _add_to_vocabulary(path: Path, groups: Groups, detokenize: Detokenize) -> None:
    known = read_vocabulary(path.parent.parent)
    # a group at a time: all tokens of a step may take gigabytes
    of_groups = [np.unique(np.concatenate([r.tokens for r in group])) for group in groups if group]
    ids = np.unique(np.concatenate([np.zeros(0, np.int32), *of_groups]))
    new = {str(i): detokenize(ids[n : n + 1]) for n, i in enumerate(ids) if str(i) not in known}
    if new:
        write_atomically(path, json.dumps(known | new, ensure_ascii=False))
