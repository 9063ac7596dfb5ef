"""Prompts shared out among servers, of which some fail."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence

from jaxrl.errors import InputError, RunError
from jaxrl.sampling.client import BadAnswer, Refused, ServerError

LOOK = 0.2  # seconds between looks whether all is done while a server is down
RETRY = 1.0  # seconds between requests to a server that is down

Ask = Callable[[str, int], Awaitable[None]]  # has a server answer the prompt of an index
Revive = Callable[[str, ServerError], Awaitable[None]]  # waits for a server, whose error this is
OnLeave = Callable[[str, Exception], None]  # a server, and why it is not asked again


async def share_out(
    count: int, urls: Sequence[str], lanes: int, ask: Ask, revive: Revive, patience: float, on_leave: OnLeave
) -> dict[int, Refused]:
    """Has servers answer `count` prompts, each by the first that can.

    Each server has lanes, with one request each under way. After a ServerError it is waited for, while others take its
    prompts. After a BadAnswer or an InputError it leaves, and so it does if `revive` raises.

    Args:
      count: of prompts.
      urls: of the servers.
      lanes: of each server.
      ask: has a server answer a prompt.
      revive: returns once a server may be asked again.
      patience: seconds for which a prompt may fail again and again.
      on_leave: called with a server that leaves while others stay.

    Returns:
      the prompts that every server refused, unless it left, with the last reason.

    Raises:
      InputError: if all servers have left, one of them by it.
      RunError: if all have left.
    """
    waiting, open_, failures = deque(range(count)), set(range(count)), Counter[int]()
    refused: dict[int, dict[str, Refused]] = {p: {} for p in range(count)}
    dropped = dict[int, Refused]()
    left, down, changed = dict[str, Exception](), set[str](), asyncio.Condition()

    def next_for(url: str) -> int | None:
        return next((p for p in waiting if url not in refused[p]), None)

    def drop() -> None:
        """Drops what every server that is left has refused."""
        for p in [p for p in waiting if refused[p] and {*refused[p], *left} >= {*urls}]:
            waiting.remove(p)
            open_.remove(p)
            dropped[p] = [*refused[p].values()][-1]

    def leave(url: str, error: Exception) -> None:
        left[url] = error
        if {*left} != {*urls}:
            on_leave(url, error)
        drop()

    async def recover(url: str, p: int, error: ServerError) -> None:
        """Waits for a server; one lane does for all of them."""
        await revive(url, error)
        failures[p] += 1
        if failures[p] * RETRY > patience:
            raise RunError(f"{url}: {error}, at attempt {failures[p]}; see the server's log")
        await asyncio.sleep(RETRY)  # it may be well, and fail at this prompt again

    async def fail(url: str, p: int, error: ServerError | InputError) -> None:
        waiting.appendleft(p)
        if isinstance(error, Refused):
            refused[p][url] = error
            drop()
        elif url in left or url in down:
            pass  # another lane of this server failed before
        elif isinstance(error, InputError):
            leave(url, error)
        elif isinstance(error, BadAnswer):
            leave(url, RunError(f"{url}: {error}"))
        else:
            down.add(url)
            await notify()  # other servers may take the prompt
            try:
                await recover(url, p, error)
            except (InputError, RunError) as lost:
                leave(url, lost)
            finally:
                down.remove(url)

    async def notify() -> None:
        async with changed:
            changed.notify_all()

    async def lane(url: str) -> None:
        def ready() -> bool:
            return not open_ or url in left or (url not in down and next_for(url) is not None)

        while True:
            async with changed:
                await changed.wait_for(ready)
                p = next_for(url)
                if url in left or p is None:
                    return
                waiting.remove(p)
            try:
                await ask(url, p)
                open_.remove(p)
            except (ServerError, InputError) as error:
                await fail(url, p, error)
            await notify()

    tasks = {asyncio.create_task(lane(url)) for _ in range(lanes) for url in urls}
    pending = tasks
    try:
        while open_ and {*left} != {*urls}:  # a server that is down does not hold up what others can finish
            done, pending = await asyncio.wait(pending, timeout=LOOK, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if open_:
        errors = [*left.values()]
        raise next((error for error in errors if isinstance(error, InputError)), errors[-1])
    return dropped
