"""Runs of several stages that are killed at random moments end in the bits of an undisturbed one."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

import staged
import tiny_run
from chaos.test_chaos import Nursery, alive, send


@pytest.mark.chaos
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_run_of_stages_that_is_killed_ends_in_the_same_bits(
    base: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    kills, rng = min(40, pytestconfig.getoption("tries")), random.Random(pytestconfig.getoption("seed"))
    for name in ("undisturbed", "killed", "nursery"):
        (tmp_path / name).mkdir()
    nursery = Nursery(tmp_path / "nursery")
    options = {"checkpoint.every": 1, "checkpoint.keep_last": 1}
    paths = [staged.write_recipe(tmp_path / name, base, **options) for name in ("undisturbed", "killed")]
    nursery.start("train", paths[0])
    assert nursery.wait()[0] == 0
    whole, run = tmp_path / "undisturbed" / "run", tmp_path / "killed" / "run"
    done, finished, at = 0, 0, list[int]()
    while done < kills or not finished:
        seen = steps(run) + rng.randrange(4)
        pid = nursery.start("train", paths[1])
        while alive(pid) and (steps(run) < seen or not run.exists()):
            time.sleep(0.002)
        end = time.monotonic() + rng.choice([0.0, 0.02, 0.1, 0.5, 2.0]) * rng.random()
        while alive(pid) and (time.monotonic() < end or done >= kills):
            time.sleep(0.002)
        send(pid, signal.SIGKILL)
        status, output = nursery.wait()
        if status == -signal.SIGKILL:
            done += 1
            at.append(steps(run))
            continue
        assert status == 0, output
        assert tiny_run.metrics(run) == tiny_run.metrics(whole)
        assert staged.manifest(run, 9) == staged.manifest(whole, 9)
        assert (run / "prompts.jsonl").read_bytes() == (whole / "prompts.jsonl").read_bytes()
        finished += 1
        if done < kills:
            shutil.rmtree(run)
    print(f"\n{done} kills after {sorted(at)} rows of metrics; {finished} runs ended in the same bits")
    nursery.close()


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
