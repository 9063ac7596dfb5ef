"""The files that a path names: one file, those of a folder, or of a data set of the Hub."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from jaxrl.errors import InputError, first_line, read_error
from jaxrl.types import JsonObject

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
WHOLE = (".json", ".json.gz")  # beside other files of rows these describe them
FORMATS = (".parquet", *LINES, *WHOLE)
METADATA = ("dataset_info", "dataset_infos", "dataset_dict", "state")  # .json files that never hold rows
# Words of paths that name a split, as the `datasets` library has them; "heldout" and "holdout" are ours.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "heldout", "holdout"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_OF)})(?![a-z])", re.IGNORECASE)
# the Hub's older ones end in 16 digits of a hash
SHARD = re.compile(r"(?:^|[-_./]|(?<=part)|(?<=shard)|(?<=chunk))(\d+)([-_.]of[-_.]\d+(-[0-9a-f]{16})?)?$")
OF_A_SPLIT = re.compile(r"(?<![^/])(\w+)-\d{5}-of-\d{5}(?:-[0-9a-f]{16})?$")
CARD = "README.md"
SHOWN = 10  # names in a message


@dataclasses.dataclass(frozen=True)
class Choice:
    """A path, and what of a data set there is read; what is empty is found out."""

    path: str
    config: str = ""
    split: str = ""
    files: tuple[str, ...] = ()
    section: str = "data"  # where a person sets these
    evaluation: bool = False  # prefers test and validation splits


class Candidate(NamedTuple):
    """A file, and the configuration and split that it is part of."""

    name: str  # relative to the folder, with slashes
    config: str
    split: str  # as the data set calls it; empty where nothing names one


def find_files(choice: Choice) -> list[Path]:
    """The files with the rows of a path: shards in the order of their numbers.

    Training reads the training split, an evaluation the first of test, validation and training. Several
    configurations, splits or formats are never mixed.

    Raises:
      InputError: if there are none, or it is not clear which.
    """
    path, section = choice.path, choice.section
    mode = _mode(path)
    if mode and stat.S_ISDIR(mode):
        return _choose(choice, Path(path))
    if mode is None and not format_of(path) and path.count("/") == 1:
        return _choose(choice, _download(choice))
    if not format_of(path):
        raise InputError(
            f"{path or section + '.path'}: neither a .jsonl nor a .parquet file nor a Hub id such as org/name, nor a "
            f"folder (also read: {' '.join(FORMATS)})"
        )
    if mode is None:
        raise InputError(
            f"{path}: no such file; {section}.path takes a .jsonl or .parquet file, a folder or a Hub id"
        )
    given = next((name for name in ("config", "split", "files") if getattr(choice, name)), None)
    if given:
        raise InputError(
            f"{path}: a single file, where {section}.{given} chooses among several; leave it out"
        )
    return [_regular(Path(path))]


def format_of(name: str) -> str:
    """The ending of a file that can be read, or nothing."""
    return next((ending for ending in FORMATS if name.lower().endswith(ending)), "")


def listed(names: Iterable[str]) -> str:
    """Names for a message, the first of many."""
    some = list(names)
    return ", ".join(some[:SHOWN]) + (f" and {len(some) - SHOWN:,} more" if len(some) > SHOWN else "")


def _mode(path: str) -> int | None:
    try:
        return Path(path).stat().st_mode if path else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        raise read_error(repr(path), error, "give another path") from None


def _regular(file: Path) -> Path:
    """The file; a pipe would be waited for forever."""
    if not stat.S_ISREG(_mode(str(file)) or 0):
        raise InputError(f"{file}: not a regular file; write its rows to one")
    return file


def _download(choice: Choice) -> Path:
    from huggingface_hub import snapshot_download

    patterns = choice.files or (*(f"*{ending}" for ending in FORMATS), CARD)
    try:
        return Path(snapshot_download(choice.path, repo_type="dataset", allow_patterns=list(patterns)))
    except Exception as error:  # of the network, of the Hub, or about the name; the client has dozens
        raise InputError(
            f"{choice.path}: no such file, and the Hub did not have it: {first_line(error)}"
        ) from None


def _choose(choice: Choice, folder: Path) -> list[Path]:
    """The files of a folder that a choice means."""
    names = sorted(_walk(folder), key=_natural)
    readable = [name for name in names if format_of(name)]
    chosen = _named(choice, names) if choice.files else _of_configuration(choice, folder, readable)
    formats = {format_of(name): name for name in chosen}
    if len(formats) > 1:
        raise InputError(
            f"{choice.path}: {' and '.join(formats.values())} may hold the same rows; set {choice.section}.files to "
            "those to read"
        )
    return [_regular(folder / name) for name in chosen]


def _walk(folder: Path) -> Iterator[str]:
    """Names of the files beneath a folder, without hidden ones."""

    def refuse(error: OSError) -> None:
        raise read_error(error.filename, error, "give another folder")

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] not in "._"]
        yield from ((Path(root) / n).relative_to(folder).as_posix() for n in names if n[0] not in "._")


def _natural(name: str) -> list[str | int]:
    """A key that puts 2 before 10."""
    return [int(part) if n % 2 else part for n, part in enumerate(re.split(r"([0-9]+)", name))]


def _named(choice: Choice, names: Sequence[str]) -> list[str]:
    """The files of `files`."""
    field = f"{choice.path}: {choice.section}.files"
    if choice.config or choice.split:
        raise InputError(f"{field} names files; leave config and split of [{choice.section}] out")
    for pattern in choice.files:
        fitting = [name for name in names if _fits(name, pattern)]
        odd = next((name for name in fitting if not format_of(name)), None)
        if odd:
            raise InputError(f"{field}: {pattern!r} takes in {odd}; rows are read from {' '.join(FORMATS)}")
        if not fitting:
            raise InputError(f"{field}: no file fits {pattern!r}; there are: {listed(names)}")
    return [name for name in names if any(_fits(name, pattern) for pattern in choice.files)]


def _fits(name: str, pattern: str) -> bool:
    """Whether a glob fits; its * spans folders, as in patterns of the Hub, and `**/` may be none."""
    pattern = pattern.removeprefix("./")
    pattern = f"{pattern}*" if pattern.endswith("/") else pattern
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern.replace("**/", ""))


def _rows(names: Sequence[str]) -> list[str]:
    """Those of the files that hold rows: a .json file beside others describes them."""
    stems = {name: name.rpartition("/")[2].partition(".")[0].lower() for name in names}
    return [n for n in names if format_of(n) not in WHOLE] or [n for n in names if stems[n] not in METADATA]


def _of_configuration(choice: Choice, folder: Path, names: Sequence[str]) -> list[str]:
    """The files of the one configuration that has the split, or of the chosen ones."""
    path, section = choice.path, choice.section
    cards = _card(folder / CARD)
    found = _described(cards, names) if cards else _inferred(_rows(names))
    if not found:
        remedy = f"{CARD} names none" if cards else "convert it to one of them"
        raise InputError(
            f"{path}: the data set has no .parquet or .jsonl file; {remedy} (also read: {' '.join(FORMATS)})"
        )
    configs = list(dict.fromkeys(one.config for one in found))
    # `datasets` takes these where none is named
    default = [_title(card) for card in cards if card.get("default") is True] or ["default"] * bool(cards)
    config = choice.config or next((name for name in default if name in configs), "")
    if config and config not in configs:
        raise InputError(
            f"{path}: has no configuration {config!r} ({section}.config); there are: {listed(configs)}"
        )
    found = [one for one in found if config in ("", one.config)]
    chosen = {name: _of_split(choice, [one for one in found if one.config == name]) for name in configs}
    chosen = {name: some for name, some in chosen.items() if some}
    splits = listed(dict.fromkeys(one.split or "(unnamed)" for one in found))
    if not chosen and choice.split:
        raise InputError(f"{path}: has no split {choice.split!r} ({section}.split); there are: {splits}")
    if not chosen and len({(one.config, one.split) for one in found}) > 1:
        raise InputError(f"{path}: has no training split; set {section}.split to one of: {splits}")
    if len(chosen) > 1:
        raise InputError(
            f"{path}: has several configurations: {listed(chosen)}; set {section}.config to one of them, or "
            f"{section}.files"
        )
    some = next(iter(chosen.values()), found)  # the only split is what is meant
    named = list(dict.fromkeys(one.split for one in some))
    if len(named) > 1:
        raise InputError(
            f"{path}: has several such splits: {listed(named)}; set {section}.split to one of them"
        )
    return list(dict.fromkeys(one.name for one in some))


def _of_split(choice: Choice, found: Sequence[Candidate]) -> list[Candidate]:
    """The files of the chosen split, or of the first that there is; one called just "train" goes before "train_2"."""
    if choice.split:
        wanted = choice.split.lower()
        exact = [one for one in found if one.split.lower() == wanted]
        return exact or [one for one in found if wanted in SPLIT_OF and _kind(one) == SPLIT_OF[wanted]]
    for kind in ("test", "validation", "train", "") if choice.evaluation else ("train", ""):
        some = [one for one in found if _kind(one) == kind]
        if some:
            return [one for one in some if one.split.lower() in SPLIT_OF] or some
    return []


def _kind(one: Candidate) -> str:
    """A candidate's split in one of the three known words."""
    words = SPLIT_WORD.findall(one.split)
    return SPLIT_OF[words[-1].lower()] if words else ""


