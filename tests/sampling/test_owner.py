"""A server has one run at a time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import httpx
import pytest

from jaxrl.errors import InputError
from jaxrl.sampling import vllm
from jaxrl.sampling.client import BadAnswer, Client, this_run
from jaxrl.sampling.transports.nccl import NCCL
from jaxrl.sampling.vllm import VLLMSampler
from jaxrl.sampling.vllm_plugin import IDENTITY, OWNER, RUN, SILENCE, Guard, Receive, Scope, Send
from json_server import JsonHandler, serving

ONE, TWO = "1a process 1 on here", "2b process 2 on there"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"served"})


class Guarded:
    """A Guard, its clock, and requests to it."""

    def __init__(self) -> None:
        self.now = 0.0
        transport = httpx.ASGITransport(Guard(app, lambda: self.now))  # type: ignore[arg-type]
        self._client = httpx.AsyncClient(transport=transport, base_url="http://server")

    def ask(
        self, run: str = "", route: str = "/pause", method: str = "POST", key: str = "key"
    ) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} | ({RUN: run} if run else {})
        return asyncio.run(self._client.request(method, route, headers=headers))


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Guarded:
    monkeypatch.setenv("VLLM_API_KEY", "key")
    monkeypatch.setenv(IDENTITY, "itself")
    return Guarded()


def test_requests_of_a_second_run_are_rejected_as_long_as_the_first_lives(guarded: Guarded) -> None:
    assert guarded.ask(ONE).text == "served"
    for _ in range(5):
        guarded.now += SILENCE
        refused = guarded.ask(TWO)
        assert (refused.status_code, refused.text) == (423, ONE)
        assert guarded.ask(ONE).status_code == guarded.ask().status_code == 200
        assert guarded.ask(TWO, key="wrong").status_code == 401
    guarded.now += SILENCE + 1
    assert guarded.ask(TWO).status_code == 200
    assert guarded.ask(ONE).status_code == 423


def test_the_owner_is_shown_and_can_give_the_server_back(guarded: Guarded) -> None:
    assert guarded.ask(route=OWNER, method="GET").json()["owner"] == ""
    assert guarded.ask(ONE, OWNER, "GET").json() == {"server": "itself", "owner": ONE, "silent": 0}
    guarded.now += 3
    shown = guarded.ask(TWO, OWNER, "DELETE").json()
    assert shown == {"server": "itself", "owner": ONE, "silent": 3}
    assert guarded.ask(ONE, OWNER, "DELETE").json()["owner"] == ""
    assert guarded.ask(TWO, OWNER, "GET").json()["owner"] == TWO


class Taken(ThreadingHTTPServer):
    """Has an owner that is alive, which shows at the fourth request, or dead."""

    def __init__(self, alive: bool) -> None:
        self.alive, self.asked, self.owner, self.given_back = alive, 0, TWO, threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(JsonHandler):
    server: Taken

    def do_GET(self) -> None:
        server = self.server
        server.asked += 1
        if not server.alive and server.asked > 3:
            server.owner = self.headers[RUN]
        silent = 1.0 if server.alive and server.asked > 3 else float(server.asked)
        self.reply(200, {"server": "", "owner": server.owner, "silent": silent})

    def do_DELETE(self) -> None:
        self.server.given_back.set()
        self.reply(200, {})


@pytest.fixture(params=[True, False], ids=["alive", "dead"])
def other(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Taken]:
    async def inspect(self: VLLMSampler) -> None: ...

    monkeypatch.setattr(VLLMSampler, "_inspect_all", inspect)
    monkeypatch.setattr(vllm, "RETRY", 0.05)
    monkeypatch.setattr(vllm, "BEAT", 0.05)
    with serving(Taken(request.param)) as server:
        yield server


def test_an_owner_that_lives_is_named_and_one_that_has_crashed_is_waited_for(other: Taken) -> None:
    url, said = f"http://127.0.0.1:{other.server_port}", list[str]()
    if other.alive:
        with pytest.raises(
            InputError, match=rf"{url}: process 2 on there samples there; wait for it, or name"
        ):
            VLLMSampler([url], None, say=said.append)  # type: ignore[arg-type]
        assert not other.given_back.is_set()
    else:
        sampler = VLLMSampler([url], None, say=said.append)  # type: ignore[arg-type]
        assert other.owner == this_run()
        before = other.asked
        while other.asked < before + 2:  # it shows that it lives
            time.sleep(0.02)
        sampler.close()
        assert other.given_back.is_set()
    assert said == [f"{url}: process 2 on there has not given it back; watching for 35 s whether it lives"]


ODD = ({}, {"owner": ONE}, {"owner": ONE, "silent": "x"}, {"owner": None, "silent": []}, {"world_size": "2"})


class Odd(JsonHandler):
    asked = 0

    def do_GET(self) -> None:
        self.reply(200, ODD[Odd.asked % len(ODD)])
        Odd.asked += 1

    do_DELETE = do_GET


def test_odd_answers_of_a_server_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def inspect(self: VLLMSampler) -> None: ...

    monkeypatch.setattr(VLLMSampler, "_inspect_all", inspect)
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Odd)) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        for _ in ODD:
            VLLMSampler([url], None).close()  # type: ignore[arg-type]  # not one of them is its owner
        assert Odd.asked >= len(ODD)
        for _ in ODD:
            with pytest.raises(BadAnswer, match="/get_world_size answered"):
                asyncio.run(NCCL(None).greet(Client(), url))  # type: ignore[arg-type]
