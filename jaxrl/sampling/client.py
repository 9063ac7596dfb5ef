"""HTTP to vLLM servers: an answer, or the reason why there is none."""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence

import httpx

from jaxrl.errors import InputError
from jaxrl.sampling.vllm_plugin import OWNER, RUN
from jaxrl.types import JsonObject

SUPPORTED = "0.32"  # the minor version of vLLM whose routes these are
PROCESSED = "processed_logprobs"  # vLLM's name of those at the sampling temperature
CONNECT = 10.0  # seconds
REFUSALS = (400, 413)  # HTTP statuses that are about the request
PASSING = (408, 425, 429)  # those after which the same request may succeed
LARGEST = 1 << 30  # bytes of an answer, ten times what vllm.AT_ONCE tokens have
EXCERPT = 300  # characters that are shown of a server's error
KEY = "JAXRL_API_KEY"
WRONG_KEY = f"it wants another API key; {KEY} here has to be what VLLM_API_KEY is there"


@functools.cache
def api_key() -> str:
    """The key that this run's servers require: $JAXRL_API_KEY, or a random one for servers that this process starts.

    It is kept in environments alone, because every user can read command lines.
    """
    return os.environ.get(KEY) or secrets.token_urlsafe(32)


@functools.cache
def this_run() -> str:
    """The name by which servers tell the runs apart that use them: a random token, and this process in words."""
    return f"{secrets.token_hex(4)} process {os.getpid()} on {socket.gethostname()}"


def taken(url: str, owner: str) -> InputError:
    """The error for a server that another run has."""
    return InputError(
        f"{url}: {owner.partition(' ')[2] or 'another run'} samples there; wait for it, or name other servers"
    )


class ServerError(Exception):
    """A server did not answer, or not as asked; it may the next time."""


class BadAnswer(ServerError):
    """A server answered with what it must not, and asked again would do the same."""


class Refused(ServerError):
    """A server is well, and refused this one request."""


def _excerpt(answer: httpx.Response) -> str:
    """The beginning of an answer in one line."""
    return " ".join("".join(c if c.isprintable() else " " for c in answer.text[:EXCERPT]).split())


def _json(route: str, answer: httpx.Response) -> JsonObject:
    """Raises: BadAnswer."""
    try:
        value = answer.json() if answer.content else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise BadAnswer(f"{route} answered with something else than a JSON object: {_excerpt(answer)}")
    return value


Failures = dict[str, ServerError | InputError]  # the reason for each server that failed, by URL


class Client:
    """Requests to all servers; belongs to the event loop that first uses it."""

    def __init__(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        headers = {"Authorization": f"Bearer {api_key()}", RUN: this_run()}
        self._http = httpx.AsyncClient(limits=limits, trust_env=False, headers=headers)

    async def close(self) -> None:
        await self._http.aclose()

    async def owner(self, url: str, method: str = "GET", limit: float = CONNECT) -> JsonObject:
        """Takes a server that no other run has, and returns its `owner`, and the seconds for which that was `silent`.

        With the method "DELETE", gives it back.

        Raises:
          ServerError: also if the server has no Guard, which keeps runs apart.
        """
        answer = await self._request(method, url + OWNER, None, limit)
        if answer.status_code != 200:
            raise ServerError(f"{OWNER} answered {answer.status_code}")
        return _json(OWNER, answer)

    async def get(self, url: str, route: str, limit: float = CONNECT) -> JsonObject:
        """Raises: ServerError."""
        answer = await self._request("GET", url + route, None, limit)
        if answer.status_code != 200:
            raise ServerError(f"{route} answered {answer.status_code}")
        return _json(route, answer)

    async def post(self, url: str, route: str, body: JsonObject | None, limit: float) -> JsonObject:
        """
        Raises:
          Refused: if the request itself is at fault (HTTP 400, 413).
          BadAnswer: for other refusals, such as of a route that is not there, and answers that are no JSON object.
          ServerError: for everything else, such as no answer within `limit` seconds, or too many requests (429).
        """
        answer = await self._request("POST", url + route, body, limit)
        status, reason = answer.status_code, f"answered {answer.status_code}: {_excerpt(answer)}"
        if status in REFUSALS:
            raise Refused(f"HTTP {status}: {_excerpt(answer)}")
        if 400 <= status < 500 and status not in PASSING:
            raise BadAnswer(f"{route} {reason}")
        if status != 200:
            raise ServerError(f"{route} {reason}")
        return _json(route, answer)

    async def order(self, url: str, route: str, body: JsonObject | None, limit: float) -> JsonObject:
        """A post that has to succeed.

        Raises:
          ServerError: if it does not.
        """
        try:
            return await self.post(url, route, body, limit)
        except Refused as error:
            raise ServerError(f"{route}: {error}") from None

    async def _request(self, method: str, url: str, body: JsonObject | None, limit: float) -> httpx.Response:
        try:
            # httpx has limits for each part that arrives, and none for the whole
            async with asyncio.timeout(limit + CONNECT):
                timeout, content = httpx.Timeout(limit, connect=CONNECT), bytearray()
                async with self._http.stream(method, url, json=body, timeout=timeout) as streamed:
                    async for piece in streamed.aiter_bytes():
                        content += piece
                        if len(content) > LARGEST:
                            raise BadAnswer(f"answered with more than {LARGEST >> 20} MiB")
                answer = httpx.Response(streamed.status_code, content=bytes(content))
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            raise ServerError(f"no answer ({type(error).__name__})") from None
        if answer.status_code == 401:
            raise ServerError(WRONG_KEY)
        if answer.status_code == 423:
            raise taken(url.removesuffix(httpx.URL(url).raw_path.decode()), answer.text)
        return answer


async def ask_all(urls: Sequence[str], ask: Callable[[str], Awaitable[object]], failed: Failures) -> None:
    """Asks all servers that have not failed yet, at once; adds those that fail now to `failed`."""
    left = [url for url in urls if url not in failed]
    for url, result in zip(left, await asyncio.gather(*map(ask, left), return_exceptions=True), strict=True):
        if isinstance(result, ServerError | InputError):
            failed[url] = result
        elif isinstance(result, BaseException):
            raise result