def _inferred(names: Sequence[str]) -> list[Candidate]:
    """Splits are words of the path, and configurations what else it has besides numbers of shards.

    Those begin at 0 or 1: aime_2024 and aime_2025 are two data sets. A file that the Hub has numbered, such as
    easy-00000-of-00001, is of the split easy, as `datasets` has it.
    """
    stems = {name: name[: -len(format_of(name))] for name in names}
    numbers: dict[str, list[int]] = {}
    for stem in stems.values():
        shard = SHARD.search(stem)
        numbers.setdefault(SHARD.sub("", stem), []).append(int(shard[1]) if shard else -1)
    found: list[Candidate] = []
    for name, stem in stems.items():
        whole = SHARD.sub("", stem)
        words, numbered = SPLIT_WORD.findall(stem), OF_A_SPLIT.search(stem)
        if numbered and not words:
            found.append(Candidate(name, _bare(stem[: numbered.start()]), numbered[1]))
            continue
        config = _bare(whole if min(numbers[whole]) in (0, 1) else stem)
        found.append(Candidate(name, config, words[-1].lower() if words else ""))
    return found


def _bare(stem: str) -> str:
    """A path without words of splits; "." where nothing is left."""
    parts = (SPLIT_WORD.sub("", part).strip("-_. ") for part in stem.split("/"))
    return "/".join(part for part in parts if part) or "."


