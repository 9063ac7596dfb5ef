"""Live progress on a terminal: steps, the phase under way, the last step's figures. Elsewhere: lines of text.

There a step is a line when it ends, and a line a minute says how far it is.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType

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

from jaxrl.telemetry.timer import PHASES
from jaxrl.types import Rollout

EVERY = 60.0  # seconds between lines of a step under way, where there is no terminal
SHOWN = {
    "reward": "reward/mean",
    "accuracy": "reward/accuracy",
    "entropy": "policy/entropy",
    "length": "response/length_mean",
    "grad norm": "update/grad_norm",
}


class Progress:
    """Shows how far a run is."""

    def __init__(self, total: int, start: int, title: str, quiet: bool = False) -> None:
        """
        Args:
          total: steps of the run.
          start: steps that were done before.
          title: what the bar of steps is called.
          quiet: whether to show nothing.
        """
        self._console, self._quiet = Console(quiet=quiet), quiet
        self._live = self._console.is_terminal and not quiet
        self._total, self._first, self._began = total, start, time.monotonic()
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description:<14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=self._console,
        )
        self._steps = self._bars.add_task(title, total=total, completed=start, note="")
        self._phase = self._bars.add_task("starting", total=None, note="")
        self._figures = Text("")
        self._display: Live | None = None
        self._tokens: Counter[str] = Counter()  # of the phase, by server
        self._phase_began = self._began
        self._stage = ""
        self._lock = threading.Lock()  # rollouts of later steps arrive in another thread
        self._sampling = start  # the step whose rollouts are shown
        self._early: Counter[int] = Counter()  # rollouts of later steps
        self._asked: Counter[int] = Counter()  # rollouts that a step waits for beyond its first round
        self._why = ""  # it samples again
        self._title = title
        self._said = time.monotonic()  # when the last line was printed, where there is no terminal
        self._over = threading.Event()

    def __enter__(self) -> Progress:
        if self._live:
            self._display = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            self._display.__enter__()
        elif not self._quiet:
            threading.Thread(target=self._tell, name="progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._display:
            self._bars.update(self._phase, visible=False)
            self._display.__exit__(kind, error, trace)

    def stage(self, name: str) -> None:
        """Names the stage of the steps to come."""
        self._stage = f" [{name}]"
        self._bars.update(self._steps, description=self._title + self._stage)

    def phase(self, name: str, total: int | None = None, done: int = 0) -> None:
        """Begins a new phase of the step, of `total` units where that is known, `done` of them already."""
        self._tokens.clear()
        self._phase_began = time.monotonic()
        self._bars.reset(self._phase, completed=done, description=name, note="")
        self._bars.tasks[self._phase].total = total  # `reset` takes None for "as before"

    def sampling(self, step: int, total: int) -> None:
        """Begins the phase in which `step` waits for its `total` rollouts, some of which may be there."""
        with self._lock:
            self._sampling, self._why = step, ""
            self.phase("sample", total + self._asked.pop(step, 0), self._early.pop(step, 0))

    def sampling_more(self, step: int, rollouts: int, why: str) -> None:
        """Has `step` wait for more rollouts, and says why. Called from any thread."""
        with self._lock:
            self._asked[step] += rollouts
            if step == self._sampling:
                self._why = f"{why}; "
                total = self._bars.tasks[self._phase].total or 0
                self._bars.update(self._phase, total=total + self._asked.pop(step))

    def sampled(self, step: int, rollout: Rollout) -> None:
        """Counts a rollout of `step`, which may be a later step than the one that waits. Called from any thread."""
        with self._lock:
            if step == self._sampling:
                self.advance(rollout)
            else:
                self._early[step] += 1

    def advance(self, rollout: Rollout) -> None:
        """Counts a rollout as one unit of the phase, and its tokens for the server that sampled it."""
        self._tokens[rollout.server.partition("//")[2]] += len(rollout.tokens)
        seconds = max(time.monotonic() - self._phase_began, 1e-9)
        rates = [f"{name} {count / seconds:,.0f}".strip() for name, count in sorted(self._tokens.items())]
        note = f"{', '.join(rates)} tokens/s" if self._tokens.total() else ""
        self._bars.update(self._phase, advance=1, note=self._why + note)

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the figures of a step, 0 for the first; people are told its number from 1 on."""
        self._bars.update(self._steps, completed=step + 1)
        values = [f"{label} {metrics[name]:.3g}" for label, name in SHOWN.items() if name in metrics]
        phases = [phase for phase in (*PHASES, "step") if f"time/{phase}" in metrics]
        times = [f"{phase} {metrics[f'time/{phase}']:.2f}s" for phase in phases]
        if "groups/sampled" in metrics:
            values.append(
                f"trained on {metrics['groups/trained']:.0f} of {metrics['groups/sampled']:.0f} groups"
            )
        line = "  ".join(values) + ("  |  " + "  ".join(times) if times else "")
        self._figures = Text(line, style="dim")
        if not self._live and not self._quiet:
            done = step + 1 - self._first
            left = (time.monotonic() - self._began) / done * (self._total - step - 1)
            print(f"step {step + 1}/{self._total}{self._stage}  {line}  |  ETA {_duration(left)}", flush=True)
            self._said = time.monotonic()

    def _tell(self) -> None:
        """Prints how far the phase under way is, whenever nothing was printed for a while."""
        while not self._over.wait(EVERY / 20):
            now = time.monotonic()
            if now - self._said < EVERY:
                continue
            self._said, bar = now, self._bars.tasks[self._phase]
            steps = self._bars.tasks[self._steps]
            count = f" {bar.completed:,.0f}/{bar.total:,.0f}" if bar.total else ""
            parts = [f"{bar.description}{count} for {_duration(now - self._phase_began)}", bar.fields["note"]]
            number = f"step {min(steps.completed + 1, self._total):.0f}/{self._total}{self._stage}"
            print(f"{number}  {'  |  '.join(filter(None, parts))}", flush=True)

    def _render(self) -> Group:
        return Group(self._bars, self._figures)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
