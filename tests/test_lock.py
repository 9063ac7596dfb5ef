"""One owner of a folder at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
from pathlib import Path

import pytest

import tiny_run
from jaxrl import lock
from jaxrl.errors import BAD_INPUT, InputError
from jaxrl.types import silent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "SILENCE", 0.8)


def hold(folder: Path, held: threading.Event) -> None:
    with lock.alone(folder, "training", silent):
        held.set()
        signal.pause()


def test_an_owner_on_this_host_is_named_and_a_dead_one_forgotten(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    held = context.Event()
    owner = context.Process(target=hold, args=(tmp_path, held))
    owner.start()
    assert held.wait(60)
    with pytest.raises(InputError, match=f"process {owner.pid} on {socket.gethostname()} is at work there"):
        hold(tmp_path, threading.Event())
    assert owner.pid
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    with lock.alone(tmp_path, "training"):
        assert f"process {os.getpid()}" in (tmp_path / "lock").read_text()
    assert (tmp_path / "lock").read_text() == ""


def test_a_beat_never_leaves_the_file_empty(tmp_path: Path) -> None:
    path, ended, seen = tmp_path / "lock", threading.Event(), set[int]()
    path.write_text("process 7 on elsewhere")

    def read() -> None:
        while not ended.is_set():
            seen.add(len(path.read_bytes()))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(3000):
        lock._write(path, f"process 7 on elsewhere\n{number}\n")
    ended.set()
    reader.join()
    assert 0 not in seen


def test_an_owner_on_another_host_is_known_by_its_beat(tmp_path: Path) -> None:
    path, ended = tmp_path / "lock", threading.Event()
    path.write_text("process 7 on elsewhere\n")

    def beat() -> None:
        for number in range(1000):
            lock._write(path, f"process 7 on elsewhere\n{number}\n")
            if ended.wait(0.1):
                return

    other = threading.Thread(target=beat)
    other.start()
    try:
        with (
            pytest.raises(InputError, match="process 7 on elsewhere"),
            lock.alone(tmp_path, "training", silent),
        ):
            pass
    finally:
        ended.set()
        other.join()
    lines = list[str]()
    with lock.alone(tmp_path, "training", lines.append):
        assert "process 7 on elsewhere" in lines[0]


def test_a_second_training_of_a_run_folder_is_refused(base: Path, tmp_path: Path) -> None:
    with lock.alone(tmp_path / "run", "training"):
        process = tiny_run.jaxrl("train", tiny_run.write_recipe(tmp_path, base))
        output, _ = process.communicate(timeout=300)
    assert process.returncode == BAD_INPUT and "is at work there" in output, output
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["lock"]


@pytest.mark.parametrize("spelled", ["link/run", "./run/../run", "run/"])
def test_another_spelling_of_a_folder_is_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    with (
        lock.alone(tmp_path / "run", "training"),
        pytest.raises(InputError, match=f"process {os.getpid()} on"),
        lock.alone(Path(spelled), "training"),
    ):
        pass
    with lock.alone(Path(spelled), "training"):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"file/run/lock: cannot be written .Not a directory"),
        lock.alone(tmp_path / "file" / "run", "training"),
    ):
        pass
