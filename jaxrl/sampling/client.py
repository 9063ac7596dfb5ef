"""HTTP to vLLM servers: an answer, or the reason why there is none."""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx

CONNECT = 10.0  # seconds


KEY = "JAXRL_API_KEY"
WRONG_KEY = f"it wants another API key; {KEY} here has to be what VLLM_API_KEY is there"


@functools.cache
def api_key() -> str:
    """What servers of this run ask for: $JAXRL_API_KEY, or else one of this process and the servers that it starts.

    Only environments hold it; a command line is there for everybody to see.
    """
    return os.environ.get(KEY) or secrets.token_urlsafe(32)


class ServerError(Exception):
    """A server that did not answer, or not with what was asked."""


class Client:
    """One for all servers; belongs to the event loop that first uses it."""

    def __init__(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        headers = {"Authorization": f"Bearer {api_key()}"}
        self._http = httpx.AsyncClient(limits=limits, trust_env=False, headers=headers)

    async def close(self) -> None:
        await self._http.aclose()

    async def get(self, url: str, route: str, limit: float = CONNECT) -> dict[str, Any]:
        """Raises: ServerError."""
        try:
            answer = await self._http.get(url + route, timeout=limit)
        except httpx.HTTPError as error:
            raise ServerError(f"no answer ({type(error).__name__})") from None
        if answer.status_code == 401:
            raise ServerError(WRONG_KEY)
        if answer.status_code != 200:
            raise ServerError(f"{route} answered {answer.status_code}")
        return answer.json() if answer.content else {}

    async def post(self, url: str, route: str, body: Any, limit: float) -> dict[str, Any] | str:
        """The answer, or the reason why the request itself was refused (HTTP 4xx).

        Raises:
          ServerError: for everything else, such as no answer within `limit` seconds.
        """
        try:
            answer = await self._http.post(
                url + route, json=body, timeout=httpx.Timeout(limit, connect=CONNECT)
            )
        except httpx.HTTPError as error:
            raise ServerError(f"no answer ({type(error).__name__})") from None
        if answer.status_code == 401:
            raise ServerError(WRONG_KEY)
        if 400 <= answer.status_code < 500:
            return f"HTTP {answer.status_code}: {answer.text[:300]}"
        if answer.status_code != 200:
            raise ServerError(f"{route} answered {answer.status_code}: {answer.text[:300]}")
        return answer.json() if answer.content else {}

    async def order(self, url: str, route: str, body: Any, limit: float) -> dict[str, Any]:
        """A post that has to succeed.

        Raises:
          ServerError: if it does not.
        """
        answer = await self.post(url, route, body, limit)
        if isinstance(answer, str):
            raise ServerError(f"{route}: {answer}")
        return answer


async def each(
    urls: Sequence[str], ask: Callable[[str], Awaitable[Any]], failed: dict[str, ServerError]
) -> None:
    """Asks, all at once, those that have not failed yet; adds to `failed` those that do now."""
    left = [url for url in urls if url not in failed]
    for url, result in zip(left, await asyncio.gather(*map(ask, left), return_exceptions=True), strict=True):
        if isinstance(result, ServerError):
            failed[url] = result
        elif isinstance(result, BaseException):
            raise result
