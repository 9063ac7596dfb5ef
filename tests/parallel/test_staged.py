"""Runs of several stages on two processes, killed at their switches, and on another mesh after that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import staged
import tiny_run
from parallel.test_processes import complete, outputs, params, start, wait_for

EVERY = {"checkpoint.every": 1}


@pytest.mark.chaos
def test_two_processes_that_are_killed_end_in_the_same_bits(base: Path, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    complete(staged.write_recipe(tmp_path / "whole", base, **EVERY))
    recipe = staged.write_recipe(tmp_path / "killed", base, **EVERY)
    run = tmp_path / "killed" / "run"
    for rows in (2, 3, 5, 6, 7, 8):  # before, at and after both switches
        processes = start(recipe)
        wait_for(run / "metrics.jsonl", rows)
        for process in processes:
            process.kill()
        outputs(processes)
    assert "going on from step" in complete(recipe)
    assert tiny_run.metrics(run) == tiny_run.metrics(tmp_path / "whole" / "run")
    assert staged.manifest(run, 9) == staged.manifest(tmp_path / "whole" / "run", 9)


@pytest.mark.chaos
def test_another_mesh_goes_on_with_reference_and_ledger(base: Path, tmp_path: Path) -> None:
    """One device, killed; two; killed; two processes of two. Sums are rounded otherwise, and nothing else differs."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    slow = EVERY | {"optimizer.learning_rate": 1e-4}  # a sampled token would turn on a last bit
    tiny_run.finish("train", staged.write_recipe(tmp_path / "whole", base, **slow))
    recipe = staged.write_recipe(tmp_path / "killed", base, **slow)
    run, whole = tmp_path / "killed" / "run", tmp_path / "whole" / "run"
    for rows, devices in ((4, "1"), (7, "2")):
        process = tiny_run.jaxrl("train", recipe, JAX_NUM_CPU_DEVICES=devices)
        wait_for(run / "metrics.jsonl", rows)
        process.kill()
        outputs([process])
    assert "going on from step" in complete(recipe)
    same = ("reward/mean", "groups/sampled", "groups/rounds", "sampler/tokens")
    for ours, theirs in zip(tiny_run.metrics(run), tiny_run.metrics(whole), strict=True):
        assert [ours[name] for name in same] == [theirs[name] for name in same]
        assert ours["policy/kl_reference"] == pytest.approx(theirs["policy/kl_reference"], abs=1e-6)
    assert staged.manifest(run, 9)["ledger"] == staged.manifest(whole, 9)["ledger"]
    for name, array in params(whole, 9).items():
        np.testing.assert_allclose(params(run, 9)[name], array, atol=1e-5, rtol=0, err_msg=name)
