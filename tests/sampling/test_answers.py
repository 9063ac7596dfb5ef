"""No answer of a server is believed that is not what was asked for."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl import config
from jaxrl.errors import InputError, RunError
from jaxrl.sampling.answers import Needs, read_answer
from jaxrl.sampling.client import BadAnswer, Client, ServerError
from jaxrl.sampling.vllm import VLLMSampler
from jaxrl.types import JsonObject, Prompt, SamplingParams, silent
from json_server import serving
from vllm_stand_in import Nothing, Server

SAMPLING = SamplingParams(max_tokens=4, stop_ids=(1,))
PROMPTS = [Prompt(str(p), np.array([p], np.int32), "") for p in range(6)]
VOCABULARY = 9


def answer_of(ids: list[int], samples: int = 2) -> JsonObject:
    choice = {
        "token_ids": ids,
        "logprobs": {"content": [{"token_id": i, "logprob": -0.25} for i in ids]},
        "weight_versions": [{"version": "0", "start": 0, "end": len(ids)}],
        "finish_reason": "stop" if ids[-1] == 1 else "length",
    }
    return {"choices": [copy.deepcopy(choice) | {"index": i} for i in range(samples)]}


def first(change: Callable[[JsonObject], object]) -> Callable[[JsonObject], JsonObject]:
    """Changes the first of the completions."""

    def changed(answer: JsonObject) -> JsonObject:
        change(answer["choices"][0])
        return answer

    return changed


def put(value: Any, *path: str | int) -> Callable[[JsonObject], JsonObject]:
    """Puts a value somewhere into the first completion."""

    def change(choice: Any) -> None:
        for key in path[:-1]:
            choice = choice[key]
        choice[path[-1]] = value

    return first(change)


def logprob(value: object) -> Callable[[JsonObject], JsonObject]:
    return put(value, "logprobs", "content", 0, "logprob")


def become(ids: list[int], reason: str) -> Callable[[JsonObject], JsonObject]:
    def change(answer: JsonObject) -> JsonObject:
        version = answer["choices"][0]["weight_versions"][0]["version"]
        choices = answer_of(ids)["choices"]
        for choice in choices:
            choice["weight_versions"][0]["version"] = version
        return {"choices": [choice | {"finish_reason": reason} for choice in choices]}

    return change


HOSTILE: dict[str, tuple[Callable[[JsonObject], Any], str]] = {
    "no JSON": (lambda _: b"<html>Welcome</html>", "something else than a JSON object: <html>Welcome"),
    "cut JSON": (lambda answer: json.dumps(answer).encode()[:-9], "something else than a JSON object"),
    "deep JSON": (lambda _: b"[" * 100_000, "something else than a JSON object"),
    "no object": (lambda answer: json.dumps([answer]).encode(), "something else than a JSON object"),
    "nothing": (lambda _: b"", "choices is None, and no list"),
    "an error": (lambda _: {"error": {"message": "out of memory"}}, "choices is None"),
    "no choices": (lambda _: {"choices": []}, r"samples \[\] came, where 2 were asked for"),
    "one sample too few": (lambda a: {"choices": a["choices"][:1]}, r"samples \[0\] came"),
    "one sample too many": (lambda a: {"choices": [*a["choices"], a["choices"][0] | {"index": 2}]}, "came, where 2"),
    "one sample twice": (lambda a: {"choices": a["choices"][:1] * 2}, r"samples \[0\] came"),
    "one sample thrice": (lambda a: {"choices": [*a["choices"], a["choices"][0]]}, "came, where 2"),
    "an index that is a boolean": (put(False, "index"), "index is False, and no int"),
    "choices that are numbers": (lambda _: {"choices": [0, 1]}, "index is 0, and no int"),
    "no tokens": (put([], "token_ids"), "a completion is empty"),
    "tokens that are text": (put("71", "token_ids"), "token_ids is '71', and no list"),
    "a token beyond the vocabulary": (put(9, "token_ids", 0), "9 is no token id of a vocabulary of 9"),
    "a token below 0": (put(-1, "token_ids", 0), "-1 is no token id"),
    "a token beyond 64 bits": (put(10**30, "token_ids", 0), "is no token id"),
    "a token that is a float": (put(7.0, "token_ids", 0), "7.0 is no token id"),
    "a token that is a boolean": (put(True, "token_ids", 1), "True is no token id"),
    "a token that is text": (put("7", "token_ids", 0), "'7' is no token id"),
    "a log-prob that is NaN": (logprob(math.nan), "nan is no log-probability"),
    "vLLM's log-prob of NaN": (logprob(-9999.0), "-9999.0 is no log-probability"),
    "a log-prob that is infinite": (logprob(-math.inf), "-inf is no log-probability"),
    "a log-prob above 0": (logprob(0.5), "0.5 is no log-probability"),
    "a log-prob that is text": (logprob("-0.25"), "'-0.25' is no log-probability"),
    "a log-prob that is null": (logprob(None), "None is no log-probability"),
    "a log-prob that is a boolean": (logprob(False), "False is no log-probability"),
    "a log-prob beyond floats": (logprob(-(10**400)), "is no log-probability"),
    "log-probs that are numbers": (put([-0.25, -0.25], "logprobs", "content"), "nan is no log-probability"),
    "one log-prob too few": (first(lambda c: c["logprobs"]["content"].pop()), "2 tokens came with 1 log-prob"),
    "one log-prob too many": (first(lambda c: c["logprobs"]["content"].append({"logprob": -1.0})), "2 tokens came"),
    "no log-probs": (put(None, "logprobs"), "logprobs is None"),
    "log-probs of other tokens": (first(lambda c: c["logprobs"]["content"].reverse()), "of other tokens"),
    "a stop id before the end": (become([1, 7, 1], "stop"), r"3 tokens of at most 4, with stop ids at \[0, 2\]"),
    "a stop without a stop id": (become([7, 7], "stop"), r"stop ids at \[\], ended by 'stop'"),
    "a full length with a stop id": (become([7, 7, 7, 1], "length"), "ended by 'length'"),
    "too many tokens": (become([7] * 5, "length"), "5 tokens of at most 4"),
    "an abortion": (put("abort", "finish_reason"), "ended by 'abort'"),
    "no reason": (put(None, "finish_reason"), "finish_reason is None"),
    "a reason that is a list": (put(["stop"], "finish_reason"), "finish_reason is"),
    "weights of the future": (put("7", "weight_versions", 0, "version"), "of weights '7', not"),
    "weights that are a number": (put(0, "weight_versions", 0, "version"), "version is 0, and no str"),
    "no weights": (put([], "weight_versions"), "0 of 2 tokens have a version"),
    "weights of too few tokens": (put(1, "weight_versions", 0, "end"), "1 of 2 tokens have a version"),
    "weights of too many tokens": (put(3, "weight_versions", 0, "end"), "3 of 2 tokens have a version"),
    "weights of no tokens": (put(0, "weight_versions", 0, "end"), "tokens 0 to 0"),
    "weights that begin late": (put(1, "weight_versions", 0, "start"), "tokens 1 to 2"),
}  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Server, Server, list[str], VLLMSampler, VLLMSampler]]:
    """Two servers, what is said, a sampler of the first, and one of both."""
    section, needs, said = config.Sampler(concurrency=1, patience_seconds=1), Needs(VOCABULARY), list[str]()
    with serving(Server()) as bad, serving(Server()) as good:
        alone = VLLMSampler([bad.url], Nothing(), section, say=silent, needs=needs)
        both = VLLMSampler([bad.url, good.url], Nothing(), section, say=said.append, needs=needs)
        for sampler in (alone, both):
            sampler.publish(None, 0)
        yield bad, good, said, alone, both
        alone.close()
        both.close()


@pytest.mark.parametrize(("change", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_answer_is_not_believed_nor_its_server_asked_again(
    pair: tuple[Server, Server, list[str], VLLMSampler, VLLMSampler],
    change: Callable[[JsonObject], Any],
    reason: str,
) -> None:
    bad, good, said, alone, both = pair
    bad.asked.clear()
    bad.answer = lambda _, answer: change(copy.deepcopy(answer))
    with pytest.raises(RunError, match=reason) as caught:
        alone.generate(PROMPTS, 2, SAMPLING, (1,))
    assert str(caught.value).startswith(bad.url) and "\n" not in str(caught.value)
    assert len(bad.asked) == 1
    said.clear()
    groups = both.generate(PROMPTS, 2, SAMPLING, (1,))
    assert len(bad.asked) == 2
    assert [[r.server for r in group] for group in groups] == [[good.url] * 2] * len(PROMPTS)
    (line,) = said
    assert line.startswith(bad.url) and line.endswith("; it is not asked again for this batch")
    bad.answer = lambda _, answer: answer
    served = {r.server for group in both.generate(PROMPTS, 2, SAMPLING, (1,)) for r in group}
    assert served == {bad.url, good.url}  # the next batch is another chance


def nodes(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of everything in a JSON value."""
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield (*path, key)
        yield from nodes(child, (*path, key))


