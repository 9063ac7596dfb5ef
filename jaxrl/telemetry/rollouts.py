"""rollouts/: the sampled answers of a step as JSON lines, and the text of the tokens in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import numpy as np

from jaxrl.files import write_atomically, writing
from jaxrl.types import Detokenize, FinishReason, Groups

DIGITS = 4  # of a log-probability


class RolloutRow(TypedDict):
    """A line of rollouts/step_NNNNNN.jsonl."""

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
    token_ids: list[int]
    logprobs: list[float]  # nats, rounded
    rewards: NotRequired[dict[str, float]]  # of the recipe's functions, without those that failed


def write_rollouts(directory: Path, step: int, groups: Groups, detokenize: Detokenize, keep: int = 0) -> None:
    """Writes rollouts/step_NNNNNN.jsonl, a row a rollout; the newest `keep` files stay, or all for 0.

    rollouts/vocabulary.json has the text of every token id that the files hold, so that no reader needs the tokenizer.
    """
    folder = directory / "rollouts"
    _add_to_vocabulary(folder / "vocabulary.json", groups, detokenize)
    rows = _rows_of(step, groups, detokenize)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(folder / f"step_{step:06d}.jsonl", lines)
    for old in rollout_files(directory)[:-keep] if keep else []:
        with writing(old):
            old.unlink(missing_ok=True)


def rollout_files(directory: Path) -> list[Path]:
    """The rollout files of a run folder, in order of steps."""
    return sorted((directory / "rollouts").glob("step_*.jsonl"))


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
    """Reads the first rollouts of a file: at least one, and no more after `size` bytes; None for a damaged line."""
    with file.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            whole = isinstance(row, dict) and row.keys() >= RolloutRow.__required_keys__
            yield cast(RolloutRow, row) if whole else None
            size -= len(line)
            if size <= 0:
                return


def _rows_of(step: int, groups: Groups, detokenize: Detokenize) -> Iterator[RolloutRow]:
    for group in groups:
        for g, r in enumerate(group):
            row: RolloutRow = {
                "step": step,
                "prompt_id": r.prompt.id,
                "sample": g,
                "prompt": detokenize(r.prompt.tokens),
                "answer": r.prompt.answer,
                "completion": detokenize(r.tokens),
                "score": r.score,
                "reward": r.reward,
                "finish_reason": r.finish_reason,
                "tokens": len(r.tokens),
                "version": r.version,
                "logprob_mean": round(float(r.logprobs.mean()), DIGITS),
                "token_ids": r.tokens.tolist(),
                # as `round` gives them: 24 bits times 10^4 are exact in float64
                "logprobs": np.round(r.logprobs.astype(np.float64), DIGITS).tolist(),
            }
            if r.rewards is not None:
                row["rewards"] = {name: value for name, value in r.rewards.items() if value == value}
            yield row


def _add_to_vocabulary(path: Path, groups: Groups, detokenize: Detokenize) -> None:
    known = read_vocabulary(path.parent.parent)
    # a group at a time: all tokens of a step may take gigabytes
    of_groups = [np.unique(np.concatenate([r.tokens for r in group])) for group in groups if group]
    ids = np.unique(np.concatenate([np.zeros(0, np.int32), *of_groups]))
    new = {str(i): detokenize(ids[n : n + 1]) for n, i in enumerate(ids) if str(i) not in known}
    if new:
        write_atomically(path, json.dumps(known | new, ensure_ascii=False))
