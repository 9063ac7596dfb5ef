"""Whether cuDNN has an engine for attention at each length that a recipe pads to: asked of cuDNN, without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

import cudnn_graphs
from jaxrl.grpo.packing import bucket_lengths
from jaxrl.models import attention

pytestmark = pytest.mark.aot
LENGTHS = attention.padded_lengths(bucket_lengths(512, 16_384), attention.TRIP)


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="XLA compiles cuDNN's graphs from jax 0.12 on")
@pytest.mark.skipif(not (find_spec("nvidia") and shutil.which("cc")), reason="make aot brings cuDNN; and cc")
@pytest.mark.parametrize("hardware", ["H100", "A100"])
def test_every_length_has_engines(hardware: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    given = cudnn_graphs.environment(tmp_path) | {"PYTHONPATH": str(root)}
    command = [sys.executable, cudnn_graphs.__file__, hardware, *map(str, LENGTHS)]
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    workspace = json.loads(done.stdout.splitlines()[-1])
    assert len(workspace) == 2 * len(LENGTHS)
    # a graph that was not compiled asks for none, neither forward nor backward
    assert all(backward > 0 for backward in workspace[1::2])
    assert max(workspace) < 1e9
