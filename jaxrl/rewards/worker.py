"""The worker's side of a recipe's reward functions: it loads one, describes it and calls it; see functions.py.

The module of a function is only ever imported here, in a child process of the run.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import pickle
import resource
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import entry_points
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, TypeAlias, cast

from jaxrl.errors import first_line
from jaxrl.rewards import child

GROUP = "jaxrl.rewards"  # of entry points
KNOWN = ("response", "answer", "prompt", "tokens", "finish_reason")
# What a batch function takes in their place, as lists; `responses` makes it one.
LISTS = dict(zip(("responses", "answers", "prompts", "tokens", "finish_reasons"), KNOWN, strict=True))
LONGEST = 1 << 30  # bytes of a call's arguments

Function = Callable[..., object]
Value: TypeAlias = float | dict[str, float]
Reply = dict[str, object]


class Unusable(Exception):
    """A function that cannot be used, or a value that is no reward, and why."""


def split(path: str) -> tuple[str, str]:
    """("my_rewards.py", "score") of "my_rewards.py:score", the same of "module:function"; ("", name) of a name."""
    where, _, name = path.rpartition(":")
    return where, name


def load(path: str) -> tuple[Function, str]:
    """The function that a recipe names, and a digest of the file that it is in; empty where there is none.

    Raises:
      Unusable: if there is none, or its module cannot be imported.
    """
    where, name = split(path)
    if where.endswith(".pkl"):
        return _unpickled(Path(where))
    if not where:
        found = [*entry_points(group=GROUP, name=name)]
        if not found:
            there = sorted(entry_points(group=GROUP).names)
            raise Unusable(
                f'no installed package has it as an entry point of "{GROUP}", whose names are: '
                f'{", ".join(there) or "none"}; write "FILE.py:FUNCTION" or "MODULE:FUNCTION"'
            )
        where, name = split(found[0].value)
    try:
        module = _module_of_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Unusable:
        raise
    except BaseException as error:  # whatever the module raises, SystemExit too
        traceback.print_exc()
        raise Unusable(f"its module cannot be imported: {_raised(error)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        own = [n for n, f in vars(module).items() if inspect.isroutine(f) and f.__module__ == module.__name__]
        raise Unusable(f"{where} has no function {name}; its functions are: {', '.join(own) or 'none'}")
    call = function if inspect.isroutine(function) else type(function).__call__
    try:
        source = hashlib.sha256(Path(inspect.getfile(inspect.unwrap(call))).read_bytes()).hexdigest()
    except (OSError, TypeError):
        source = ""
    return cast(Function, function), source


def _unpickled(file: Path) -> tuple[Function, str]:
    """A function that `objects.paths_of` has written."""
    if not file.is_file():
        raise Unusable(
            f"there is no file {file}, which the program that began the run has written; run that again"
        )
    with file.open("rb") as opened:
        made = json.loads(opened.readline())
        sys.path += [folder for folder in made["path"] if folder not in sys.path]
        try:
            return pickle.load(opened), made["source"]
        except BaseException as error:  # of another Python, or whatever the modules that it needs raise
            traceback.print_exc()
            raise Unusable(
                f"it was written by Python {made['python']}, and cannot be read here: {_raised(error)}; run the "
                "program that began the run again"
            ) from None


def _module_of_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise Unusable(
            f"there is no file {file}; give its path from the recipe's folder or from the current one"
        )
    sys.path.insert(0, str(file.absolute().parent))  # for what lies beside it
    name = f"jaxrl_rewards_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def describe(function: Function) -> Reply:
    """What a function takes and is, as JSON.

    Returns:
      batch, asynchronous: whether it is so.
      takes: names of what is known of an answer, by the function's own names.
      columns: the other names that it needs; optional: those with a default.

    Raises:
      Unusable: for arguments that have no name.
    """
    parameters = inspect.signature(function).parameters.values()
    for one in parameters:
        if one.kind is one.POSITIONAL_ONLY and one.default is one.empty:
            raise Unusable(f"it takes '{one.name}' by position alone; arguments are given by name")
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    batch = "responses" in named
    known = LISTS if batch else dict(zip(KNOWN, KNOWN, strict=True))
    others = {name: one for name, one in named.items() if name not in known}
    call = function if inspect.isroutine(function) else type(function).__call__
    return {
        "batch": batch,
        "asynchronous": inspect.iscoroutinefunction(call),
        "takes": {name: known[name] for name in named if name in known},
        "columns": [name for name, one in others.items() if one.default is one.empty],
        "optional": [name for name, one in others.items() if one.default is not one.empty],
    }


def values_of(found: object, batch: bool, count: int) -> list[Value]:
    """The values of `count` answers, which a function returned.

    Raises:
      Unusable: if it returned something else.
    """
    if not batch:
        return [value_of(found)]
    if isinstance(found, str | bytes | Mapping) or not hasattr(found, "__len__"):
        raise Unusable(
            f"returned {_shown(found)}; a batch function returns a list, a value for each response"
        )
    values = list(cast(Sequence[object], found))
    if len(values) != count:
        raise Unusable(f"returned {len(values)} values for {count} responses")
    return [value_of(value) for value in values]


def value_of(found: object) -> Value:
    """A finite number, or several by name.

    Raises:
      Unusable: if it is something else.
    """
    if isinstance(found, Mapping):
        named = {name: _number(value) for name, value in found.items()}
        if named and None not in named.values() and all(isinstance(n, str) and n.strip() for n in named):
            return cast(dict[str, float], named)
    elif (number := _number(found)) is not None:
        return number
    raise Unusable(
        f"returned {_shown(found)}; a reward is a finite number, or a dict of names and such numbers"
    )


def _number(value: object) -> float | None:
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]  # NumPy's too
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return f"{text[:60]}{'...' * (len(text) > 60)} ({type(value).__name__})"


def _raised(error: BaseException) -> str:
    """An error in a line, with the place in the code where it was raised."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    own = [frame for frame in frames if frame.filename != __file__] or frames
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {first_line(error)[:200]}{place}"


