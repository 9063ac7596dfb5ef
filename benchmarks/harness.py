"""What benchmarks share: their results' files, answers of realistic lengths, and programs that take the same step."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import threading
import time
from pathlib import Path

import numpy as np

from jaxrl.types import JsonObject

HERE = Path(__file__).parent
RESULTS = HERE / "results"


INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
THREADS = ("OMP_NUM_THREADS", "XLA_FLAGS", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


class Stopped(Exception):
    """A contestant ended, for the reason in the message."""


class Contestant:
    """A process that takes a request a line ("update", "logprobs") and answers with a JSON object when it is done."""

    def __init__(
        self,
        program: str,
        python: Path | str,
        folder: Path,
        settings: JsonObject,
        environment: dict[str, str],
        prefix: tuple[str, ...] = (),
    ) -> None:
        """
        Args:
          program: of contestants/, without .py.
          python: that runs it.
          folder: with batch.npz and model/; the log goes there.
          settings: passed as JSON; contestants/PROGRAM.py lists what it needs.
          environment: added to this process's.
          prefix: a command to start it with.
        """
        self.log, self.late = folder / f"{program}.log", False
        command = [*prefix, python, HERE / "contestants" / f"{program}.py", folder, json.dumps(settings)]
        given = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "PYTHONPATH": str(HERE.parent)}
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w", encoding="utf-8"),
            text=True,
            encoding="utf-8",
            env=os.environ | given | environment,
        )

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, request: str = "update", limit: float = 3600) -> tuple[float, JsonObject]:
        """Returns the seconds until the answer, and the answer.

        Raises:
          Stopped: if there is none within `limit` seconds.
        """
        assert self.process.stdin and self.process.stdout
        timer = threading.Timer(max(limit, 0), self._stop)
        timer.start()
        began = time.perf_counter()
        try:
            self.process.stdin.write(request + "\n")
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
        code, log = self.process.wait(), self.log.read_text(encoding="utf-8")
        if self.late:
            return "out of time"
        if "RESOURCE_EXHAUSTED" in log or "OutOfMemoryError" in log:
            return "out of memory"
        return log[-2000:].strip() or f"exit status {code}"


def write_results(name: str, record: JsonObject) -> Path:
    """Writes results/NAME.json, and in it the machine; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(
        json.dumps({"machine": machine()} | record, indent=2, default=str) + "\n", encoding="utf-8"
    )
    return path


def machine() -> JsonObject:
    """What a time on a processor depends on beside the program: its model, instruction sets, cores and threads."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    known = dict(
        map(str.strip, line.split(":", 1)) for line in reversed(lines) if ":" in line
    )  # of the first core
    flags = {*known.get("flags", "").split()}
    return {
        "processor": known.get("model name", platform.machine()),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cores": len(os.sched_getaffinity(0)),
        "threads": {name: os.environ[name] for name in THREADS if name in os.environ},
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
    }


def write_batch(folder: Path, vocabulary: int, lengths: np.ndarray, longest: int, prompt: int) -> None:
    """Writes batch.npz: tokens [B, T] padded on the right, lengths [B], old_logprobs [B, T], advantages [B].

    The old log-probs of completions are those of a model with random weights, with ratios on both sides of the clip.
    """
    rng, (rows,) = np.random.default_rng(1), lengths.shape
    position, end = np.arange(longest), lengths[:, None]
    tokens = rng.integers(2, vocabulary, (rows, longest)).astype(np.int32) * (position < end)
    completion = (position >= prompt) & (position < end)
    old = np.float32(rng.normal(-np.log(vocabulary), 0.3, tokens.shape) * completion)
    advantages = np.float32(rng.choice([-1.2, -0.4, 0.6, 1.5], rows))
    np.savez(
        folder / "batch.npz",
        tokens=tokens,
        lengths=lengths,
        prompt=prompt,
        old_logprobs=old,
        advantages=advantages,
    )


def answer_lengths(rng: np.random.Generator, count: int, longest: int = 15_360) -> np.ndarray:
    """Lengths in tokens as R1-Distill-Qwen-1.5B's answers have: log-normal, the deviation 0.8 of the mean, cut at 3."""
    sigma = np.sqrt(np.log1p(0.8**2))
    mean = 5_000 / 15_360 * longest
    return np.clip(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count), 1, longest).astype(int)
