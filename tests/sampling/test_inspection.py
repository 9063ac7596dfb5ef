"""What a server has to be, at the start and whenever it comes back; the servers here are no real ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from jaxrl import config
from jaxrl.errors import InputError, RunError
from jaxrl.sampling.answers import Needs
from jaxrl.sampling.vllm import VLLMSampler, never, version_name
from jaxrl.types import JsonObject, Prompt, SamplingParams
from json_server import serving
from vllm_stand_in import DEFAULT, Nothing, Server

NEEDS = Needs(vocab_size=9, max_tokens=59, dtype="float32")
SAMPLING = SamplingParams(max_tokens=4, stop_ids=(1,))
PROMPTS = [Prompt(str(p), np.array([p], np.int32), "") for p in range(6)]


@pytest.fixture(scope="module")
def running() -> Iterator[list[Server]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serving(Server())) for _ in range(2)]


@pytest.fixture
def servers(running: list[Server]) -> list[Server]:
    """As they were when they were started."""
    for server in running:
        server.start_anew()
        server.asked.clear()
        server.answer = lambda _, answer: answer
    return running


class Sampler(VLLMSampler):
    """One that keeps what it says."""

    def __init__(self, servers: list[Server], patience: int = 2, stop_once_said: bool = False) -> None:
        self.said: list[str] = []

        def stopping() -> bool:
            return stop_once_said and bool(self.said)

        section = config.Sampler(concurrency=4, patience_seconds=patience)
        urls = [server.url for server in servers]
        super().__init__(urls, Nothing(), section, never, self.said.append, NEEDS, stopping)

    def served(self) -> set[str]:
        """The servers of a batch, which is complete."""
        groups = self.generate(PROMPTS, 2, SAMPLING, (1,))
        assert [len(group) for group in groups] == [2] * len(PROMPTS)
        return {rollout.server for group in groups for rollout in group}


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ({"positions": 40}, "takes 40 tokens of a prompt and its completion, .* 59; start it with --max-model-len 59"),
        ({"dtype": "torch.bfloat16"}, "computes in bfloat16, and the trainer in float32; start it with --dtype"),
        ({"mode": "raw_logprobs"}, "gives log-probs from before sampling; start it with --logprobs-mode processed"),
        ({"vocab_size": 8}, r"does not serve the recipe's model \(HTTP 400: .*8 .* out of the vocabulary"),
    ],
)  # fmt: skip
def test_what_a_server_cannot_serve_is_named_at_the_start(
    wrong: JsonObject, remedy: str, servers: list[Server]
) -> None:
    servers[0].start_anew(**wrong)
    with pytest.raises(InputError, match=f"{servers[0].url} {remedy}"):
        Sampler(servers)


def test_the_mode_of_log_probs_is_measured_too(servers: list[Server]) -> None:
    servers[0].start_anew(mode="raw_logprobs", logprobs_mode="processed_logprobs")
    with pytest.raises(InputError, match="log-probs from before sampling"):
        Sampler(servers)


def test_a_server_under_two_names_is_one_server(servers: list[Server]) -> None:
    named = config.Sampler(concurrency=4)
    urls = [servers[0].url, servers[0].url.replace("127.0.0.1", "localhost")]
    with pytest.raises(InputError, match=f"{urls[1]} and {urls[0]} are the same server; name it once"):
        VLLMSampler(urls, Nothing(), named)


def test_a_server_that_a_killed_run_left_waiting_is_not_waited_for(servers: list[Server]) -> None:
    servers[0].paused = True
    sampler = Sampler(servers)
    sampler.publish(None, 0)
    assert sampler.served() == {server.url for server in servers}
    sampler.close()


@pytest.mark.parametrize("published", [False, True])
def test_a_server_that_was_started_anew_unseen_is_inspected_before_it_gets_weights(
    servers: list[Server], published: bool
) -> None:
    """Before the first batch or between two, with other options; it is left out until it is right."""
    sampler, (one, other) = Sampler(servers), servers
    if published:
        sampler.publish(None, 0)
        assert sampler.served() == {one.url, other.url}
    one.start_anew(mode="raw_logprobs")
    for version in (1, 2):
        sampler.publish(None, version)
        assert sampler.served() == {other.url}
    (line,) = sampler.said
    assert line.startswith(f"{one.url} gives log-probs from before sampling") and one.weights == DEFAULT
    one.start_anew()
    sampler.publish(None, 3)
    assert sampler.served() == {one.url, other.url} and one.weights == version_name(3)
    sampler.close()


def test_a_server_that_was_started_anew_in_a_batch_is_inspected_too(servers: list[Server]) -> None:
    """Its answers have another name of their weights, or it refuses every prompt; neither counts."""
    sampler, (one, other) = Sampler(servers), servers
    sampler.publish(None, 0)

    def start_anew(_: JsonObject, answer: JsonObject) -> JsonObject:
        one.start_anew()
        one.answer = lambda _, answer: answer
        answer["choices"][0]["weight_versions"][0]["version"] = DEFAULT
        return answer

    one.answer = start_anew
    assert sampler.served() <= {one.url, other.url} and not sampler.dropped
    assert f"{one.url}: it was started anew: it has weights 'default'; waiting for it" in sampler.said

    one.answer = lambda *_: (400, {"error": "longer than the maximum model length of 40"})
    sampler.publish(None, 1)
    one.start_anew(positions=40)
    assert sampler.served() == {other.url} and not sampler.dropped
    sampler.publish(None, 2)  # the other one may have finished before the inspection
    (line,) = [line for line in sampler.said if line.startswith(f"{one.url} takes 40 tokens")]
    assert line.endswith("; it is left out until it is right") and one.weights == DEFAULT
    sampler.close()


@pytest.mark.parametrize("seen", [False, True])
def test_the_only_server_that_came_back_wrong_ends_the_run(seen: bool, servers: list[Server]) -> None:
    sampler, one = Sampler(servers[:1], patience=60), servers[0]
    sampler.publish(None, 0)
    one.start_anew(positions=40)
    with pytest.raises(InputError, match=f"{one.url} takes 40 tokens .* start it with --max-model-len 59"):
        if seen:
            one.answer = lambda *_: (503, {})
            sampler._current[one.url] = None  # as after a failure
            sampler.served()
        else:
            sampler.publish(None, 1)
    assert one.weights == DEFAULT and not one.asked
    sampler.close()


def test_a_prompt_is_left_out_only_if_every_server_refuses_it(servers: list[Server]) -> None:
    sampler, (one, other) = Sampler(servers), servers
    sampler.publish(None, 0)
    one.answer = lambda *_: (400, {"error": "not today"})
    assert sampler.served() == {other.url} and not sampler.dropped and not sampler.said
    assert len(one.asked) <= len(PROMPTS)

    other.answer = lambda body, answer: (400, {"error": "bad"}) if body["token_ids"] == [3] else answer
    groups = sampler.generate(PROMPTS, 2, SAMPLING, (2,))
    assert [len(group) for group in groups] == [2, 2, 2, 0, 2, 2] and list(sampler.dropped) == ["3"]
    (line,) = sampler.said
    assert line.startswith("prompt 3 was refused and is left out: HTTP 400: ")

    one.answer = other.answer = lambda *_: (413, {"error": "too large"})
    with pytest.raises(
        InputError, match=r"the servers refused every prompt; the last: HTTP 413: .*too large"
    ):
        sampler.generate(PROMPTS, 2, SAMPLING, (3,))
    sampler.close()


@pytest.mark.parametrize("status", [302, 401, 403, 404, 422, 429])
def test_other_refusals_are_not_of_a_prompt(status: int, servers: list[Server]) -> None:
    """One that cannot change ends the batch at once, another one after the patience."""
    sampler, (one, _) = Sampler(servers[:1], patience=1), servers
    sampler.publish(None, 0)
    one.answer = lambda *_: (status, {"detail": "why"})
    reason = "another API key" if status == 401 else f"/inference/v1/generate answered {status}: .*why"
    with pytest.raises(RunError, match=f"{one.url}: .*{reason}"):
        sampler.generate(PROMPTS, 2, SAMPLING, (1,))
    assert not sampler.dropped
    assert any("waiting for it" in line for line in sampler.said) == (status in (302, 401, 429))
    sampler.close()


@pytest.mark.parametrize("when", ["sampling", "publishing"])
def test_a_run_that_is_to_stop_waits_for_no_server(when: str, servers: list[Server]) -> None:
    sampler, one = Sampler(servers[:1], patience=3600, stop_once_said=True), servers[0]
    sampler.publish(None, 0)
    if when == "sampling":
        one.answer = lambda *_: (503, {})
    else:
        one.broken.add("/pause")
    with pytest.raises(RunError, match=r"it was not back after \d s"):
        if when == "sampling":
            sampler.served()
        sampler.publish(None, 1)
    sampler.close()
