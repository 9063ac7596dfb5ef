"""What the update benchmarks share: one batch in a file, and programs that take the same step in turn."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "results"


class Stopped(Exception):
    """A contestant ended; says why."""


class Contestant:
    """A process of its own: it is sent a line ("update", "score") and answers with a JSON object when that is done.

    `settings` reach it as JSON; contestants/PROGRAM.py knows which it needs. `prefix` is a command to start it with.
    """

    def __init__(
        self, program: str, python: Path | str, folder: Path, settings: dict, environment: dict[str, str],
        prefix: tuple[str, ...] = (),
    ):  # fmt: skip
        self.log, self.late = folder / f"{program}.log", False
        command = [*prefix, python, HERE / "contestants" / f"{program}.py", folder, json.dumps(settings)]
        environment = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"} | environment
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"),
            text=True, env=os.environ | {"PYTHONPATH": str(HERE.parent)} | environment,
        )  # fmt: skip

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, what: str = "update", limit: float = 3600) -> tuple[float, dict[str, Any]]:
        """Seconds that it took, and the answer.

        Raises:
          Stopped: if there is none within `limit` seconds.
        """
        assert self.process.stdin and self.process.stdout
        timer = threading.Timer(max(limit, 0), self._stop)
        timer.start()
        began = time.perf_counter()
        try:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise Stopped(self._why()) from None
        finally:
            timer.cancel()
        return time.perf_counter() - began, answer

    def _stop(self) -> None:
        self.late = True
        self.process.kill()

    def _why(self) -> str:
        code, log = self.process.wait(), self.log.read_text()
        if self.late:
            return "out of time"
        if "RESOURCE_EXHAUSTED" in log or "OutOfMemoryError" in log:
            return "out of memory"
        return log[-2000:].strip() or f"exit status {code}"


def write_batch(folder: Path, vocabulary: int, lengths: np.ndarray, longest: int, prompt: int) -> None:
    """batch.npz: tokens [B, T] padded on the right, lengths, old_logprobs [B, T] of completions, advantages [B].

    The old log-probs are those of a model with random weights, with ratios on both sides of the clip.
    """
    rng, (rows,) = np.random.default_rng(1), lengths.shape
    place, end = np.arange(longest), lengths[:, None]
    tokens = rng.integers(2, vocabulary, (rows, longest)).astype(np.int32) * (place < end)
    old = rng.normal(-np.log(vocabulary), 0.3, tokens.shape) * ((place >= prompt) & (place < end))
    np.savez(
        folder / "batch.npz", tokens=tokens, lengths=lengths, prompt=prompt, old_logprobs=np.float32(old),
        advantages=np.float32(rng.choice([-1.2, -0.4, 0.6, 1.5], rows)),
    )  # fmt: skip


def answer_lengths(rng: np.random.Generator, count: int, longest: int = 15_360) -> np.ndarray:
    """As R1-Distill-Qwen-1.5B answers: log-normal, standard deviation 0.8 of the mean, cut at about 3 means."""
    sigma = np.sqrt(np.log1p(0.8**2))
    mean = 5_000 / 15_360 * longest
    return np.clip(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count), 1, longest).astype(int)
