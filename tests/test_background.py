"""Work in threads, and the exit of a process that still works."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import pytest

from jaxrl import background


def test_jobs_are_done_in_order_and_errors_are_for_the_one_who_waits() -> None:
    done = list[int]()
    jobs: list[background.Job] = [(Future(), lambda i=i: done.append(i) or 1 // i) for i in (2, 1, 0)]
    with background.working(jobs, threads=1):
        assert [future.result() for future, _ in jobs[:2]] == [0, 1]
        with pytest.raises(ZeroDivisionError):
            jobs[2][0].result()
    assert done == [2, 1, 0]


def test_what_has_not_begun_at_the_end_never_does() -> None:
    began, gate = threading.Event(), threading.Event()
    jobs: list[background.Job] = [(Future(), lambda: began.set() or gate.wait()), (Future(), pytest.fail)]
    with background.working(jobs, threads=1):
        began.wait()
    assert background.busy() and jobs[1][0].cancelled()
    gate.set()
    assert jobs[0][0].result()
    while background.busy():
        time.sleep(0.01)


EXIT = """
import sys, time
from concurrent.futures import Future
from types import SimpleNamespace
from jaxrl import background, cli
from jaxrl.errors import InputError

def run(args, overrides):
    background.start([(Future(), lambda: time.sleep(600))], 1)
    {}

cli.commands = lambda: {{"train": SimpleNamespace(HELP="", add_arguments=lambda parser: None, run=run)}}
sys.argv = ["jaxrl", "train"]
cli.main()
"""


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("pass", 0),
        ("raise InputError('no')", 2),
        ("raise SystemExit(75)", 75),
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_the_command_line_does_not_wait_for_it(ending: str, status: int) -> None:
    assert subprocess.run([sys.executable, "-c", EXIT.format(ending)], timeout=60).returncode == status


COMPILE = """
import time, jax, jax.numpy as jnp
from concurrent.futures import Future
from jaxrl import background

def slow(x):
    for i in range(100):
        x = jnp.sin(x @ x) + jnp.sort(x, axis=i % 2)
    return x

lowered = jax.jit(slow).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32))
background.start([(Future(), lambda: print("compiled" if lowered.compile() else ""))], 1)
time.sleep(0.5)
"""


def test_an_exit_while_xla_compiles_waits_and_does_not_abort() -> None:
    process = subprocess.run([sys.executable, "-c", COMPILE], timeout=120, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "compiled\n", "")
