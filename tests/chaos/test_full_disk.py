"""A disk that is full, wherever that is met first: one line, status 2; with room the same bits as without a fault."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tiny_run
from jaxrl.errors import BAD_INPUT

pytestmark = pytest.mark.chaos


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which tests remount with another size."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize(
    "first", ["size=8k", "size=40k", "size=300k", "size=450k", "nr_inodes=6", "nr_inodes=40"]
)
def test_a_full_disk_ends_with_one_line_and_with_room_it_goes_on(
    uninterrupted: Path, base: Path, disk: Path, tmp_path: Path, first: str
) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base)
    command = ("train", recipe, "--run.directory", disk / "run", "--run.tensorboard", "true")
    subprocess.run(["mount", "-o", f"remount,{first}", disk], check=True)
    process = tiny_run.jaxrl(*command)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == BAD_INPUT and "Traceback" not in output, output
    (line,) = re.findall("^jaxrl: .*", output, re.MULTILINE)
    assert re.search(rf"{disk}/run/\S+: cannot be written \((No space|a checkpoint takes)", line), output
    subprocess.run(["mount", "-o", "remount,size=1g,nr_inodes=100000", disk], check=True)
    tiny_run.finish(*command)
    assert tiny_run.metrics(disk / "run") == tiny_run.metrics(uninterrupted)
    ours, theirs = (
        tiny_run.weights(run, tmp_path / run.parent.name) for run in (disk / "run", uninterrupted)
    )
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    shutil.rmtree(disk / "run")