def serve(path: str, seconds: float, memory: int) -> None:
    """Writes a line of JSON that describes the function, then one for each line that calls it.

    Args:
      path: of the function.
      seconds: that a call of an async function may take; the run ends processes in which others take longer.
      memory: bytes of address space beyond what the function's module takes; 0 is no limit.
    """
    replies = child.open_replies()  # what a function prints is none
    cast(TextIOWrapper, sys.stdout).reconfigure(line_buffering=True)  # it may be killed
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        function, source = load(path)
        described = describe(function) | {"source": source}
    except Unusable as error:
        replies.write(_line({"error": str(error)}))
        return
    if memory:
        taken = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        child.limit(resource.RLIMIT_AS, taken + memory)
    child.limit(resource.RLIMIT_CORE, 0)
    replies.write(_line(described))
    asyncio.run(_answer(function, bool(described["batch"]), seconds, replies))
    os._exit(0)  # whatever threads the module has started


def _end_with(parent: int) -> None:
    """Ends this process after the run that started it, whatever a function is doing."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _line(values: Reply) -> bytes:
    return json.dumps(values).encode() + b"\n"


async def _answer(function: Function, batch: bool, seconds: float, replies: BinaryIO) -> None:
    lines = asyncio.StreamReader(limit=LONGEST)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin.buffer)
    under_way = set[asyncio.Task[None]]()

    async def answer(number: int, arguments: dict[str, object], count: int) -> None:
        replies.write(_line({"number": number} | await _called(function, arguments, batch, count, seconds)))

    while line := await lines.readline():
        task = asyncio.ensure_future(answer(*json.loads(line)))
        under_way.add(task)
        task.add_done_callback(under_way.discard)


async def _called(
    function: Function, arguments: dict[str, object], batch: bool, count: int, seconds: float
) -> Reply:
    """The values of a call, or what went wrong, and whether that may pass: a server did not answer, say."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            found = function(**arguments)
            if inspect.isawaitable(found):
                found = await cast(Awaitable[object], found)
        return {"values": values_of(found, batch, count)}
    except Unusable as error:
        return {"error": str(error), "passing": False}
    except BaseException as error:  # whatever it raises, SystemExit too
        if limit.expired():
            return {"error": "took longer than", "passing": False}
        traceback.print_exc()
        return {"error": f"raised {_raised(error)}", "passing": isinstance(error, OSError)}
