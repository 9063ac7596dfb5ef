"""Checkpoints of a run: asynchronous, atomic, verified, resumed bit for bit, and never deleted by a reader.

A checkpoint is the training state and the recipe, with fingerprints of both. Batches, seeds and packing follow from the
recipe and the step; what does not is in its ledger. A KL term's reference is written once, when it is taken, into
`reference` beside the checkpoints that name it. Orbax writes into a temporary folder and renames it when all of it is
on disk.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, NoReturn, NotRequired, TypedDict

import jax
import orbax.checkpoint as ocp
from blake3 import blake3
from jaxtyping import PyTree

from jaxrl import config
from jaxrl.config import Stage, stages_of
from jaxrl.errors import InputError, RunError, file_error, first_line
from jaxrl.files import set_aside, writing
from jaxrl.fingerprint import fingerprints, path_name
from jaxrl.grpo.update import TrainState
from jaxrl.models import decoder
from jaxrl.parallel import processes
from jaxrl.parallel.mesh import abstract_sharded, make_mesh
from jaxrl.reference import Reference, as_reference
from jaxrl.types import JsonObject, Say

# Keys that may change between one start of a run and the next: where, how long and on what, not what is computed.
FREE = (
    "run.steps",
    "run.directory",
    "run.tensorboard",
    "run.trackers",
    "run.project",
    "run.rollouts_every",
    "run.rollouts_keep",
    "run.compilation_cache",
    "run.profile",
    "checkpoint.",
    "eval.",
    "mesh.",
    "packing.",
    "model.attention",
    "model.remat",
    "rollout.slots",
    "sampler.",
    "reward.workers",
    "reward.in_flight",
    "reward.seconds",
    "reward.memory_mib",
    "reward.on_failure",  # so that a run goes on which a function's failure has ended
    "reward.failure_value",
)
# Keys under these that may not, since they change what is computed.
FIXED = ("sampler.correction", "sampler.max_staleness")
# Keys whose value may change where what it names has the same content; model.path is another.
DATA_KEYS = ("data.path", "data.config", "data.split", "data.files", "data.sources")
REWARD_KEYS = ("reward.function", "reward.functions")
CONTENT_KEYS = (*DATA_KEYS, *REWARD_KEYS)  # of each stage
SHOWN = 200  # characters of another library's error that are shown
PAUSES = (1.0, 5.0)  # seconds before a checkpoint that could not be read is tried again
BARRIER = 300.0  # seconds
# The system's errors where a file is missing, or a folder is in its place, or the other way around.
MISSHAPEN = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR}
ITEMS = ("params", "optimizer")
PIECE = 1 << 24  # bytes read at a time


class Damaged(Exception):
    """A checkpoint is not what was written."""


class Manifest(TypedDict):
    """What a checkpoint holds, kept beside it."""

    arrays: dict[str, str]  # "float32[2,32] 0123456789abcdef": dtype, shape and fingerprint, by path
    recipe: str  # digest of its JSON
    content: dict[str, str]  # digests of what the recipe's paths hold, by key; see `require_same_recipe`
    ledger: NotRequired[str]  # digest of its JSON, where there is one
    reference: NotRequired[NamedReference]


class NamedReference(TypedDict):
    """A reference that a checkpoint goes on with."""

    step: int  # its folder
    arrays: dict[str, str]  # as the manifest's


class Resumed(NamedTuple):
    """What a checkpoint holds."""

    step: int
    state: TrainState
    ledger: JsonObject
    reference: Reference | None


class Checkpoints:
    """The checkpoints of one run folder, numbered by steps done."""

    def __init__(
        self, directory: Path, keep_last: int = 2, keep_every: int = 0, read_only: bool = False
    ) -> None:
        self.directory = directory.absolute()
        self.references = self.directory.with_name("reference")
        self._named: NamedReference | None = None  # what `save` names
        self._read_only = read_only
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last,
            keep_period=keep_every or None,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            use, path = "read" if read_only else "read and written", error.filename or self.directory
            raise file_error(path, use, error.errno, error.strerror or str(error)) from None

    def steps(self) -> list[int]:
        """The steps that have one, in ascending order."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest step, or None without a checkpoint."""
        return self._manager.latest_step()

    def warm_up(self, state: TrainState) -> None:
        """Runs what is compiled for `save`, which `resume` has run, so that no later step does."""
        fingerprints(_items(state))

    def save(
        self,
        step: int,
        state: TrainState,
        recipe: config.Recipe,
        content: Mapping[str, str] = MappingProxyType({}),
        ledger: JsonObject | None = None,
    ) -> None:
        """Starts writing `state`; returns as soon as it is copied off the devices.

        It names the reference that was last kept or resumed with; those that none names any more are deleted.

        Args:
          step: steps done.
          state: after them.
          recipe: the run's.
          content: digests of what the recipe's paths hold, by key; such a path may move later, its content not change.
          ledger: see `jaxrl.ledger`; None or empty is not written.

        Raises:
          InputError, RunError: if there is no room for it, or this or the write before it failed; see
            `jaxrl.files.writing`.
        """
        self._require_free("checkpoint", state)
        values, items = config.to_dict(recipe), _items(state)
        arrays = _described(items)
        manifest: Manifest = {"arrays": arrays, "recipe": digest_of_json(values), "content": dict(content)}
        more = {"ledger": ocp.args.JsonSave(ledger)} if ledger else {}
        if ledger:
            manifest["ledger"] = digest_of_json(ledger)
        if self._named:
            manifest["reference"] = self._named
        args = ocp.args.Composite(
            **{name: ocp.args.StandardSave(item) for name, item in items.items()},
            **more,
            recipe=ocp.args.JsonSave(values),
            manifest=ocp.args.JsonSave({"manifest": manifest, "digest": digest_of_json(manifest)}),
        )
        self._delete_references()
        self._guarded(lambda: self._manager.save(step, args=args, force=True))

    def keep_reference(self, reference: Reference | None) -> None:
        """Has later checkpoints name a reference, which is written before this returns, or none.

        Nothing is written where these checkpoints are only read.

        Args:
          reference: taken from the policy after so many steps.

        Raises:
          InputError, RunError: see `save`.
        """
        self._named = None
        if reference:
            self._named = {"step": reference.step, "arrays": _described(reference.params)}
            if not self._read_only:
                self._write_reference(reference)

    def _delete_references(self) -> None:
        """Waits for the write under way, and deletes the references that no checkpoint on disk names.

        Orbax's own list lacks what it is about to delete, which a run that is killed before that goes on from.
        """
        if not self.references.is_dir():
            return
        self._guarded(self._manager.wait_until_finished)
        if self._read_only or not processes.chief():
            return
        needed = {str(self._named["step"])} if self._named else set[str]()
        for manifest in self.directory.glob("*/manifest/metadata"):
            try:
                named = json.loads(manifest.read_text(encoding="utf-8"))["manifest"].get("reference")
            except (OSError, ValueError, KeyError):  # a damaged one may name any
                return
            needed |= {str(named["step"])} if named else set()
        with writing(self.references):
            for folder in self.references.iterdir():
                if folder.name not in needed:
                    shutil.rmtree(folder)

    def _write_reference(self, reference: Reference) -> None:
        folder = self.references / str(reference.step)
        self._require_free("reference", reference.params)
        # Orbax names its barriers by the folder's name alone
        self._guarded(self._manager.wait_until_finished)
        with ocp.StandardCheckpointer() as checkpointer:

            def write() -> None:
                # one that is there is the same, or torn
                checkpointer.save(folder, reference.params, force=True)
                checkpointer.wait_until_finished()

            self._guarded(write)

    def _require_free(self, what: str, tree: PyTree[jax.Array]) -> None:
        """Fails where there is no room on the disk: Orbax would too, after many lines of its own."""
        need = sum(x.nbytes for x in jax.tree.leaves(tree))
        with writing(self.directory):
            free = shutil.disk_usage(self.directory).free
        if free < need:
            self._fail(errno.ENOSPC, f"a {what} takes {need / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free")

    def resume(
        self,
        recipe: config.Recipe,
        like: TrainState,
        say: Say,
        raise_if_stopped: Callable[[], None],
        content: Mapping[str, str] = MappingProxyType({}),
    ) -> Resumed:
        """Reads the newest checkpoint that is whole; newer ones are then kept aside, in `checkpoints-damaged`.

        Args:
          recipe: the run's.
          like: see `restore`.
          say: prints a line.
          raise_if_stopped: raises what a signal asked for; a library may have swallowed it.
          content: see `save`.

        Raises:
          InputError: if another recipe or model wrote it, it may not be read, or none is whole.
          RunError: if it cannot be read now. Nothing has been changed after either.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                found = self._read(step, recipe, like, raise_if_stopped, content)
            except Damaged as error:
                damaged[step] = str(error)
                continue
            for bad, why in damaged.items():
                aside = self._set_aside(bad)
                say(
                    f"{self.directory / str(bad)} is damaged ({why}) and now {aside}; the one before it is used"
                )
            return found
        reasons = "; ".join(f"{step}: {why}" for step, why in damaged.items())
        raise InputError(
            f"{self.directory}: no checkpoint is whole ({reasons}); put back a copy, or set run.directory to a new "
            "folder"
        )

    def at(self, step: int, recipe: config.Recipe, like: TrainState, content: Mapping[str, str]) -> Resumed:
        """Reads and verifies one checkpoint; the arguments are those of `resume`.

        Raises:
          InputError: if another recipe or model wrote it, or it may not be read or is damaged.
          RunError: if it cannot be read now.
        """
        with self.explaining(step):
            return self._read(step, recipe, like, lambda: None, content)

    def _read(
        self,
        step: int,
        recipe: config.Recipe,
        like: TrainState,
        raise_if_stopped: Callable[[], None],
        content: Mapping[str, str],
    ) -> Resumed:
        """Reads and verifies a checkpoint, several times where that fails: shared file systems have their moments.

        Raises:
          InputError, RunError: see `resume`.
          Damaged: if all of its files can be read, and they are not what was written.
        """
        for pause in (*PAUSES, 0.0):
            error: Exception | None = None
            try:
                self.require_same_recipe(step, recipe, content)
                self._require_same_model(step, like)
                manifest = self.manifest(step)
                self._named = manifest.get("reference") if manifest else None
                reference = self.reference(as_reference(like.params, recipe.model.dtype))
                found = Resumed(step, self.restore(step, like), self.ledger(step), reference)
            except InputError:  # all processes read the same
                raise
            except Exception as caught:  # a torn file raises whatever its format's reader does
                raise_if_stopped()
                error = caught
            if not processes.any_of(error is not None):
                return found
            time.sleep(pause)
        folders = [self.directory / str(step)]
        if self._named and (taken := self.references / str(self._named["step"])).exists():
            folders.append(taken)
        verdict = _verdict(folders, error) if error else ("", "")
        verdicts = processes.exchange(json.dumps(verdict).encode())
        kind, why = max(map(json.loads, verdicts))
        raise {"damaged": Damaged, "input": InputError, "run": RunError}[kind](why)

    def _set_aside(self, step: int) -> Path:
        """Renames a checkpoint to where none is looked for."""
        aside = folder = self.directory.with_name(f"{self.directory.name}-damaged")
        processes.barrier(f"checkpoint {step} is about to be kept aside", BARRIER)
        if processes.chief():
            aside = set_aside(self.directory / str(step), folder)
        processes.barrier(f"checkpoint {step} is kept aside", BARRIER)
        self._manager.reload()
        return aside

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads the state of `step` into the shapes and shardings of `like` (abstract arrays), and verifies it.

        Raises:
          Damaged: if an array is not what was written.
        """
        read = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardRestore(item) for name, item in _items(like).items()}
            ),
        )
        self._require_intact(step, dict(read))
        return TrainState(read["optimizer"]["step"], read["params"], read["optimizer"]["opt_state"])

    def ledger(self, step: int) -> JsonObject:
        """The ledger of a checkpoint, empty where it has none.

        Raises:
          Damaged: if it is not what was written.
        """
        manifest = self.manifest(step)
        if not manifest or "ledger" not in manifest:
            return {}
        values = self._json(step, "ledger")
        if digest_of_json(values) != manifest["ledger"]:
            raise Damaged("its ledger has changed since it was written")
        return values

    def reference(self, like: decoder.Params) -> Reference | None:
        """Reads and verifies the reference that was last kept or resumed with; None where that is none.

        Args:
          like: its shapes, dtype and shardings.

        Raises:
          Damaged: if it is not what was written.
        """
        if not self._named:
            return None
        folder = self._reference_folder(self._named)
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(folder, like)
        if _described(params) != self._named["arrays"]:
            raise Damaged(f"{folder} has changed since it was written")
        return Reference(self._named["step"], params)

    def _reference_folder(self, named: NamedReference) -> Path:
        folder = self.references / str(named["step"])
        if not folder.exists():
            raise Damaged(f"{folder} is missing")
        return folder

    def restore_params(self, step: int, like: decoder.Params) -> decoder.Params:
        """Reads and verifies the parameters alone, a third of the bytes; `like` has their shapes and shardings.

        Raises:
          InputError, RunError: see `explaining`.
        """
        items = ocp.args.Composite(params=ocp.args.StandardRestore(like))
        with self.explaining(step):
            read = self._manager.restore(step, args=items)
            self._require_intact(step, dict(read))
        return read["params"]

    @contextlib.contextmanager
    def explaining(self, step: int) -> Iterator[None]:
        """Names what a failed read of a checkpoint amounts to, where no other one is taken for it.

        Raises:
          InputError: if it is not what was written, or may not be read.
          RunError: if it cannot be read now.
        """
        folder = self.directory / str(step)
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # a torn file raises whatever its format's reader does
            kind, why = _verdict([folder], error)
            if kind != "damaged":
                raise (InputError if kind == "input" else RunError)(why) from error
            older = [each for each in self.steps() if each < step]
            remedy = f"take {self.directory / str(max(older))}" if older else "there is no older one"
            raise InputError(f"{folder} is damaged ({why}); {remedy}") from error

    def _require_intact(self, step: int, read: PyTree[jax.Array]) -> None:
        """Raises Damaged if an array is not what was written."""
        if manifest := self.manifest(step):
            for name, found in _described(read).items():
                if found != manifest["arrays"][name]:
                    raise Damaged(f"{name} has changed since it was written")

    def _require_same_model(self, step: int, like: TrainState) -> None:
        """Raises InputError for a checkpoint of a model or an optimizer of other shapes."""
        manifest = self.manifest(step)
        if manifest is None:
            return
        ours = {path_name(path): _kind(x) for path, x in jax.tree_util.tree_leaves_with_path(_items(like))}
        theirs = {name: text.split()[0] for name, text in manifest["arrays"].items()}
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                was, now = theirs.get(name, "missing"), ours.get(name, "missing")
                raise InputError(
                    f"{self.directory / str(step)} is of another model or optimizer: {name} is {was} there and {now} "
                    "by model.path and the recipe; put these back, or set run.directory to a new folder"
                )

    def verify(self, step: int) -> str:
        """Reads a whole checkpoint on this machine's devices, an item at a time; returns a line on what it holds.

        Raises:
          InputError, RunError: see `explaining`.
        """
        folder = self.directory / str(step)
        with self.explaining(step):
            self.recipe(step)
            self.ledger(step)
            manifest, found, mesh = self.manifest(step), dict[str, str](), make_mesh()
            if manifest and "reference" in manifest:
                self._named = manifest["reference"]
                arrays = ocp.StandardCheckpointer().metadata(self._reference_folder(self._named))
                like = jax.tree.map(_abstract, arrays.item_metadata.tree)
                self.reference(abstract_sharded(like, mesh))
            for item in ITEMS:
                arrays = ocp.StandardCheckpointer().metadata(folder / item).item_metadata.tree
                like = jax.tree.map(_abstract, arrays)
                args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract_sharded(like, mesh))})
                found |= _described(dict(self._manager.restore(step, args=args)))
            wanted = manifest["arrays"] if manifest else found
            for name in sorted(wanted.keys() | found.keys()):
                if wanted.get(name) != found.get(name):
                    raise Damaged(f"{name} has changed since it was written")
        if manifest is None:
            return f"{folder}: {len(found)} arrays can be read; it has no manifest to compare them with"
        return f"{folder}: {len(found)} arrays and the recipe are what was written"

    def require_same_recipe(
        self, step: int, recipe: config.Recipe, content: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Refuses to go on with another recipe than the one that wrote the checkpoint, or with other data.

        A path may be another one if what it holds is the same.

        Args:
          step: of the checkpoint.
          recipe: the run's.
          content: see `save`.

        Raises:
          InputError: naming the keys that differ and may not.
        """
        folder, manifest = self.directory / str(step), self.manifest(step)
        before = manifest["content"] if manifest else {}
        for key, digest in content.items():
            if before.get(key, digest) != digest:
                raise InputError(
                    f"{folder} was written with another content of {key}; put the files back as they were, or set "
                    "run.directory to a new folder"
                )
        same = [key for key, digest in content.items() if before.get(key) == digest]
        if fixed := _past_differences(stages_of(self.recipe(step)), stages_of(recipe), step, same):
            raise InputError(
                f"{folder} was written by another recipe ({'; '.join(fixed)}); put these back, or set run.directory to "
                f"a new folder. What is ahead may change: by a stage that begins at step {step}"
            )

    def recipe(self, step: int) -> config.Recipe:
        """The recipe that wrote a checkpoint.

        Raises:
          Damaged: if it is not what was written.
        """
        values, manifest = self._json(step, "recipe"), self.manifest(step)
        if manifest and digest_of_json(values) != manifest["recipe"]:
            raise Damaged("its recipe has changed since it was written")
        return config.from_earlier(values, str(self.directory / str(step)))

    def manifest(self, step: int) -> Manifest | None:
        """The manifest of a checkpoint; None for one of a version that wrote none.

        Raises:
          Damaged: if it is not what was written.
        """
        if not (self.directory / str(step) / "manifest").exists():
            return None
        whole = self._json(step, "manifest")
        if digest_of_json(whole["manifest"]) != whole["digest"]:
            raise Damaged("its manifest has changed since it was written")
        return whole["manifest"]

    def _json(self, step: int, item: str) -> JsonObject:
        return self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]

    def close(self) -> None:
        """Waits for the write under way.

        Raises:
          InputError, RunError: if it failed.
        """
        self._guarded(self._manager.wait_until_finished)
        self._delete_references()
        self._manager.close()

    def _guarded(self, write: Callable[[], object]) -> None:
        under_way = sys.exception()
        try:
            write()
        except Exception as error:  # Orbax wraps errors of the file system in types of its own
            chain = list(itertools.takewhile(lambda each: each is not under_way, _chain(error)))
            number = next((n for each in reversed(chain) for n in _system_errors(each)), None)
            self._fail(number, os.strerror(number) if number else first_line(chain[-1])[:SHOWN], error)

    def _fail(self, number: int | None, why: str, cause: Exception | None = None) -> NoReturn:
        good = self.latest()
        after = "there is no older checkpoint" if good is None else f"the last checkpoint is of step {good}"
        raise file_error(self.directory, "written", number, f"{why}; {after}") from cause


def _past_differences(
    before: Sequence[Stage], now: Sequence[Stage], step: int, same: Sequence[str]
) -> list[str]:
    """What two recipes differ in that may not be, since it has had its effect on `step` steps.

    Args:
      before: the stages of one.
      now: and of the other.
      step: steps done.
      same: keys whose content is the same, those of stages but the first one's by `content_key`.
    """
    begun = [
        [stage for stage in stages if not stage.number or stage.first < step] for stages in (before, now)
    ]
    if [list(map(_begins, stages)) for stages in begun[:1]] != [
        list(map(_begins, stages)) for stages in begun[1:]
    ]:
        was, now_is = ("; ".join(_begins(stage) for stage in stages) for stages in begun)
        return [f"stages: {was} -> {now_is}"]
    if begun[1][-1].until < step:
        return [
            f"{begun[1][-1].title}: until: {begun[0][-1].until} -> {begun[1][-1].until}, and {step} steps are done"
        ]
    found: list[str] = []
    for old, new in zip(*begun, strict=True):
        moved = [key for key in ("model.path", *CONTENT_KEYS) if content_key(new.number, key) in same]
        free = (*FREE, *(f"{key}:" for key in moved))
        differing = config.differences(old.recipe, new.recipe)
        title = f"{new.title}: " if len(now) > 1 else ""
        found += [title + d for d in differing if is_fixed(d, free)]
    return found


def is_fixed(key: str, free: tuple[str, ...]) -> bool:
    """Whether a key, maybe with its values, is under none of those that are free to change, or under one of FIXED."""
    return key.startswith(FIXED) or not key.startswith(free)


def _begins(stage: Stage) -> str:
    """Where a stage begins, and what with; names are for people."""
    anew = f", restarts {', '.join(sorted(stage.restart))}" if stage.restart else ""
    order = ", prompts in a new order" if stage.order == stage.number and stage.number else ""
    return f"stage {stage.number + 1} from step {stage.first}{anew}{order}"


def content_key(stage: int, key: str) -> str:
    """The name of a key's content in a manifest; all stages have the same model."""
    return f"stages.{stage}.{key}" if stage and key in CONTENT_KEYS else key


def identity(recipe: config.Recipe, content: Mapping[str, str], step: int) -> str:
    """A digest of what the first `step` steps of a run compute.

    Args:
      recipe: the run's.
      content: see `Checkpoints.save`.
      step: steps done.
    """
    found: list[object] = []
    for stage in stages_of(recipe):
        if not stage.number or stage.first < step:
            values = config.flat(stage.recipe)
            named = ("model.path", *CONTENT_KEYS)
            free = (*FREE, *(key for key in named if content_key(stage.number, key) in content))
            fixed = {k: v for k, v in values.items() if is_fixed(k, free)}
            found.append([stage.first, sorted(stage.restart), fixed])
    return digest_of_json([*found, dict(content)])


def _root(error: BaseException) -> str:
    """The message of the error that all others of the chain come from."""
    return first_line(list(_chain(error))[-1])


def _items(state: TrainState) -> dict[str, PyTree[jax.Array]]:
    """The state as a checkpoint has it: parameters can be read without the rest."""
    params, rest = ITEMS
    return {params: state.params, rest: {"step": state.step, "opt_state": state.opt_state}}


def describe(state: TrainState) -> dict[str, str]:
    """Dtype, shape and fingerprint of each array of a state, by its path in a checkpoint."""
    return _described(_items(state))


def _described(tree: PyTree[jax.Array]) -> dict[str, str]:
    """Dtype, shape and fingerprint of each array, by path."""
    kinds = [_kind(leaf) for leaf in jax.tree.leaves(tree)]
    return {
        name: f"{kind} {digits}"
        for kind, (name, digits) in zip(kinds, fingerprints(tree).items(), strict=True)
    }


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _kind(array: jax.Array | jax.ShapeDtypeStruct) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def digest_of_json(values: object) -> str:
    """The digest of what JSON can hold."""
    return blake3(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _verdict(folders: Sequence[Path], error: Exception) -> tuple[str, str]:
    """What a failed read amounts to, and why: ("input" or "run", all of the line) or ("damaged", a reason).

    Only what can be read to the last byte, and is not what was written, is damaged.
    """
    try:
        for file in itertools.chain.from_iterable(map(_files, folders)):
            with file.open("rb") as data:
                while data.read(PIECE):
                    pass
    except PermissionError as denied:
        return "input", f"{denied.filename}: may not be read; give this user the right to"
    except OSError as failed:
        return (
            "run",
            f"{failed.filename or folders[0]}: cannot be read ({failed.strerror}); the same command tries again",
        )
    chain = list(_chain(error))
    numbers = {number for each in chain for number in _system_errors(each)}
    no_memory = any(isinstance(each, MemoryError) or "RESOURCE_EXHAUSTED" in str(each) for each in chain)
    if no_memory or numbers - MISSHAPEN:
        return "run", f"{folders[0]}: cannot be read ({_root(error)[:SHOWN]}); the same command tries again"
    return "damaged", _root(error)[:SHOWN]


def _system_errors(error: BaseException) -> list[int]:
    """The numbers of the system's errors that an error names."""
    own = [error.errno] if isinstance(error, OSError) and error.errno else []
    return own + [int(number) for number in re.findall(r"(?:OS error |os_error_code=')(\d+)", str(error))]


def _files(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> NoReturn:
        raise error

    for root, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(root) / name for name in names)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it comes from."""
    while error:
        yield error
        error = error.__cause__ or error.__context__
