"""Every file of a run folder emptied, truncated, flipped, made a folder or unreadable: no history is lost silently."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import tiny_run
from faults import permissions_bind
from jaxrl import checkpoint, cli
from jaxrl.errors import InputError
from jaxrl.lock import alone
from jaxrl.telemetry.history import History, read_history
from jaxrl.telemetry.rollouts import write_rollouts
from jaxrl.telemetry.trackers import open_trackers, read_metrics
from jaxrl.types import Prompt, Rollout

# Orbax wakes an event loop that it has closed, now and then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

FILES = (
    "recipe.toml",
    "lock",
    "metrics.jsonl",
    "metrics.damaged.jsonl",
    "prompts.jsonl",
    "rollouts/step_000001.parquet",
    "rollouts/vocabulary.json",
    "eval/step_000002.json",
    "tensorboard/events*",
    "checkpoints/4/_CHECKPOINT_METADATA",
    "checkpoints/4/recipe/metadata",
    "checkpoints/4/manifest/metadata",
    "checkpoints/4/params/_METADATA",
    "checkpoints/4/params/manifest.ocdbt",
    "checkpoints/4/optimizer/ocdbt.process_0/d/*",
)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[len(data) // 2] ^= 4
    path.write_bytes(data)


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "emptied": lambda path: os.truncate(path, 0),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": flip,
    "a folder": into_folder,
    "mode 000": lambda path: path.chmod(0),
}


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 4 steps, with a file of every kind, and of its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [{"problem": d, "answer": d} for d in "012"]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {
        "run.tensorboard": True, "checkpoint.keep_last": 9, "eval.every": 2, "eval.samples": 2,
        "eval.path": str(folder / "held_out.jsonl"),
    }  # fmt: skip
    recipe = tiny_run.write_recipe(folder, base, **more)
    tiny_run.finish("train", recipe, "--run.steps", 4)
    (folder / "run" / "metrics.damaged.jsonl").write_text('{"st\n')
    return folder


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PAUSES", (0.0, 0.0))


def outcome(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    """The exit status of a command and what it printed. Whatever else it raises fails the test."""
    capsys.readouterr()
    status = 0
    try:
        with permissions_bind():
            cli.main([str(arg) for arg in args])
    except SystemExit as stop:
        status = int(stop.code or 0)
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def contents(run: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(run.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(run)), path.read_bytes()


def damage(finished: Path, to: Path, file: str, how: str) -> tuple[Path, Path]:
    """A copy of the run folder with one file damaged, and that file."""
    run = to / "run"
    shutil.copytree(finished / "run", run)
    (found, *_) = sorted(run.glob(file))
    DAMAGES[how](found)
    return run, found


@pytest.mark.chaos
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_costs_no_history_silently(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, how: str
) -> None:
    run, damaged = damage(finished, tmp_path, file, how)
    before, name = dict(contents(run)), str(damaged.relative_to(run))
    train = ("train", finished / "recipe.toml", "--run.directory", run, "--run.steps", 5)
    said = dict[str, tuple[int, str]]()
    report = ("report", run, "--out", tmp_path / "out")
    held_out = ("eval", run, "--out", tmp_path / "result.json")
    for command in (("check", run), report, ("export", run, tmp_path / "hf"), held_out, train):
        said[command[0]] = status, output = outcome(capsys, *command)
        errors = [line for line in output.splitlines() if line.startswith("jaxrl:")]
        assert (status in (2, 75)) == bool(errors) and len(errors) <= 1, output
    status, output = said["train"]
    after = dict(contents(run)) | {
        path.replace("checkpoints-damaged", "checkpoints"): data
        for path, data in contents(run)
        if path.startswith("checkpoints-damaged")
    }
    renewed = ["lock", "metrics.jsonl", "prompts.jsonl", "recipe.toml", "rollouts/vocabulary.json", name]
    if "going on from step 2" in output:  # on another mesh than before
        renewed += ["rollouts/step_000002.parquet", "rollouts/step_000003.parquet"]
    kept = {path: data for path, data in before.items() if path not in renewed}
    assert not [path for path, data in kept.items() if not after.get(path, b"").startswith(data)]
    for kind, read in (("metrics", read_metrics), ("prompts", read_history)):
        steps = len(read(run / f"{kind}.jsonl")) if status == 0 else 5
        said_so = f"{kind}.jsonl: {5 - steps} of the 4 steps" in output or f"{kind}.damaged.jsonl" in output
        assert steps == 5 or said_so, output
    if name.startswith("checkpoints/4") and how != "mode 000" and before.get(name):
        assert after.get(name) == before[name] or status == 0, output


WRITTEN = (
    "lock",
    "metrics.jsonl",
    "metrics.damaged.jsonl",
    "prompts.jsonl",
    "rollouts/step_000003.parquet",
    "rollouts/vocabulary.json",
    "tensorboard/events*",
)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("file", WRITTEN)
def test_writers_go_on_from_a_damaged_file_or_name_it(tmp_path: Path, file: str, how: str) -> None:
    prompt = Prompt("a", np.zeros(1, np.int32), "1")
    rollout = Rollout(prompt, np.zeros(2, np.int32), np.zeros(2, np.float32), "stop", 0)
    lines = list[str]()

    def steps(begin: int, end: int) -> None:
        with (
            alone(tmp_path, "training", lines.append),
            open_trackers(tmp_path, begin, say=lines.append) as trackers,
            closing(History(tmp_path / "prompts.jsonl", begin, lines.append)) as history,
        ):
            for step in range(begin, end):
                for tracker in trackers:
                    tracker.log(step, {"a": 0.5})
                history.log(step, [[rollout]])
                write_rollouts(tmp_path, step, [[rollout]], str)

    steps(0, 3)
    (tmp_path / "rollouts" / "step_000003.parquet").touch()
    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write("[]\n")
    (tmp_path / "metrics.damaged.jsonl").write_text("{}\n")
    (damaged, *_) = tmp_path.glob(file)
    DAMAGES[how](damaged)
    assert not lines
    try:
        with permissions_bind():
            steps(3, 5)
    except (InputError, PermissionError, IsADirectoryError) as error:  # the command line makes a line of it
        assert str(damaged) in str(error)
    else:
        for kind, read in (("metrics", read_metrics), ("prompts", read_history)):
            kept = [row["step"] for row in read(tmp_path / f"{kind}.jsonl")]
            missing = f"{kind}.jsonl: {5 - len(kept)} of the 3 steps"
            assert kept == list(range(5)) or missing in " ".join(lines)
