"""What a run tells: live progress, metrics.jsonl, TensorBoard, sampled rollouts. Effects only, no arithmetic."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import socket
import statistics
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from jaxrl.errors import InputError
from jaxrl.sampling.sampler import Rollout

SHOWN = {
    "reward": "reward/mean",
    "accuracy": "reward/accuracy",
    "entropy": "policy/entropy",
    "length": "response/length_mean",
    "grad norm": "update/grad_norm",
}
PHASES = ("sample", "score", "old_logprobs", "update", "publish", "step")


class Timer:
    """Seconds spent in named phases of a step; a profile shows the phases under the same names.

    Attributes:
      now: the phase under way and when it began (time.monotonic()).
      last: seconds of the last few times in each phase.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self.now: tuple[str, float] | None = None
        self.last: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=20))

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        self.now = phase, began
        try:
            with jax.profiler.TraceAnnotation(phase):
                yield
        finally:
            took = time.monotonic() - began
            self.now = None
            self.last[phase].append(took)
            self._seconds[phase] = self._seconds.get(phase, 0.0) + took

    def reset(self) -> None:
        self._seconds.clear()

    def seconds(self) -> dict[str, float]:
        return {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}


@contextlib.contextmanager
def watchdog(timer: Timer, say: Callable[[str], None], least: float = 120.0) -> Iterator[None]:
    """Says which phase takes long, and where, instead of silence: at five times the usual, and then at every doubling.

    Args: least: seconds that are never called long.
    """
    done, said = threading.Event(), {"": 0.0}

    def look() -> None:
        while not done.wait(least / 20):
            if not (now := timer.now):
                continue
            (phase, began), took = now, time.monotonic() - now[1]
            usual = statistics.median(timer.last[phase] or [0.0])
            if took > max(least, 5 * usual, 2 * said.get(f"{phase} {began}", 0.0)):
                said.clear()
                said[f"{phase} {began}"] = took
                say(
                    f"{phase} has taken {took:.0f} s on {socket.gethostname()}; usually it takes {usual:.0f} s"
                )

    thread = threading.Thread(target=look, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def resources() -> dict[str, float]:
    """Of this process: bytes in memory, open files, and the most bytes that its first device has held, if it says."""
    held = {
        "perf/host_bytes": float(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
        "perf/open_files": float(len(list(Path("/proc/self/fd").iterdir()))),
    }
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return held | ({} if peak is None else {"perf/device_bytes_peak": float(peak)})


class Compilations:
    """Counts the programs that this process compiled, or took from the compilation cache."""

    def __init__(self) -> None:
        self._count, self._seen = 0, 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        self._count += event == "/jax/core/compile/backend_compile_duration"

    def new(self) -> int:
        """Since the last call."""
        new, self._seen = self._count - self._seen, self._count
        return new


class Profile:
    """Traces `steps` steps, from the second on: the first one compiles. Read it with XProf or TensorBoard."""

    def __init__(self, folder: Path, first: int, steps: int):
        self._folder, self._first, self._last = folder, first + 1, first + steps
        self._running = False

    def begin(self, step: int) -> None:
        if self._running and step > self._last:
            self.close()
        elif step == self._first <= self._last:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


class MetricsWriter:
    """metrics.jsonl, an object a step, and TensorBoard files beside it.

    Rows from `start_step` on are dropped first: those steps are about to be run again.
    """

    def __init__(self, directory: Path, start_step: int, tensorboard: bool = True):
        path = directory / "metrics.jsonl"
        rows = [row for row in _rows(path) if row["step"] < start_step] if path.exists() else []
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a")
        self._board: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        values = {name: _finite(float(value)) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        if self._board:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl.

    Raises:
      InputError: if there are none.
    """
    rows = list(_rows(path)) if path.exists() else []
    if not rows:
        raise InputError(f"{path}: no metrics; give a run folder that has trained for a step")
    return rows


def write_rollouts(
    directory: Path,
    step: int,
    groups: list[list[Rollout]],
    decode: Callable[[np.ndarray], str],
    keep: int = 0,
) -> None:
    """rollouts/step_NNNNNN.jsonl: a row a rollout, with its token ids and log-probs (nats); the newest `keep` stay.

    rollouts/vocabulary.json has the text of every token id that the files hold, so that no reader needs the tokenizer.
    """
    rows = (
        {
            "step": step,
            "prompt_id": r.prompt.id,
            "sample": g,
            "prompt": decode(r.prompt.tokens),
            "answer": r.prompt.answer,
            "completion": decode(r.tokens),
            "score": r.score,
            "reward": r.reward,
            "finish_reason": r.finish_reason,
            "tokens": len(r.tokens),
            "version": r.version,
            "logprob_mean": round(float(r.logprobs.mean()), 4),
            "token_ids": r.tokens.tolist(),
            "logprobs": [round(float(x), 4) for x in r.logprobs],
        }
        for group in groups
        for g, r in enumerate(group)
    )
    folder = directory / "rollouts"
    folder.mkdir(exist_ok=True)
    _add_to_vocabulary(folder / "vocabulary.json", groups, decode)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(folder / f"step_{step:06d}.jsonl", text)
    for old in sorted(folder.glob("step_*.jsonl"))[:-keep] if keep else []:
        old.unlink()


def _add_to_vocabulary(path: Path, groups: list[list[Rollout]], decode: Callable[[np.ndarray], str]) -> None:
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    ids = np.unique(np.concatenate([r.tokens for group in groups for r in group] or [np.zeros(0, np.int32)]))
    new = {str(i): decode(ids[n : n + 1]) for n, i in enumerate(ids) if str(i) not in known}
    if new:
        write_atomically(path, json.dumps(known | new, ensure_ascii=False))


def write_atomically(path: Path, text: str) -> None:
    """All of the text or none of it, whenever the process dies."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class Progress:
    """Live on a terminal: steps, the phase under way, the last step's figures. Elsewhere: a line a step."""

    def __init__(self, total: int, start: int, title: str, quiet: bool = False):
        self._console, self._quiet = Console(quiet=quiet), quiet
        self._live = self._console.is_terminal and not quiet
        self._total, self._first, self._began = total, start, time.monotonic()
        self._bars = Bars(
            SpinnerColumn(), TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"), console=self._console,
        )  # fmt: skip
        self._steps = self._bars.add_task(title, total=total, completed=start, note="")
        self._phase = self._bars.add_task("starting", total=None, note="")
        self._figures = Text("")
        self._display: Live | None = None
        self._tokens: Counter[str] = Counter()  # of the phase, by server
        self._phase_began = self._began

    def __enter__(self) -> Progress:
        if self._live:
            self._display = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            self._display.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._display:
            self._bars.update(self._phase, visible=False)
            self._display.__exit__(*error)

    def phase(self, name: str, total: int | None = None, done: int = 0) -> None:
        """A new phase of the step begins; `total` units make it, `done` of them already, where that is known."""
        self._tokens.clear()
        self._phase_began = time.monotonic()
        self._bars.reset(self._phase, total=total, completed=done, description=name, note="")

    def advance(self, n: int = 1, tokens: int = 0, server: str = "") -> None:
        """`n` units of the phase are done; `tokens` were sampled for them, by this one of several servers."""
        self._tokens[server.partition("//")[2]] += tokens
        seconds = max(time.monotonic() - self._phase_began, 1e-9)
        rates = [f"{name} {count / seconds:,.0f}".strip() for name, count in sorted(self._tokens.items())]
        note = f"{', '.join(rates)} tokens/s" if self._tokens.total() else ""
        self._bars.update(self._phase, advance=n, note=note)

    def step_done(self, step: int, metrics: dict[str, Any]) -> None:
        self._bars.update(self._steps, completed=step + 1)
        values = [f"{label} {metrics[name]:.3g}" for label, name in SHOWN.items() if name in metrics]
        times = [f"{p} {metrics[f'time/{p}']:.2f}s" for p in PHASES if f"time/{p}" in metrics]
        line = "  ".join(values) + ("  |  " + "  ".join(times) if times else "")
        self._figures = Text(line, style="dim")
        if not self._live and not self._quiet:
            done = step + 1 - self._first
            left = (time.monotonic() - self._began) / done * (self._total - step - 1)
            print(f"step {step + 1}/{self._total}  {line}  |  ETA {_duration(left)}", flush=True)

    def _render(self) -> Group:
        return Group(self._bars, self._figures)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows up to a torn one, which a killed process may have left at the end."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                return


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
