"""A server with the routes of vLLM that VLLMSampler uses, and a transport that carries no weights to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from http.server import ThreadingHTTPServer

from jaxrl.sampling.client import Client, Failures
from jaxrl.types import JsonObject
from json_server import JsonHandler

DEFAULT = "default"  # vLLM's name of the weights that it was started with
Reply = JsonObject | bytes | tuple[int, JsonObject]  # a body, or an HTTP status with it


class Server(ThreadingHTTPServer):
    """Completes every prompt with `completion`, and fails at those whose first token `fails` names."""

    daemon_threads = True

    def __init__(self, mode: str = "processed_logprobs", positions: int = 64, **model: object) -> None:
        self.completion, self.reason, self.fails = [7, 1], "stop", set[int]()
        self.asked: list[int] = []  # first token of each prompt
        self.broken = set[str]()  # routes that fail
        self.ranks: object = []  # what its workers report of NCCL
        self.changed = threading.Condition()
        self.answer: Callable[[JsonObject, JsonObject], Reply] = lambda _, answer: answer
        super().__init__(("127.0.0.1", 0), Handler)
        self.instance = f"{self.server_port}"
        self.start_anew(mode, positions, **model)

    def start_anew(self, mode: str = "processed_logprobs", positions: int = 64, **model: object) -> None:
        """Becomes what `vllm serve` with other options is."""
        self.weights, self.paused, self.mode = DEFAULT, False, mode
        self.broken.clear()
        self.model = {"max_model_len": positions, "dtype": "torch.float32", "logprobs_mode": mode} | model

    def handle_error(self, *_: object) -> None:
        """Says nothing where a client went away."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def wait_for(self, asked: int, limit: float = 10) -> None:
        """Returns once that many prompts were asked for."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.asked) >= asked, limit)


class Handler(JsonHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        info = {"model_config": server.model, "instance_id": server.instance}
        known: dict[str, JsonObject] = {
            "/version": {"version": "0.32.0"},
            "/server_info": {"vllm_config": info | {"weight_transfer_config": {"backend": Nothing.backend}}},
            "/weight_info": {"weight_version": server.weights},
            "/is_paused": {"is_paused": server.paused},
            "/get_world_size": {"world_size": 1},
        }
        route = self.path.partition("?")[0]
        self.reply(200 if route in known else 404, known.get(route, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        route, server = self.path.partition("?")[0], self.server
        if route in server.broken:
            return self.reply(500, {})
        if route == "/finish_weight_update":
            server.weights = body["weight_version"]
        if route in ("/pause", "/resume"):
            server.paused = route == "/pause"
        if route == "/collective_rpc":
            return self.reply(200, {"results": server.ranks})
        if "sampling_params" not in body:
            return self.reply(200, {})
        first = body["token_ids"][0]
        if "cache_salt" not in body:  # the request of the inspection
            for stop in body["sampling_params"].get("stop_token_ids", []):
                if stop >= server.model.get("vocab_size", stop + 1):
                    return self.reply(400, {"error": f"stop id {stop} is out of the vocabulary"})
            logprob = 0.0 if server.mode == "processed_logprobs" else -0.5
            return self.reply(200, {"choices": [{"logprobs": {"content": [{"logprob": logprob}]}}]})
        with server.changed:
            server.asked.append(first)
            server.changed.notify_all()
        if first in server.fails:
            return self.reply(503, {})
        ids = server.completion
        choices = [
            {
                "index": i,
                "token_ids": ids,
                "logprobs": {"content": [{"token_id": id_, "logprob": -0.25} for id_ in ids]},
                "weight_versions": [{"version": server.weights, "start": 0, "end": len(ids)}],
                "finish_reason": server.reason,
            }
            for i in range(body["sampling_params"]["n"])
        ]
        answer = server.answer(body, {"choices": choices})
        return self.reply(*answer) if isinstance(answer, tuple) else self.reply(200, answer)


class Nothing:
    """A transport that carries no weights."""

    backend = "nothing"

    def prepare(self, params: object, version: int) -> None: ...

    def follow(self, params: object) -> None: ...

    async def greet(self, client: Client, url: str) -> None: ...

    async def connect(self, client: Client, urls: Sequence[str], failed: Failures) -> None: ...

    async def deliver(self, client: Client, urls: Sequence[str], failed: Failures) -> None: ...

    def done(self) -> None: ...