VALID = answer_of([7, 3, 1])
VALUES = st.one_of(
    st.sampled_from(
        [None, [], {}, [[]], "", "0", True, math.nan, math.inf, 1e400, 10**400, -9999.0, {"0": 0}]
    ),
    st.integers(-3, 12),
    st.floats(-2, 2),
)
PATHS = sorted(nodes(VALID), key=str)


@given(st.sampled_from(PATHS), VALUES, st.sampled_from(["put", "drop", "twice"]))
def test_an_answer_that_was_changed_anywhere_is_refused_or_is_a_completion(
    path: tuple[str | int, ...], value: Any, how: str
) -> None:
    answer = copy.deepcopy(VALID)
    at: Any = answer
    for key in path[:-1]:
        at = at[key]
    if how == "put":
        at[path[-1]] = value
    elif how == "drop" or isinstance(at, dict):
        del at[path[-1]]
    else:
        at.insert(path[-1], at[path[-1]])
    try:
        rollouts = read_answer(answer, PROMPTS[0], 2, SAMPLING, VOCABULARY, {"0": 0})
    except BadAnswer as error:
        assert "\n" not in str(error)
        return
    except InputError as error:
        assert "cut a completion" in str(error)
        return
    assert len(rollouts) == 2
    for rollout in rollouts:
        assert 1 <= len(rollout.tokens) == len(rollout.logprobs) <= 4 and rollout.version == 0
        assert all(0 <= token < VOCABULARY for token in rollout.tokens)
        assert np.isfinite(rollout.logprobs).all() and (rollout.logprobs <= 1e-5).all()
        assert (rollout.tokens == 1).tolist() == [
            *[False] * (len(rollout.tokens) - 1),
            rollout.finish_reason == "stop",
        ]


