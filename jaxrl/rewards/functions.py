"""Reward functions that a recipe names, called in processes of their own while the sampler goes on.

Each function has `reward.workers` processes, which start when they are needed. A plain function is called once at a
time in each; of an async one `reward.in_flight` calls are under way; a batch function gets what waits, up to that many
answers. A process that ends or takes too long is replaced. Where several answers were under way in it, each is tried
alone: only one that was alone is to blame.

All of this happens in the event loop of one thread, so nothing here needs a lock between threads.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, NamedTuple, TypeAlias

import numpy as np

from jaxrl import config
from jaxrl.errors import InputError, RunError
from jaxrl.rewards import child
from jaxrl.rewards.worker import KNOWN, LISTS, LONGEST, Value
from jaxrl.types import Detokenize, JsonObject, Prompt, Rollout, Say

START_SECONDS = 300.0  # for the imports of a function's module
LATE = "took longer than"  # the limit
ENDED = "the run ended before its reward functions did"
GRACE = 5.0  # seconds by which the limit of an async call, which its own process keeps, may be late

# Of one function and answer; None where it failed and the recipe goes on.
Values: TypeAlias = "Future[Value | None]"


class Description(NamedTuple):
    """What a worker tells of a function; see `worker.describe`."""

    batch: bool
    asynchronous: bool
    takes: Mapping[str, str]
    columns: Sequence[str]
    optional: Sequence[str]
    source: str


class Reward(NamedTuple):
    """What the functions of a recipe give for an answer."""

    total: float  # the weighted sum
    parts: Mapping[str, float]  # by name; NaN where a function failed


class Lost(Exception):
    """A process ended, or took too long, before it replied."""


def _key(path: str) -> str:
    return f'reward.function = "{path}"'


def _described(path: str, line: bytes) -> Description:
    """Reads the first line of a process.

    Raises:
      InputError: if the function cannot be used.
    """
    if not line:
        raise InputError(f"{_key(path)}: its process ended while it imported the module; run that by itself")
    values: JsonObject = json.loads(line)
    if "error" in values:
        raise InputError(f"{_key(path)}: {values['error']}")
    return Description(**values)


def describe(path: str) -> Description:
    """Looks at a function in a process of its own, which ends; again only where its file has changed.

    Raises:
      InputError: if there is no such function, its module cannot be imported, or it cannot be called by name.
    """
    file = Path(path.rpartition(":")[0])
    return _describe(path, file.stat().st_mtime_ns if file.is_file() else 0)


@functools.lru_cache
def _describe(path: str, changed: int) -> Description:
    try:
        found = subprocess.run(
            child.command("worker", path, 1.0, 0),
            env=child.environment(),
            input=b"",
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=START_SECONDS,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{_key(path)}: its module took more than {START_SECONDS:.0f} s to import; do such work when it is called"
        ) from None
    return _described(path, found.stdout.partition(b"\n")[0])


def columns_of(section: config.Reward) -> dict[str, str]:
    """The columns of a row that the recipe's functions take, each with what to say where it is missing.

    That is empty for an argument that has a default.

    Raises:
      InputError: see `describe`.
    """
    found: dict[str, str] = {}
    for each in section.named:
        description = describe(each.path)
        known = ", ".join(LISTS if description.batch else KNOWN)
        found = dict.fromkeys(description.optional, "") | found
        found |= dict.fromkeys(
            description.columns, f"the arguments of {each.path}, which are {known} and columns"
        )
    return found


def digest_of(section: config.Reward) -> str:
    """Text that differs where the functions, their weights or the files that they are in differ; empty for none."""
    found = [(f.title, f.weight, f.path.rpartition(":")[2], describe(f.path).source) for f in section.named]
    return json.dumps(found) if found else ""


class Functions:
    """The functions of a recipe, ready to be called. Processes end with `close`, or with the program."""

    def __init__(self, section: config.Reward, log: Path | None = None) -> None:
        """
        Args:
          section: the recipe's, with functions.
          log: file to which what they print is added, and where they raise; None drops it.

        Raises:
          InputError: see `describe`.
        """
        self._loop = asyncio.new_event_loop()
        self._pools = [_Pool(each, section, self._loop, log) for each in section.named]
        self._section = section
        self._thread = threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def start(self, rollout: Rollout, response: str, detokenize: Detokenize) -> Callable[[], Reward]:
        """Has the functions called for an answer; does not wait.

        Args:
          rollout: the answer.
          response: its text.
          detokenize: gives the prompt's, where it is asked for.

        Returns:
          what waits for their values. It raises InputError where a function failed, or RunError where that may pass.

        Raises:
          InputError, RunError: if an earlier call has failed, so that nothing is sampled in vain.
        """
        calls = [pool.submit(_arguments(pool.description, rollout, response, detokenize), rollout.prompt)
                 for pool in self._pools]  # fmt: skip

        def wait() -> Reward:
            total, parts = 0.0, dict[str, float]()
            for pool, call in zip(self._pools, calls, strict=True):
                value, title = call.result(), pool.function.title
                if isinstance(value, dict):
                    parts |= {f"{title}/{name}": each for name, each in value.items()}
                    value = sum(value.values())
                parts[title] = float("nan") if value is None else value
                total += pool.function.weight * (self._section.failure_value if value is None else value)
            return Reward(total, parts)

        return wait

    def try_out(self, prompt: Prompt, detokenize: Detokenize, say: Say) -> None:
        """Calls the functions with a prompt's answer as the response: what always fails is found before a start.

        Raises:
          InputError, RunError: if one fails; where the recipe goes on with such failures it is said instead.
        """
        nothing = np.zeros(0, np.int32)
        rollout = Rollout(prompt, nothing, np.zeros(0, np.float32), "stop", 0)
        parts = self.start(rollout, prompt.answer, detokenize)().parts
        failed = ", ".join(name for name, value in parts.items() if value != value)
        if failed:
            say(
                f"the reward functions {failed} failed on the answer to prompt {prompt.id} itself; that counts as "
                f"reward.failure_value = {self._section.failure_value}, and reward/failed_fraction is the share of such"
            )
        for pool in self._pools:  # they have no log yet, and may not be needed for a while
            self._loop.call_soon_threadsafe(pool.rest)

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        atexit.unregister(self.close)
        if self._loop.is_closed():
            return

        async def end() -> None:
            for pool in self._pools:
                pool.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.wait(others, timeout=5) if others else None

        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        if not self._thread.is_alive():
            self._loop.close()


def _arguments(
    description: Description, rollout: Rollout, response: str, detokenize: Detokenize
) -> JsonObject:
    """What a function takes of an answer, by its own names."""
    known: dict[str, Callable[[], object]] = {
        "response": lambda: response,
        "answer": lambda: rollout.prompt.answer,
        "prompt": lambda: detokenize(rollout.prompt.tokens),
        "tokens": lambda: len(rollout.tokens),
        "finish_reason": lambda: rollout.finish_reason,
    }
    row = rollout.prompt.columns or {}
    return (
        {name: known[of]() for name, of in description.takes.items()}
        | {name: row.get(name) for name in description.columns}
        # a list has a place for every answer
        | {name: row.get(name) for name in description.optional if description.batch or name in row}
    )


class _Job(NamedTuple):
    arguments: JsonObject
    prompt: Prompt
    values: Values


class _Slot:
    """A place for a process, and how much work it has."""

    def __init__(self) -> None:
        self.lanes = 0
        self.lock = asyncio.Lock()
        self.process: _Process | None = None


class _Pool:
    """The processes of one function. All but `submit` happens in the loop."""

    def __init__(
        self,
        function: config.RewardFunction,
        section: config.Reward,
        loop: asyncio.AbstractEventLoop,
        log: Path | None,
    ) -> None:
        self.function, self.description = function, describe(function.path)
        self._section, self._loop, self._log = section, loop, log
        self._lanes = section.in_flight if self.description.asynchronous and not self.description.batch else 1
        self._most = section.in_flight if self.description.batch else 1  # answers of a call
        self._slots = [_Slot() for _ in range(section.workers)]
        self._alone = asyncio.Semaphore(section.workers)
        self._waiting = deque[_Job]()
        self._tasks = set[asyncio.Task[None]]()
        self._failed: InputError | RunError | None = None

    def submit(self, arguments: JsonObject, prompt: Prompt) -> Values:
        """Has it called, see `Functions.start`. Called from any thread."""
        if self._failed:
            raise self._failed
        job = _Job(arguments, prompt, Future())
        self._loop.call_soon_threadsafe(self._take, job)
        return job.values

    def rest(self) -> None:
        """Ends the processes; new ones start when they are needed."""
        for slot in self._slots:
            if slot.process:
                slot.process.lose(ENDED)

    def close(self) -> None:
        self.rest()
        for task in self._tasks:
            task.cancel()
        _give_up(self._waiting, RunError(ENDED))

    def _take(self, job: _Job) -> None:
        self._waiting.append(job)
        slot = min(self._slots, key=lambda slot: slot.lanes)
        if slot.lanes < self._lanes:
            slot.lanes += 1
            task = self._loop.create_task(self._lane(slot))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _lane(self, slot: _Slot) -> None:
        """Calls the function, one call after another, as long as answers wait."""
        jobs: list[_Job] = []
        try:
            while self._waiting:
                jobs = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
                await self._call(slot, jobs)
        except (InputError, RunError) as error:  # no process could be started
            self._failed = error
            _give_up(jobs, error)
        except BaseException as error:  # whatever it is, who waits must not wait forever
            _give_up(jobs, error if isinstance(error, Exception) else RunError(ENDED))
            raise
        finally:
            slot.lanes -= 1

    async def _call(self, slot: _Slot, jobs: Sequence[_Job]) -> None:
        """One call of the function, and others where it is not clear which answer made it fail."""
        async with slot.lock:  # others wait for the process too
            if slot.process is None or slot.process.lost:
                slot.process = await self._start()
        process = slot.process
        arguments = jobs[0].arguments
        if self.description.batch:
            arguments = {name: [job.arguments[name] for job in jobs] for name in arguments}
        try:
            reply = await process.ask(arguments, len(jobs))
        except Lost as lost:
            if not process.shared and len(jobs) == 1:
                return self._fail(jobs[0], str(lost), passing=False)
            await asyncio.gather(*map(self._call_alone, jobs))
            return None
        if "values" in reply:
            for job, value in zip(jobs, reply["values"], strict=True):
                job.values.set_result(value)
        elif len(jobs) > 1:
            for job in jobs:
                await self._call(slot, [job])
        else:
            self._fail(jobs[0], reply["error"], reply["passing"])
        return None

    async def _call_alone(self, job: _Job) -> None:
        async with self._alone:
            slot = _Slot()
            self._slots.append(slot)
            slot.lanes = self._lanes  # it takes nothing else
            try:
                await self._call(slot, [job])
            finally:
                self._slots.remove(slot)
                if slot.process:
                    slot.process.lose("was ended")

    async def _start(self) -> _Process:
        seconds, memory = self._section.seconds, self._section.memory_mib << 20
        command = child.command("worker", self.function.path, seconds, memory)
        # an async function is stopped by its own process, if that can
        limit = seconds + GRACE * self.description.asynchronous
        found, process = await _Process.start(command, self.function.path, limit, self._log)
        if found.source != self.description.source:
            process.lose("has changed")
            raise InputError(
                f"{_key(self.function.path)}: its file has changed since the run began; put it back, or begin a stage "
                "with another function"
            )
        return process

    def _fail(self, job: _Job, why: str, passing: bool) -> None:
        """Gives an answer the recipe's value, or ends the run."""
        if self._section.on_failure == "value":
            return job.values.set_result(None)
        kind, remedy = (RunError, "the same command tries again") if passing else (InputError, "correct it")
        if "MemoryError" in why:
            remedy = f"raise reward.memory_mib = {self._section.memory_mib}, correct it"
        elif why.startswith(LATE):
            why, remedy = f"{LATE} {self._section.seconds:g} s", "raise reward.seconds, correct it"
        self._failed = kind(
            f"{_key(self.function.path)} {why}, for an answer to prompt {job.prompt.id}; {remedy}, or set "
            'reward.on_failure = "value"'
        )
        return job.values.set_exception(self._failed)


