"""Bytes and CPU seconds of a step's rollouts as parquet and as JSON lines: `python -m benchmarks.rollouts`.

512 synthetic answers of R1-Distill-Qwen-1.5B's lengths. Their text is a random walk over the words of our own pages, of
which frequent ones have low ids, as in a tokenizer that merges frequent pairs first. Log-probs are what float32 leaves
of log-softmax: four fifths of the tokens are the likeliest, most of them nearly certain. JSON lines are what runs
stored before: log-probs with four digits.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.harness import HERE, answer_lengths, write_results
from jaxrl.files import write_atomically
from jaxrl.telemetry.rollouts import read_rollouts, rollout_files, write_rollouts
from jaxrl.types import Detokenize, Groups, Prompt, Rollout

SAMPLES, DIGITS, REPEATS = 8, 4, 3
JUMP = 0.3  # how often the walk goes on from another place with the same word
VOCABULARY = 151_643


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--answers", type=int, default=512)
    answers = parser.parse_args().answers
    groups, detokenize = make_groups(answers)
    tokens = sum(len(r.tokens) for group in groups for r in group)
    record: dict[str, object] = {"answers": answers, "tokens": tokens}
    with tempfile.TemporaryDirectory() as folder:
        run, lines = Path(folder) / "run", Path(folder) / "step_000000.jsonl"
        ways: dict[str, Callable[[], None]] = {
            "jsonl": lambda: write_atomically(lines, as_lines(groups, detokenize)),
            "parquet": lambda: write_rollouts(run, 0, groups, detokenize),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(REPEATS + 1):  # the first also makes the vocabulary
            for name, write in ways.items():
                took = cpu_seconds(write)
                seconds[name] += [took] if repeat else []
        (parquet,) = rollout_files(run)
        print(f"{answers} answers of {tokens:,} tokens, median of {REPEATS}")
        print(f"{'':<10}{'MB':>8}{'bytes/token':>13}{'CPU s':>8}{'to read':>9}")
        for name, file in (("jsonl", lines), ("parquet", parquet)):
            size, reading = file.stat().st_size, cpu_seconds(lambda file=file: read_all(file))
            writing = statistics.median(seconds[name])
            print(f"{name:<10}{size / 1e6:>8.1f}{size / tokens:>13.2f}{writing:>8.2f}{reading:>9.2f}")
            record[name] = {"bytes": size, "write_cpu_s": round(writing, 3), "read_cpu_s": round(reading, 3)}
        columns = column_bytes(parquet)
    for name, size in sorted(columns.items(), key=lambda column: -column[1])[:4]:
        print(f"  {name:<14}{size / tokens:>6.2f} bytes/token")
    write_results("rollouts", record | {"columns": columns})


def make_groups(answers: int) -> tuple[Groups, Detokenize]:
    """Marked rollouts, and what makes text of their ids."""
    rng = np.random.default_rng(0)
    text = " ".join(page.read_text(encoding="utf-8") for page in sorted((HERE.parent / "docs").rglob("*.md")))
    words, stream, counts = np.unique(
        re.findall(r" ?\w+|\s+|[^\w\s]", text), return_inverse=True, return_counts=True
    )
    rank = np.argsort(np.argsort(-counts))
    # frequent words have low ids, and rare ones are far apart
    ids = (rank ** (np.log(VOCABULARY) / np.log(len(words)))).astype(np.int32)
    texts = dict(zip(ids.tolist(), words.tolist(), strict=True))
    places = np.split(np.argsort(stream, kind="stable"), np.cumsum(counts)[:-1])
    lengths = answer_lengths(rng, answers)
    groups, known = [], dict[bytes, str]()
    for p in range(0, answers, SAMPLES):
        prompt = Prompt(str(p // SAMPLES), ids[walk(rng, stream, places, 120)], str(rng.integers(1000)))
        group = []
        for length in lengths[p : p + SAMPLES]:
            tokens, score = ids[walk(rng, stream, places, length)], float(rng.choice([-1, 1]))
            group.append(Rollout(prompt, tokens, make_logprobs(rng, length), "stop", 0, score, score))
        for tokens in (prompt.tokens, *(r.tokens for r in group)):
            known[tokens.tobytes()] = "".join(texts[i] for i in tokens.tolist())
        groups.append(group)

    def detokenize(tokens: np.ndarray) -> str:
        """The text, looked up: both ways need it, and a tokenizer's time is not theirs."""
        return known.get(tokens.tobytes()) or texts[int(tokens[0])]

    return groups, detokenize


def walk(rng: np.random.Generator, stream: np.ndarray, places: list[np.ndarray], length: int) -> np.ndarray:
    """So many words of the stream; each is followed by what follows it in one of its places."""
    found, at = np.empty(length, np.int64), int(rng.integers(len(stream)))
    for n, jump in enumerate(rng.random(length) / JUMP):
        found[n] = word = stream[at]
        at = int(places[word][int(jump * len(places[word]))]) if jump < 1 else at
        at = (at + 1) % len(stream)
    return found


def make_logprobs(rng: np.random.Generator, length: int) -> np.ndarray:
    """Log-probs [T], float32: minus the logit's distance from the greatest, and minus log(1 + the others' mass)."""
    others = np.exp(rng.uniform(np.log(1e-8), np.log(1.5), length)).astype(np.float32)
    distance = (rng.exponential(1.2, length) * (rng.random(length) > 0.8)).astype(np.float32)
    return -distance - np.log(np.float32(1) + others)


def as_lines(groups: Groups, detokenize: Detokenize) -> Iterator[str]:
    """The rows of a step as runs stored them before parquet."""
    for group in groups:
        for g, r in enumerate(group):
            row = {
                "step": 0,
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
                "logprobs": np.round(r.logprobs.astype(np.float64), DIGITS).tolist(),
            }
            yield json.dumps(row, ensure_ascii=False) + "\n"


def read_all(file: Path) -> None:
    assert all(row for row in read_rollouts(file, file.stat().st_size))


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of all threads of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def column_bytes(file: Path) -> dict[str, int]:
    """The compressed bytes of each column."""
    stored, found = pq.ParquetFile(file).metadata, dict[str, int]()
    for group in map(stored.row_group, range(stored.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            name = column.path_in_schema.partition(".")[0]
            found[name] = found.get(name, 0) + column.total_compressed_size
    return found


if __name__ == "__main__":
    main()