def test_samples_come_in_the_order_of_their_indices_with_the_oldest_of_their_versions() -> None:
    answer = answer_of([7, 3, 7, 7])
    answer["choices"].reverse()
    answer["choices"][0]["weight_versions"] = [
        {"version": "6", "start": 0, "end": 3},
        {"version": "5", "start": 3, "end": 4},
    ]
    answer["choices"][1]["weight_versions"][0]["version"] = "7"
    rollouts = read_answer(answer, PROMPTS[0], 2, SAMPLING, VOCABULARY, {"5": 5, "6": 6, "7": 7})
    assert [(r.version, r.finish_reason) for r in rollouts] == [(7, "length"), (5, "length")]
    with pytest.raises(BadAnswer, match=r"of weights '5', not \['6', '7'\]"):
        read_answer(answer, PROMPTS[0], 2, SAMPLING, VOCABULARY, {"6": 6, "7": 7})


@pytest.mark.parametrize(
    ("piece", "pause", "reason"),
    [(b" ", 0.05, r"no answer \(TimeoutError\)"), (b" " * 2**16, 0.0, "answered with more than 1 MiB")],
)
def test_an_answer_without_end_is_none(
    monkeypatch: pytest.MonkeyPatch, piece: bytes, pause: float, reason: str
) -> None:
    """Each byte comes in time, and all of them never, or more than memory holds."""
    monkeypatch.setattr("jaxrl.sampling.client.CONNECT", 0.2)
    monkeypatch.setattr("jaxrl.sampling.client.LARGEST", 1 << 20)

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause)

    async def ask() -> None:
        client = Client()
        async with await asyncio.start_server(drip, "127.0.0.1") as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(ServerError, match=reason):
                await client.post(f"http://127.0.0.1:{port}", "/inference/v1/generate", {}, 0.8)
            await client.close()

    asyncio.run(asyncio.wait_for(ask(), 20))