def _give_up(jobs: Iterable[_Job], error: Exception) -> None:
    for job in jobs:
        if not job.values.done():
            job.values.set_exception(error)


class _Process:
    """A child process that calls one function.

    Attributes:
      lost: why it is of no more use; empty while it is.
      shared: whether it had several calls under way when it was lost.
    """

    def __init__(self, process: asyncio.subprocess.Process, limit: float) -> None:
        self._process, self._limit = process, limit
        self._asked: dict[int, asyncio.Future[JsonObject]] = {}
        self._number = 0
        self.lost, self.shared = "", False
        self._reading = asyncio.ensure_future(self._read())

    @classmethod
    async def start(
        cls, command: Sequence[str], path: str, limit: float, log: Path | None
    ) -> tuple[Description, _Process]:
        """Starts it, and waits until the function is loaded; returns what it tells of it, too.

        Args:
          command: that starts it.
          path: of the function.
          limit: seconds that a call may take.
          log: see `Functions`.

        Raises:
          InputError: if the function cannot be loaded any more.
          RunError: if that takes too long.
        """
        with contextlib.ExitStack() as stack:
            errors: IO[bytes] | int = subprocess.DEVNULL
            if log and log.parent.is_dir():
                errors = stack.enter_context(log.open("ab"))
            process = await asyncio.create_subprocess_exec(
                *command,
                env=child.environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                limit=LONGEST,
                start_new_session=True,  # Ctrl-C is the run's to handle, and what it starts ends with it
            )
        assert process.stdout
        ready = False
        try:
            async with asyncio.timeout(START_SECONDS):
                found = _described(path, await process.stdout.readline())
            ready = True
        except TimeoutError:
            raise RunError(f"{_key(path)}: its process was not ready after {START_SECONDS:.0f} s") from None
        finally:
            if not ready:
                _kill(process.pid)
        return found, cls(process, limit)

    async def ask(self, arguments: JsonObject, answers: int) -> JsonObject:
        """Calls the function, for one answer or several.

        Returns:
          "values" of the answers, or an "error" and whether that may be "passing".

        Raises:
          Lost: if it ends before it replies, or takes too long.
        """
        if self.lost:
            raise Lost(self.lost)
        assert self._process.stdin
        self._number += 1
        number, reply = self._number, asyncio.get_running_loop().create_future()
        self._asked[number] = reply
        try:
            message = json.dumps([number, arguments, answers], default=str)
            self._process.stdin.write(message.encode() + b"\n")
            async with asyncio.timeout(self._limit):
                return await reply
        except TimeoutError:
            self.lose(LATE)
            raise Lost(LATE) from None
        finally:
            self._asked.pop(number, None)

    def lose(self, why: str) -> None:
        """Ends it, with whatever it has started."""
        if self.lost:
            return
        self.lost, self.shared = why, len(self._asked) > 1
        _kill(self._process.pid)
        for reply in self._asked.values():
            if not reply.done():
                reply.set_exception(Lost(why))

    async def _read(self) -> None:
        assert self._process.stdout
        while line := await self._process.stdout.readline():
            reply = json.loads(line)
            if (asked := self._asked.get(reply["number"])) and not asked.done():
                asked.set_result(reply)
        status = await self._process.wait()
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        self.lose(f"ended its process ({name})")


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
