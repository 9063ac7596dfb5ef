"""Checkpoints: verified when they are read, and never deleted by a reader."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import tiny_run
from jaxrl import checkpoint, cli, config, run
from jaxrl.errors import InputError, RunError
from jaxrl.fingerprint import fingerprints
from jaxrl.grpo.update import TrainState
from jaxrl.parallel.mesh import make_mesh
from jaxrl.reference import Reference
from jaxrl.types import silent

# Orbax wakes an event loop that it has closed, now and then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 4 steps with checkpoints 2 and 4, and of its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    tiny_run.finish("train", tiny_run.write_recipe(folder, base), "--run.steps", 4)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copy(finished / "problems.jsonl", tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PAUSES", (0.0, 0.0))


def resume(
    folder: Path, base: Path, stopped: Callable[[], None] = lambda: None, **overrides: object
) -> tuple[int, TrainState, list[str]]:
    recipe = config.load(tiny_run.write_recipe(folder, base, **overrides))
    setup, lines = run.load(recipe, None, silent), list[str]()
    checkpoints = run.open_checkpoints(recipe)
    try:
        carry = run.resume(setup, checkpoints, lines.append, stopped)
        return carry.step, carry.state, lines
    finally:
        checkpoints.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- references


def test_a_reference_stays_as_long_as_a_checkpoint_that_names_it(tmp_path: Path) -> None:
    """Also while its last checkpoint is about to be deleted: a run that is killed then goes on from that."""
    checkpoints, recipe = checkpoint.Checkpoints(tmp_path / "checkpoints", keep_last=1), config.Recipe()
    state = TrainState(jnp.zeros((), jnp.int32), {"p": jnp.ones(4)}, {"m": jnp.ones(4)})  # type: ignore[arg-type]

    def there() -> tuple[set[str], set[str]]:
        """The references that are needed by checkpoints on disk, and those that are there."""
        needed = set[str]()
        for path in (tmp_path / "checkpoints").glob("*/manifest/metadata"):
            if path.parts[-3].isdigit():
                with contextlib.suppress(
                    FileNotFoundError
                ):  # another one is whole, and this one is being deleted
                    needed.add(str(json.loads(path.read_text())["manifest"]["reference"]["step"]))
        return needed, {path.name for path in (tmp_path / "reference").iterdir()}

    for since in (3, 5, 7, 9):
        checkpoints.keep_reference(Reference(since, {"p": jnp.full(4, float(since))}))
        for step in (since, since + 1):
            needed, kept = there() if step > 3 else (set(), set())
            assert needed <= kept
            checkpoints.save(step, state, recipe)
            needed, kept = there()
            assert needed <= kept and str(since) in kept and len(kept) <= 2
    checkpoints.close()
    assert there() == ({"9"}, {"9"})


# --- fingerprints


def reference(array: np.ndarray) -> str:
    """The fingerprint in NumPy's 64-bit integers, element by element."""

    def mix(h: int, first: int, second: int) -> int:
        h = (h ^ h >> 16) * first % 2**32
        h = (h ^ h >> 13) * second % 2**32
        return h ^ h >> 16

    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}").tolist()
    lanes = ((0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35), (0x27D4EB2F, 0x7FEB352D, 0x846CA68B))
    sums = [sum(mix((b + step * i) % 2**32, *by) for i, b in enumerate(bits)) % 2**32 for step, *by in lanes]
    return "".join(f"{each:08x}" for each in sums)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_fingerprints_are_those_of_plain_integers(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.asarray(np.random.default_rng(0).normal(size=shape) * 100).astype(jax.numpy.dtype(dtype))
    assert fingerprints({"a": jax.numpy.asarray(array)}) == {"a": reference(array)}


def test_fingerprints_are_the_same_on_every_mesh() -> None:
    array = np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)
    mesh = make_mesh(2, 4)
    specs = [
        PartitionSpec(),
        PartitionSpec("fsdp"),
        PartitionSpec("data", "fsdp"),
        PartitionSpec(None, "fsdp"),
    ]
    found = [fingerprints([jax.device_put(array, NamedSharding(mesh, spec))]) for spec in specs]
    assert found == [{"0": reference(array)}] * 4


