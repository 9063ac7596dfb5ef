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
CONNECT = 10.0  # seconds
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
    """A server did not answer, or not as asked."""


def _json(route: str, answer: httpx.Response) -> JsonObject:
    """Raises: ServerError."""
    try:
        return answer.json() if answer.content else {}
    except (ValueError, RecursionError):
        raise ServerError(
            f"{route} answered with something else than JSON: {answer.text[:EXCERPT]}"
        ) from None


Failures = dict[str, ServerError]  # the reason for each server that failed, by URL


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
        answer = await self._request(method, url + OWNER, None, httpx.Timeout(limit))
        if answer.status_code != 200:
            raise ServerError(f"{OWNER} answered {answer.status_code}")
        return _json(OWNER, answer)

    async def get(self, url: str, route: str, limit: float = CONNECT) -> JsonObject:
        """Raises: ServerError."""
        answer = await self._request("GET", url + route, None, httpx.Timeout(limit))
        if answer.status_code != 200:
            raise ServerError(f"{route} answered {answer.status_code}")
        return _json(route, answer)

    async def post(self, url: str, route: str, body: JsonObject | None, limit: float) -> JsonObject | str:
        """The answer, or the reason why the request itself was refused (HTTP 4xx).

        Raises:
          ServerError: for everything else, such as no answer within `limit` seconds.
        """
        answer = await self._request("POST", url + route, body, httpx.Timeout(limit, connect=CONNECT))
        if 400 <= answer.status_code < 500:
            return f"HTTP {answer.status_code}: {answer.text[:EXCERPT]}"
        if answer.status_code != 200:
            raise ServerError(f"{route} answered {answer.status_code}: {answer.text[:EXCERPT]}")
        return _json(route, answer)

    async def order(self, url: str, route: str, body: JsonObject | None, limit: float) -> JsonObject:
        """A post that has to succeed.

        Raises:
          ServerError: if it does not.
        """
        answer = await self.post(url, route, body, limit)
        if isinstance(answer, str):
            raise ServerError(f"{route}: {answer}")
        return answer

    async def _request(
        self, method: str, url: str, body: JsonObject | None, timeout: httpx.Timeout
    ) -> httpx.Response:
        try:
            answer = await self._http.request(method, url, json=body, timeout=timeout)
        except httpx.HTTPError as error:
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
        if isinstance(result, ServerError):
            failed[url] = result
        elif isinstance(result, BaseException):
            raise result
