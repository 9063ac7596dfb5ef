"""The limits of a comparison: work is counted and not timed, and what is undecided is neither right nor wrong."""

from __future__ import annotations

import bisect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import jaxrl
from jaxrl import config
from jaxrl.errors import InputError, RunError
from jaxrl.marking import make_marker
from jaxrl.metrics import rollout_metrics
from jaxrl.rewards import latex_equality, sandbox
from jaxrl.types import Prompt, Rollout, Rules

PROBE: Rules = "corrected"  # the name under which the rules below are asked
SOURCE = r"""
import os, signal, sys, time
from pathlib import Path
from jaxrl.rewards.latex_equality import same_value

HERE = Path(__file__).parent

def step():
    pass

def slow(frame, event, argument):
    return slow

def same(given, truth):
    if (HERE / "log").exists():
        with (HERE / "log").open("a") as log:
            log.write(given + "\n")
    if given == "calls":
        for _ in range(int(truth)):
            step()
        return True
    if given == "swallow":
        try:
            return same("calls", truth)
        except BaseException:
            return True
    if given == "one call":
        return sum(range(10**int(truth))) > 0
    if given == "memory":
        return bool(bytearray(1 << int(truth)))
    if given == "sleep":
        time.sleep(int(truth))
    if given == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if given == "crash once" and not (HERE / truth).exists():
        (HERE / truth).touch()
        os._exit(1)
    return True

def on_a_slow_machine(given, truth):
    sys.settrace(slow)
    try:
        return same_value(given, truth)
    finally:
        sys.settrace(None)
"""
# By how much work they are.
FORMULAS = (
    ("x+x", "2x"),
    ("x+x", "3x"),
    ("(x+1)(x+2)", "x^2+3x+2"),
    ("(x+y)**9", "(y+x)**8*(x+y)"),
    ("n!/n", "(n-1)!"),
    ("((x+y+1)**30+1)*(x-y)", "(x-y)+(x-y)*(x+y+1)**30"),
)
ANSWERS = ("x^2-y^2", "(x+y)(x-y)", "x^2+y^2", "x^2-y^2")


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """Has PROBE ask the rules above, and returns a function that lists what they were asked."""
    log = tmp_path / "log"
    (tmp_path / "probe.py").write_text(SOURCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(sandbox.RULES, PROBE, sandbox.RuleSet("probe:same"))
    sandbox.close_idle()
    sandbox.forget()
    log.touch()
    yield lambda: [line for line in log.read_text().splitlines() if line != "x(x+1)"]
    sandbox.close_idle()
    sandbox.forget()


def test_what_is_decided_does_not_depend_on_the_speed(asked: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "BUDGET", 150_000)
    fast = [sandbox.compare("released", *formula) for formula in FORMULAS]
    assert fast == [True, False, True, True, None, None]
    sandbox.forget()
    assert [sandbox.compare("released", *formula) for formula in reversed(FORMULAS)] == fast[::-1]
    monkeypatch.setitem(sandbox.RULES, PROBE, sandbox.RuleSet("probe:on_a_slow_machine"))
    assert [sandbox.compare(PROBE, *formula) for formula in FORMULAS] == fast


def test_every_process_counts_the_same_work() -> None:
    def work(worker: sandbox.Worker, formula: tuple[str, str]) -> int:
        """The smallest budget that suffices."""
        return bisect.bisect_left(range(500_000), b"1", key=lambda budget: ask(worker, formula, budget))

    def ask(worker: sandbox.Worker, formula: tuple[str, str], budget: int) -> bytes:
        return worker.ask(*formula, budget).replace(b"?", b"0")

    workers = [sandbox.Worker("released") for _ in range(2)]
    first, second = [[work(worker, formula) for formula in FORMULAS[2:4]] for worker in workers]
    for worker in workers:
        worker.close()
    assert all(1_000 < calls < 400_000 for calls in first)
    assert first == pytest.approx(
        second, rel=1e-3
    )  # how often two objects of one hash meet depends on addresses


def test_what_is_undecided_is_so_in_every_process_and_is_asked_once(
    asked: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "BUDGET", 10_000)
    assert [sandbox.compare(PROBE, "calls", "6000") for _ in range(3)] == [None] * 3
    assert asked() == ["calls"]
    assert sandbox.compare(PROBE, "calls", "4000") is True  # two events a call
    assert asked() == ["calls"] * 2
    # A worker that was asked before gets the light budget, and a new one then decides.
    assert sandbox.compare(PROBE, "calls", "4001") is True
    assert asked() == ["calls"] * 4
    assert sandbox.compare(PROBE, "calls", "40") is True
    assert asked() == ["calls"] * 5
    assert sandbox.compare(PROBE, "swallow", "6000") is None  # whatever a library catches


def test_a_comparison_that_needs_too_much_memory_is_undecided(asked: Callable[[], list[str]]) -> None:
    assert sandbox.compare(PROBE, "memory", "20") is True
    assert [sandbox.compare(PROBE, "memory", "32") for _ in range(2)] == [None, None]
    assert asked() == ["memory"] * 3


def test_sympy_without_memory_leaves_a_formula_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("sympy.simplify", fail)
    monkeypatch.setattr("pylatexenc.latex2text.LatexNodes2Text.latex_to_text", fail)
    for formula in (("x+x", "2x"), (r"\pi", r"\pi+0")):
        assert sandbox.within(10**6, lambda: latex_equality.same_value(*formula)) is None  # noqa: B023


@pytest.mark.parametrize(
    ("question", "limit"), [(("one call", "11"), "CPU_SECONDS"), (("sleep", "99"), "WALL_SECONDS")]
)
def test_what_time_ends_is_asked_once_more_and_not_remembered(
    question: tuple[str, str], limit: str, asked: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sandbox.compare(PROBE, "", "") is True
    monkeypatch.setattr(sandbox, limit, 0.9)
    assert [sandbox.compare(PROBE, *question) for _ in range(2)] == [None, None]
    assert asked() == ["", *[question[0]] * 4]


def test_a_worker_that_crashes_is_asked_once_more(asked: Callable[[], list[str]]) -> None:
    assert sandbox.compare(PROBE, "crash once", "marker") is True
    assert sandbox.compare(PROBE, "crash once", "marker") is True
    assert asked() == ["crash once"] * 2
    assert [sandbox.compare(PROBE, "crash", "") for _ in range(2)] == [None, None]
    assert asked() == ["crash once"] * 2 + ["crash"] * 4


def test_threads_ask_in_parallel_and_each_counts_its_own(
    asked: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "BUDGET", 10_000)
    together = threading.Barrier(4)

    def ask(thread: int) -> tuple[list[bool | None], int]:
        together.wait()
        before = sandbox.undecided()
        verdicts = [
            sandbox.compare(PROBE, "calls", str(n + thread)) for n in (10, 6000, 20, 7000)[: 2 + thread % 3]
        ]
        return verdicts, sandbox.undecided() - before

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(ask, range(4)))
    expected: list[bool | None] = [True, None, True, None]
    assert found == [(expected[:n], n // 2) for n in (2, 3, 4, 2)]


@pytest.mark.parametrize(
    ("given", "truth"),
    [
        ("((x+y+1)**60+1)*(x-y)", "(x-y)+(x-y)*(x+y+1)**60"),
        ("(((1+1/10**15)**300)**300)**300", "(((1+2/(2*10**15))**300)**300)**300"),
        ("0*(((1+1/10**15)**300)**300)**300+x", "x"),
    ],
)
def test_algebra_and_integers_without_end_are_undecided(given: str, truth: str) -> None:
    before = sandbox.undecided()
    assert sandbox.compare("released", given, truth) is None
    assert sandbox.undecided() == before + 1


@pytest.mark.parametrize(("verifier", "expected"), [("equivalent", 0.25), ("strict_boxed", 0.0)])
def test_a_step_shows_the_share_of_answers_that_are_undecided(
    verifier: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "BUDGET", 50_000)
    sandbox.forget()
    mark = make_marker(
        config.from_dict({"reward": {"verifier": verifier}}),
        lambda ids: f"<think></think>\\boxed{{{ANSWERS[ids[0]]}}}",
    )

    def rollout(answer: int) -> Rollout:
        return Rollout(
            Prompt("", ids := np.array([answer]), "x^2-y^2"), ids, np.zeros(1, np.float32), "stop", 0
        )

    group = [mark(rollout(answer)) for answer in range(4)]
    assert [r.undecided for r in group] == [False, expected > 0, False, False]
    assert [r.score for r in group] == [1, -1, -1, 1]
    assert rollout_metrics([group])["reward/undecided_fraction"] == expected
    sandbox.forget()


def test_a_process_that_ends_is_replaced() -> None:
    assert sandbox.compare("released", "x+x+x", "3x")
    for worker in sandbox._idle["released"]:
        worker.process.kill()
        worker.process.wait()
    assert sandbox.compare("released", "x+x+x+x", "4x")


def test_a_process_that_stalls_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sandbox.compare("released", "y+y", "2y")
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 2.0)
    workers = [worker.process for worker in sandbox._idle["released"]]
    for process in workers:
        os.kill(process.pid, signal.SIGSTOP)
    for n in range(len(workers)):
        assert sandbox.compare("released", "y+y+y", f"3y+0*{n}") is True  # of the process that took its place
        assert workers[-1 - n].poll() is not None


def test_an_environment_without_sympy_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.sys, "executable", "/bin/false")
    with pytest.raises(InputError, match="sympy"):
        sandbox.Worker("released")


def test_rules_that_cannot_be_loaded_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sandbox.RULES, PROBE, sandbox.RuleSet("jaxrl.rewards.missing:same"))
    with pytest.raises(InputError, match=r"jaxrl\.rewards\.missing:same"):
        sandbox.compare(PROBE, "x", "y")


def test_a_start_that_takes_too_long_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "START_SECONDS", 0.0)
    with pytest.raises(RunError, match="not ready"):
        sandbox.Worker("released")


def test_callers_need_no_main_guard_and_leave_no_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from jaxrl.rewards import sandbox\n"
        "assert sandbox.compare('released', 'x+x', '2x')\n"
        "print(sandbox._idle['released'][0].process.pid)\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(jaxrl.__file__).parents[1])}
    run = subprocess.run([sys.executable, script], check=True, stdout=subprocess.PIPE, timeout=60, env=env)
    with pytest.raises(ProcessLookupError):
        os.kill(int(run.stdout), 0)
