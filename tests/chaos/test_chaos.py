"""Faults in a random order at random moments: whatever happens, the run ends in the bits of an undisturbed one.

`make test-chaos TRIES=200 SEED=1` chooses how many and which.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import tiny_run

HERE = Path(__file__).parent
ALWAYS = 1 << 30  # a fault that stays
LONGEST = 120.0  # seconds from SIGTERM until a run counts as hanging
FLIP, SECOND = "a bit of the newest checkpoint flips", "a second trainer"


class Fault(NamedTuple):
    """What is done to a run.

    Attributes:
      name: what the table of results calls it.
      status: with which it makes the run end, a negative signal if killed; None where the run has to go on.
      signal: sent at a random moment.
      call: a function of faults.c and its arguments.
    """

    name: str
    status: int | None
    signal: int = 0
    call: tuple[str | int, ...] = ()


def kinds() -> Iterator[Fault]:
    yield Fault("kill -9", -signal.SIGKILL, signal.SIGKILL)
    yield Fault("SIGTERM", 75, signal.SIGTERM)
    yield Fault("SIGHUP", 75, signal.SIGHUP)
    yield Fault("Ctrl-C", 130, signal.SIGINT)
    for part in ("checkpoints/", "metrics.jsonl", "rollouts/", "recipe.toml", "run/lock"):
        yield Fault(f"disk full: {part}", 2, call=("fault_file", part, errno.ENOSPC, 1, ALWAYS))
        yield Fault(f"write fails: {part}", 75, call=("fault_file", part, errno.EIO, 1, ALWAYS))
    yield Fault("disk full: events.out", None, call=("fault_file", "events.out", errno.ENOSPC, 1, ALWAYS))
    for part in ("checkpoints/", "model.safetensors", "problems.jsonl", "metrics.jsonl"):
        yield Fault(f"stale file handle: {part}", 75, call=("fault_file", part, errno.ESTALE, 0, ALWAYS))
    yield Fault(
        "stale file handle, once: checkpoints/",
        75,  # where it is met while the next one is being written
        call=("fault_file", "checkpoints/", errno.ESTALE, 0, 1),
    )
    for seconds in (-90_000, -5):
        yield Fault(f"the clock jumps by {seconds} s", None, call=("fault_clock", seconds))
    # Orbax then takes a write under way for one of 20 minutes, and gives up
    yield Fault("the clock jumps by 90000 s", 75, call=("fault_clock", 90_000))
    yield Fault(FLIP, None)
    yield Fault(SECOND, None)


class Nursery:
    """Starts jaxrl by forking, see nursery.py; one at a time."""

    def __init__(self, folder: Path) -> None:
        library = folder / "faults.so"
        subprocess.run(
            ["cc", "-O2", "-shared", "-fPIC", "-o", library, HERE / "faults.c", "-ldl"], check=True
        )
        more = {"LD_PRELOAD": str(library), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "XLA_FLAGS": ""}
        self._process = subprocess.Popen(
            [sys.executable, HERE / "nursery.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | more,
        )
        self._output = folder / "output"

    def start(self, *arguments: object, calls: list[tuple[str | int, ...]] | None = None) -> int:
        """Starts it; returns its process id."""
        assert self._process.stdin and self._process.stdout
        self._output.unlink(missing_ok=True)
        print(
            json.dumps([calls or [], str(self._output), [*map(str, arguments)]]),
            file=self._process.stdin,
            flush=True,
        )
        return int(self._process.stdout.readline())

    def wait(self) -> tuple[int, str]:
        """Its exit status (negative: a signal), and what it printed."""
        assert self._process.stdout
        status = os.waitstatus_to_exitcode(int(self._process.stdout.readline()))
        said = self._output.read_bytes() if self._output.exists() else b""  # killed before it could print
        return status, said.decode(errors="replace")

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, number)


def newest(run: Path) -> int:
    return max((int(p.name) for p in (run / "checkpoints").glob("[0-9]*") if p.name.isdigit()), default=0)


def manifest(run: Path) -> dict:
    """What the newest checkpoint holds."""
    return json.loads((run / "checkpoints" / str(newest(run)) / "manifest" / "metadata").read_text())[
        "manifest"
    ]


def flip(rng: random.Random, folder: Path) -> None:
    file = rng.choice([p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size])
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


class Outcome(NamedTuple):
    status: int
    by_itself: bool  # whether it ended before it was asked to
    hits: int  # calls that failed
    output: str


def disturb(
    fault: Fault, rng: random.Random, train: tuple[object, ...], usual: float, pair: list[Nursery]
) -> Outcome:
    """Starts the training with a fault, and ends it by SIGTERM where the fault does not."""
    recipe = Path(str(train[1]))
    run, hits = recipe.parent / "run", recipe.parent / "hits"
    hits.unlink(missing_ok=True)
    calls: list[tuple[str | int, ...]] = [("fault_hits", str(hits))]
    if fault.call[:1] == ("fault_file",):
        *most, times = fault.call
        calls.append((*most, rng.choice([0, 0, 1, rng.randrange(30)]), times))
    elif fault.call:
        calls.append((*fault.call, rng.randrange(round(usual) + 2)))
    elif fault.name == FLIP:
        flip(rng, run / "checkpoints" / str(newest(run)))
    second = pair[1:] if fault.name == SECOND else []
    pids = [nursery.start(*train, calls=calls) for nursery in [*second, pair[0]]]
    wait = rng.uniform(0, 2 * usual) if fault.signal else LONGEST if second else 2.5 * usual
    end = time.monotonic() + wait
    while all(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    by_itself = not all(map(alive, pids))
    for pid in filter(alive, pids):
        send(pid, fault.signal or signal.SIGTERM)
    end = time.monotonic() + LONGEST
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    for pid in filter(alive, pids):  # it hangs
        send(pid, signal.SIGKILL)
    ended = [nursery.wait() for nursery in [*second, pair[0]]]
    status, output = max(ended)
    if second:  # the later of the two was refused, whichever that is
        refused, refusal = min(ended)
        by_itself = not (refused == 2 and "is at work there" in refusal)
        output += refusal
    return Outcome(status, by_itself, hits.stat().st_size if hits.exists() else 0, output)


def as_expected(fault: Fault, outcome: Outcome) -> bool:
    if "Traceback" in outcome.output:
        return False
    if fault.signal or fault.status is None:
        return outcome.status == (fault.status or 75) and not outcome.by_itself
    if outcome.by_itself:
        return outcome.status == fault.status and (outcome.hits > 0 or "fault_clock" in fault.call)
    if outcome.status == -signal.SIGTERM:  # it was on its way out, and had said why
        return outcome.hits > 0 and "the same command" in outcome.output
    return outcome.status in (fault.status, 75)


@pytest.mark.chaos
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_run_survives(base: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    tries, rng = pytestconfig.getoption("tries"), random.Random(pytestconfig.getoption("seed"))
    options = {"run.steps": 100_000, "run.tensorboard": True, "checkpoint.every": 2, "run.rollouts_every": 1}
    for name in ("run", "undisturbed", "first", "second"):
        (tmp_path / name).mkdir()
    train = "train", tiny_run.write_recipe(tmp_path / "run", base, **options)
    run, pair = tmp_path / "run" / "run", [Nursery(tmp_path / name) for name in ("first", "second")]
    for steps in (2, 4):  # the first one compiles
        began = time.monotonic()
        pair[0].start(*train, "--run.steps", steps)
        assert pair[0].wait()[0] == 0
    usual = time.monotonic() - began  # seconds of a start and two steps
    outcomes, unexpected, order = Counter[str](), list[str](), list[Fault]()
    for n in range(tries):
        order = order or rng.sample(list(kinds()), len(list(kinds())))
        fault, before = order.pop(), newest(run)
        outcome = disturb(fault, rng, train, usual, pair)
        lost = before - (2 if fault.name == FLIP else 0) - newest(run)
        if not as_expected(fault, outcome) or lost > 0:
            unexpected.append(
                f"--- try {n}: {fault.name}: {lost} steps lost, {outcome[:3]}\n{outcome.output}"
            )
        print(f"{n + 1}/{tries} {fault.name}: {outcome.status}", flush=True)
        outcomes[
            f"{fault.name}{', not met' if 'fault_file' in fault.call and not outcome.hits else ''}: {outcome.status}"
        ] += 1
    print(f"\nfault: exit status, of {tries} at a start of {usual:.1f} s")
    print("\n".join(f"{count:4d}  {line}" for line, count in sorted(outcomes.items())))
    assert not unexpected, "\n".join(unexpected)

    steps = newest(run) + 2
    other = tiny_run.write_recipe(tmp_path / "undisturbed", base, **options | {"run.steps": steps})
    for nursery, arguments in zip(pair, [(*train, "--run.steps", steps), ("train", other)], strict=True):
        nursery.start(*arguments)
        status, output = nursery.wait()
        assert status == 0, output
        nursery.close()
    undisturbed = tmp_path / "undisturbed" / "run"
    assert manifest(run)["arrays"] == manifest(undisturbed)["arrays"]
    assert tiny_run.metrics(run) == tiny_run.metrics(undisturbed)