def _card(file: Path) -> list[JsonObject]:
    """The configurations in the YAML of a data set's README.md, if it has any."""
    if _mode(str(file)) is None:
        return []
    from huggingface_hub.repocard import metadata_load

    try:
        card = metadata_load(_regular(file))
    except InputError:
        raise
    except Exception as error:  # of YAML, the encoding or the disk
        why = " ".join(str(error).split())[:120]
        raise InputError(f"{file}: the YAML at its top cannot be read ({why}); correct it") from None
    configs = card.get("configs") if card else None
    return [one for one in configs if isinstance(one, dict)] if isinstance(configs, list) else []


def _title(card: JsonObject) -> str:
    return str(card.get("config_name", "default"))


def _described(cards: Sequence[JsonObject], names: Sequence[str]) -> list[Candidate]:
    """Configurations and splits as the data set's card has them."""
    found: list[Candidate] = []
    for card in cards:
        files, base = card.get("data_files"), str(card.get("data_dir") or "").strip("/")
        beneath = [name for name in names if not base or name.startswith(f"{base}/")]
        inferred = _inferred(beneath if files else _rows(beneath))
        for split, pattern in _patterns(files or "*"):
            found += [
                Candidate(one.name, _title(card), split or one.split)
                for one in inferred
                if _fits(one.name, pattern) or _fits(one.name.removeprefix(f"{base}/"), pattern)
            ]
    return found


def _patterns(files: object, split: str = "") -> Iterator[tuple[str, str]]:
    """(split, glob) of `data_files`: text, a list of text or of {split, path}, or {split: glob or globs}."""
    if isinstance(files, str):
        yield split, files
    elif isinstance(files, list):
        for one in files:
            yield from _patterns(one, split)
    elif isinstance(files, dict) and "path" in files:
        yield from _patterns(files["path"], str(files.get("split") or ""))
    elif isinstance(files, dict):
        for name, some in files.items():
            yield from _patterns(some, str(name))