def test_every_flipped_bit_and_every_swap_shows() -> None:
    array = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)
    variants = [array, array[::-1], array[:, ::-1], np.roll(array, 1)]
    for bit in range(32 * array.size):
        flipped = array.copy()
        flipped.reshape(-1).view(np.uint32)[bit // 32] ^= np.uint32(1 << bit % 32)
        variants.append(flipped)
    found = [fingerprints([jax.numpy.asarray(each)])["0"] for each in variants]
    assert len(set(found)) == len(variants)


# --- what a reader does


def test_no_flipped_bit_is_loaded(folder: Path, base: Path) -> None:
    """In every file of the newest checkpoint: the state is what was written, or it is the older one, and said."""
    newest = folder / "run" / "checkpoints" / "4"
    _, good, _ = resume(folder, base)
    files, rng = (
        sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size),
        np.random.default_rng(3),
    )
    shutil.copytree(folder / "run", folder / "copy")
    for file in [*files, *sorted(files, key=lambda f: -f.stat().st_size)[:4]]:
        data = bytearray(file.read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        file.write_bytes(data)
        step, state, lines = resume(folder, base)
        if step == 4:
            same = jax.tree.map(lambda a, b: bool((a == b).all()), state, good)
            assert all(jax.tree.leaves(same)) and lines == ["going on from step 4"], file
        else:
            assert step == 2 and f"{newest} is damaged" in lines[0], file
            aside = folder / "run" / "checkpoints-damaged" / "4"
            assert contents(aside)[str(file.relative_to(newest))] == bytes(data)
        shutil.rmtree(folder / "run")
        shutil.copytree(folder / "copy", folder / "run")


def test_where_no_checkpoint_is_whole_nothing_is_touched(folder: Path, base: Path) -> None:
    for step in "24":
        for file in (folder / "run" / "checkpoints" / step / "params").rglob("*"):
            if file.is_file() and file.stat().st_size > 1000:
                os.truncate(file, file.stat().st_size // 2)
    before = contents(folder / "run")
    with pytest.raises(InputError, match="no checkpoint is whole"):
        resume(folder, base)
    assert contents(folder / "run") == before


def test_a_checkpoint_of_another_model_is_named_and_kept(folder: Path, base: Path) -> None:
    recipe = config.load(tiny_run.write_recipe(folder, base))
    setup, before = run.load(recipe, None, silent), contents(folder / "run")
    fewer = dataclasses.replace(setup.model, layers=1)
    like = dataclasses.replace(setup.programs(setup.stages[0]), model=fewer).abstract_state()
    checkpoints = run.open_checkpoints(recipe)
    with pytest.raises(
        InputError, match=r"4 is of another model .*float32\[2,32\] there and float32\[1,32\]"
    ):
        checkpoints.resume(recipe, like, silent, lambda: None, setup.content(4))
    checkpoints.close()
    assert contents(folder / "run") == before


@pytest.mark.parametrize("times", [1, 2, 99])
def test_a_stale_file_handle_is_tried_again_and_then_named(
    folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    restore, failures = ocp.CheckpointManager.restore, iter(range(times))

    def stale(self: ocp.CheckpointManager, *args: object, **kwargs: object) -> object:
        if next(failures, None) is not None:
            raise ValueError("Error reading local file: [OS error 116: ESTALE Stale file handle]")
        return restore(self, *args, **kwargs)

    before = contents(folder / "run" / "checkpoints")
    monkeypatch.setattr(ocp.CheckpointManager, "restore", stale)
    if times < 3:
        assert resume(folder, base)[0] == 4
    else:
        with pytest.raises(RunError, match="ESTALE"):
            resume(folder, base)
    assert contents(folder / "run" / "checkpoints") == before


def test_files_that_may_not_be_read_are_named(
    folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> object:
        raise ValueError("permission")

    opened = Path.open

    def refuse(self: Path, *args: object, **kwargs: object) -> object:
        if "checkpoints" in self.parts and args == ("rb",):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *args, **kwargs)  # type: ignore[call-overload]

    before = contents(folder / "run" / "checkpoints")
    with monkeypatch.context() as patched:
        patched.setattr(ocp.CheckpointManager, "restore", denied)
        patched.setattr(Path, "open", refuse)
        with pytest.raises(InputError, match="may not be read"):
            resume(folder, base)
    assert contents(folder / "run" / "checkpoints") == before


def test_a_stop_while_restoring_is_no_damage(
    folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallowed(*_: object, **__: object) -> object:
        raise RuntimeError("the event loop was closed")

    def stopped() -> None:
        raise KeyboardInterrupt

    before = contents(folder / "run" / "checkpoints")
    monkeypatch.setattr(ocp.CheckpointManager, "restore", swallowed)
    with pytest.raises(KeyboardInterrupt):
        resume(folder, base, stopped)
    assert contents(folder / "run" / "checkpoints") == before


def test_check_names_what_is_not_what_was_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["check", str(folder / "run")])
    assert capsys.readouterr().out.count("are what was written") == 2
    array = max((folder / "run/checkpoints/4/optimizer").rglob("*"), key=lambda f: f.stat().st_size)
    data = bytearray(array.read_bytes())
    data[len(data) // 2] ^= 4
    array.write_bytes(data)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["check", str(folder / "run")])
    printed = capsys.readouterr()
    assert printed.out.count("are what was written") == 1 and "checkpoints/4 is damaged (" in printed.err
    cli.main(["check", str(folder / "run/checkpoints/2")])


def refusal(status: int, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that ends with a status."""
    with pytest.raises(SystemExit, match=str(status)):
        cli.main([str(argument) for argument in arguments])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jaxrl:")]
    return line


@pytest.mark.parametrize("file", ["recipe/metadata", "manifest/metadata", "params/_METADATA"])
@pytest.mark.parametrize("a_folder", [False, True])
def test_one_damaged_checkpoint_is_named_with_an_older_one(
    folder: Path, capsys: pytest.CaptureFixture[str], file: str, a_folder: bool
) -> None:
    newest = folder / "run" / "checkpoints" / "4"
    (newest / file).unlink()
    (newest / file).mkdir() if a_folder else (newest / file).touch()
    for arguments in (("check", newest), ("export", newest, folder / "hf")):
        line = refusal(2, capsys, *arguments)
        assert f"{newest} is damaged (" in line and line.endswith("checkpoints/2")


def test_a_checkpoint_on_a_failing_disk_is_not_called_damaged(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: object, **__: object) -> object:
        raise ValueError("Error reading local file: [OS error 116: ESTALE Stale file handle]")

    monkeypatch.setattr(ocp.CheckpointManager, "restore", stale)
    for arguments in (("check", folder / "run/checkpoints/4"), ("export", folder / "run", folder / "hf")):
        assert "ESTALE" in refusal(75, capsys, *arguments)


# --- what a recipe points at


def test_paths_may_move_and_their_content_may_not_change(folder: Path, base: Path) -> None:
    moved = {"model.path": str(folder / "base"), "data.path": str(folder / "elsewhere.jsonl")}
    shutil.copytree(base, moved["model.path"])
    shutil.copy(folder / "problems.jsonl", moved["data.path"])
    assert resume(folder, base, **moved)[0] == 4
    with Path(moved["data.path"]).open("a") as file:
        file.write('{"problem": "00", "answer": "1"}\n')
    with pytest.raises(InputError, match=r"another content of data\.path"):
        resume(folder, base, **moved)
    weights = folder / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(InputError, match=r"another content of model\.path"):
        resume(folder, base, **moved)


def test_a_compilation_cache_that_cannot_be_is_said_and_left_out(folder: Path, base: Path) -> None:
    lines, before = list[str](), jax.config.jax_compilation_cache_dir
    recipe = config.load(
        tiny_run.write_recipe(folder, base, **{"run.compilation_cache": "/dev/null/here", "run.steps": 1})
    )
    run.load(recipe, None, lines.append)
    assert "run.compilation_cache = /dev/null/here cannot be made (Not a directory)" in lines[0]
    assert jax.config.jax_compilation_cache_dir == before


def test_a_checkpoint_without_a_manifest_is_still_read(finished: Path, folder: Path, base: Path) -> None:
    shutil.rmtree(folder / "run" / "checkpoints" / "4" / "manifest")
    assert resume(folder, base, **{"data.path": str(finished / "problems.jsonl")})[0] == 4
