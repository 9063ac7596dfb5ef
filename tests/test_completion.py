"""Completion by bash itself, of the script that `jaxrl completion bash` prints."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from jaxrl.cli import main

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
$(complete -p jaxrl | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "script"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        main(["completion", "bash"])
    return path


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("tr", {"train"}),
        ("train dem", {"demo"}),
        ("train mine.t", {"mine.toml"}),
        ("train mine.toml --rollout.te", {"--rollout.temperature"}),
        ("train mine.toml --model.dtype b", {"bfloat16"}),
        ("train mine.toml --data.chat_template f", {"false"}),
        ("eval some --benchm", {"--benchmarks"}),
        ("completion z", {"zsh"}),
    ],
)
def test_bash_completes(script: Path, tmp_path: Path, line: str, completed: set[str]) -> None:
    (tmp_path / "mine.toml").touch()
    call = ["bash", "-c", ASK, "bash", str(script), "jaxrl", *line.split()]
    ran = subprocess.run(call, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert set(ran.stdout.split()) == completed
    assert not ran.stderr
