"""The reward functions that come along: each against something real."""

from __future__ import annotations

import json
import os
import re
import threading
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_run
from evals import judge
from jaxrl import config
from jaxrl.errors import RunError
from jaxrl.marking import finished, make_marker
from jaxrl.rewards.functions import Functions, describe
from jaxrl.sampling.client import api_key
from jaxrl.sampling.servers import CPU
from jaxrl.types import JsonObject, Prompt, Rollout
from json_server import JsonHandler, serving
from recipes.rewards.code import share_passed
from recipes.rewards.form import thoughts_then_box
from recipes.rewards.judge import ASKED

EXAMPLES = Path(__file__).parents[2] / "recipes" / "rewards"


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("<think>2 + 2</think>It is \\boxed{4}.", 1.0),
        (" \n<think>a\nb</think>\n\\boxed{\\frac{1}{2}} ", 1.0),
        ("It is \\boxed{4}.", 0.0),
        ("<think></think>\\boxed{4}", 0.0),
        ("<think>\\boxed{4}</think>4", 0.0),
        ("<think>a</think>\\boxed{4} or \\boxed{5}", 0.0),
        ("<think>a</think>b<think>c</think>\\boxed{4}", 0.0),
        ("<think>a</think>\\boxed{4}</think>", 0.0),
        ("Well. <think>a</think>\\boxed{4}", 0.0),
        ("<think>" * 50_000, 0.0),
    ],
)
def test_form(response: str, value: float) -> None:
    began = time.monotonic()
    assert thoughts_then_box(response) == value
    assert time.monotonic() - began < 1


TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("def add(a, b):\n    return a + b", 1.0),
        ("def add(a, b):\n    return abs(a) + b", 0.5),
        ("def add(a, b) return a + b", 0.0),
        ("def add(a, b):\n    return bytearray(1 << 33)", 0.0),
        ("import sys\nsys.exit(0)", 0.0),
        ("import os\nprint('passed', flush=True)\nos._exit(0)", 0.0),
        ("open('x', 'wb').write(bytes(1 << 22))\ndef add(a, b): return a + b", 0.0),
        ("x = '\0'", 0.0),
    ],
)
def test_code(code: str, value: float) -> None:
    response = f"First:\n```python\nraise ValueError\n```\nBetter:\n```python\n{code}\n```\nDone."
    assert share_passed(response, TESTS) == value
    assert share_passed(response, json.dumps(TESTS)) == value


def test_endless_code_ends() -> None:
    assert share_passed("```python\nwhile True: pass\n```", TESTS[:1]) == 0.0


def test_no_code_is_no_reward() -> None:
    assert share_passed("add is 3", TESTS) == 0.0


def test_the_function_of_the_page() -> None:
    page = (EXAMPLES.parents[1] / "docs" / "rewards.md").read_text()
    names: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], names)
    assert names["brief"]("it is 4", "4", 1000, level=3) == 1.5 and not names["brief"]("it is 5", "4", 10)
    for recipe in re.findall(r"```toml\n(.*?)```", page, re.DOTALL):
        reward = config.from_dict(tomllib.loads(recipe)).reward
        for function in reward.named:
            if function.path.startswith("recipes/"):
                assert describe(str(EXAMPLES.parents[1] / function.path)).takes


class Endpoint(ThreadingHTTPServer):
    """A judge that finds a response as good as its last word says; it takes its time, and fails when it is told to."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: list[JsonObject] = []
        self.failures, self.busy, self.busiest = 0, 0, 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(JsonHandler):
    server: Endpoint

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "judge"}]})

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append(body)
            server.failures -= 1
            failing = server.failures >= 0
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        time.sleep(0.2)
        with server.lock:
            server.busy -= 1
        said = body["messages"][0]["content"].partition("\n\nHow good")[0].split()[-1]
        self.reply(503 if failing else 200, {"choices": [{"message": {"content": said}}]})


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    with serving(Endpoint()) as server:
        monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.delenv("JUDGE_MODEL", raising=False)
        yield server


def judged(texts: list[str]) -> list[float]:
    recipe = config.from_dict({"reward": {"function": f"{EXAMPLES}/judge.py:mark", "workers": 1}})
    prompt = Prompt("0", np.zeros(1, np.int32), "42", columns={"problem": "What is it?"})
    functions = Functions(recipe.reward)
    try:
        mark = make_marker(recipe, lambda tokens: texts[tokens[0]], functions)
        rollouts = [
            Rollout(prompt, np.array([i], np.int32), np.zeros(1, np.float32), "stop", 0)
            for i in range(len(texts))
        ]
        (found,) = finished([[mark(each) for each in rollouts]])
    finally:
        functions.close()
    return [each.rewards["mark"] for each in found if each.rewards]


def test_judge_marks_many_answers_at_a_time_and_tries_again(endpoint: Endpoint) -> None:
    endpoint.failures = 2
    assert judged([f"I give {n}" for n in range(12)] + ["So good!"]) == [n / 10 for n in [*range(11), 10, 0]]
    assert len(endpoint.asked) == 15 and endpoint.busiest > 6
    shown = endpoint.asked[0]["messages"][0]["content"]
    assert "What is it?" in shown and "42" in shown and endpoint.asked[0]["model"] == "judge"


def test_a_judge_that_is_away_ends_the_run_for_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("JUDGE_MODEL", "judge")
    with pytest.raises(RunError, match=r"raised ConnectionError: http://127.0.0.1:1: ConnectError"):
        judged(["I give 3"])


@pytest.mark.vllm
def test_judge_is_a_real_vllm_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its marks are what the server itself says, and others for other responses."""

    def example(rng: np.random.Generator) -> Rollout:
        """A long prompt of unknown symbols with a digit in it, and that digit as the reply."""
        digit = 6 + int(rng.integers(3))
        asked = np.array([2, *[0] * int(rng.integers(1, 24)), digit, 0, 3], np.int32)
        prompt = Prompt("", asked, "")
        return Rollout(prompt, np.array([digit, 1], np.int32), np.zeros(2, np.float32), "stop", 0)

    size, tokenizer = len(tiny_run.SYMBOLS), tiny_run.make_tokenizer()
    folder = tiny_run.pretrain(
        tmp_path / "model", size, tokenizer, example, 100, longest=32, positions=512, head_dim=32
    )
    program = os.environ.get("VLLM", ".venv-vllm/bin/vllm")
    recipe = config.from_dict({"model": {"dtype": "float32"}, "sampler": {"vllm": program}})
    with judge.server(recipe, folder, "tiny", tmp_path, CPU) as url:
        monkeypatch.setenv("JUDGE_URL", url)
        monkeypatch.setenv("JUDGE_KEY", api_key())
        texts = [f"{n} is the answer " * k for n in range(3) for k in (1, 2, 3)]
        found = judged(texts)
        said = [ask(url, text) for text in texts]
    numbers = [re.search(r"\d+", each) for each in said]
    assert found == [min(int(n[0]), 10) / 10 if n else 0.0 for n in numbers]
    assert len(set(found)) > 1


def ask(url: str, response: str) -> str:
    """What a server says to the judge's question, by another HTTP client."""
    text = ASKED.format(problem="What is it?", answer="42", response=response)
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 8,
    }
    headers = {"Authorization": f"Bearer {api_key()}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["choices"][0]["message"]["content"] or ""
