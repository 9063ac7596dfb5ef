"""launch/slurm.sbatch on a real Slurm of this machine (Debian's packages slurm-wlm and munge)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_run
from jaxrl.errors import BAD_INPUT
from slurm_cluster import Cluster, cluster

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm.sbatch"
VLLM = os.environ.get("VLLM", ".venv-vllm/bin/vllm")
ON_CPU = {"PYTHON": sys.executable, "GPUS": "0", "OMP_NUM_THREADS": "1", "XLA_FLAGS": ""}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def trainers_alone(folder: Path) -> Path:
    """The script without the sampler nodes' component."""
    before, _, rest = SCRIPT.read_text().partition("#SBATCH hetjob\n")
    path = folder / "slurm.sbatch"
    path.write_text(before + rest.partition("\n")[2])
    return path


def recipe(folder: Path, base: Path, **overrides: Any) -> Path:
    values = {"run.steps": 300, "checkpoint.every": 20, "optimizer.learning_rate": 1e-5} | overrides
    return tiny_run.write_recipe(folder, base, **values)


def assert_same_weights(left: Path, right: Path) -> None:
    weights = [tiny_run.weights(folder / "run", right / f"{i}") for i, folder in enumerate((left, right))]
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_slurm_it_says_how_to_submit_it() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(["bash", SCRIPT, "r.toml"], env=environment, capture_output=True, check=False)
    assert done.returncode == BAD_INPUT
    assert done.stderr.splitlines() == [
        b"launch/slurm.sbatch: this is no Slurm job; submit it: sbatch launch/slurm.sbatch RECIPE"
    ]


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory, slurm: Cluster) -> Path:
    """The folder of a run of two trainer nodes that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    script = trainers_alone(folder)
    job = slurm.submit(script, recipe(folder, base), **ON_CPU)
    slurm.wait_for_state(job, "COMPLETED", 1200)
    assert "process 1 of 2 on node2" in slurm.log(job)
    return folder


@pytest.mark.slow
def test_asked_to_stop_trainers_save_and_go_on(
    slurm: Cluster, undisturbed: Path, base: Path, tmp_path: Path
) -> None:
    job = slurm.submit(trainers_alone(tmp_path), recipe(tmp_path, base), **ON_CPU)
    slurm.wait_for(job, "step 5/")
    slurm.run("scancel", "--signal=TERM", "--batch", job)
    slurm.wait_for(job, "stopped after step")
    slurm.wait_for_state(job, "COMPLETED")
    assert slurm.field(job, "Restarts") == "1", slurm.report(job)
    assert_same_weights(undisturbed, tmp_path)


@pytest.mark.slow
def test_a_node_that_dies_is_left_and_the_run_goes_on(
    slurm: Cluster, undisturbed: Path, base: Path, tmp_path: Path
) -> None:
    job = slurm.submit(trainers_alone(tmp_path), recipe(tmp_path, base), **ON_CPU)
    try:
        slurm.wait_for(job, "step 30/")
        slurm.nodes["node2"].kill()
        slurm.wait_for(job, "process 1 of 2 on node[34]")
        slurm.wait_for_state(job, "COMPLETED")
    finally:
        slurm.start_node("node2")
    assert_same_weights(undisturbed, tmp_path)


@pytest.mark.slow
def test_the_time_limit_saves_a_step_too(slurm: Cluster, base: Path, tmp_path: Path) -> None:
    endless = recipe(tmp_path, base, **{"run.steps": 100_000, "checkpoint.every": 100_000})
    limit = ("--time=3", "--signal=B:TERM@60")
    job = slurm.submit(*limit, trainers_alone(tmp_path), endless, **ON_CPU)
    try:
        slurm.wait_for(job, r"stopped after step \d+")
        done = int(re.findall(r"stopped after step (\d+)", slurm.log(job))[0])
        slurm.wait_for(job, rf"step {done + 1}/")
        assert f"step {done - 1}/" in slurm.log(job) and slurm.field(job, "Restarts") == "1"
    finally:
        slurm.run("scancel", job)


@pytest.mark.slow
def test_what_fails_again_is_not_requeued(slurm: Cluster, base: Path, tmp_path: Path) -> None:
    """One of two sampler nodes cannot start its server; the other nodes only see that it is not there."""
    server = tmp_path / "vllm"
    server.write_text("#!/bin/sh\n[ $SLURMD_NODENAME != node4 ] || exit 1\nexec sleep 600\n")
    server.chmod(0o755)
    values = {"sampler.vllm": str(server), "sampler.folder": str(tmp_path / "weights")}
    job = slurm.submit(SCRIPT, recipe(tmp_path, base, **values), **ON_CPU)
    slurm.wait_for_state(job, "FAILED")
    assert slurm.field(job, "ExitCode") == f"{BAD_INPUT}:0" and slurm.field(job, "Restarts") == "0"
    assert "the vLLM server stopped" in slurm.log(job)


@pytest.mark.slow
@pytest.mark.vllm
def test_trainers_and_samplers_on_nodes_of_their_own(slurm: Cluster, tmp_path: Path) -> None:
    """Real vLLM. The job is asked to stop, and goes on to its end."""
    base = tiny_run.make_base(tmp_path / "base", head_dim=32)
    values = {"run.steps": 30, "sampler.vllm": str(Path(VLLM).absolute())}
    values |= {"sampler.folder": str(tmp_path / "weights"), "checkpoint.every": 1000}
    job = slurm.submit(SCRIPT, recipe(tmp_path, base, **values), **ON_CPU)
    slurm.wait_for(job, "step 3/", 900)
    slurm.run("scancel", "--signal=TERM", "--batch", job)
    slurm.wait_for(job, "stopped after step")
    slurm.wait_for_state(job, "COMPLETED", 900)
    log = slurm.log(job)
    assert slurm.field(job, "Restarts") == "1" and log.count("step 2/30") == log.count("step 30/30") == 1, log
    assert log.count("2 of 2 vLLM servers are ready") == 2
