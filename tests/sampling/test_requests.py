"""What VLLMSampler does with requests and answers, against a server of our own."""

from __future__ import annotations

import _thread
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from jaxrl import config
from jaxrl.errors import InputError, RunError
from jaxrl.sampling.vllm import VLLMSampler, request_seed
from jaxrl.types import JsonObject, Prompt, Rollout, SamplingParams, silent
from json_server import serving
from vllm_stand_in import Nothing, Server

SAMPLING = SamplingParams(max_tokens=4, stop_ids=(1,))
PROMPTS = [Prompt(str(p), np.array([p], np.int32), "") for p in range(4)]


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as server:
        yield server


@pytest.fixture
def sampler(server: Server) -> Iterator[VLLMSampler]:
    section = config.Sampler(concurrency=1, patience_seconds=1)
    sampler = VLLMSampler([server.url], Nothing(), section, say=silent)
    sampler.publish(None, 0)
    yield sampler
    sampler.close()


def once(act: Callable[[], None]) -> tuple[list[str], Callable[[Rollout], Rollout]]:
    """A mark that acts at the first rollout, and the list of those that it has marked."""
    marked: list[str] = []

    def mark(rollout: Rollout) -> Rollout:
        if not marked:
            act()
        marked.append(rollout.prompt.id)
        return dataclasses.replace(rollout, score=1.0)

    return marked, mark


def test_requests_go_on_while_a_rollout_is_marked(server: Server, sampler: VLLMSampler) -> None:
    """The first mark lasts until all prompts were asked for, one after the other."""
    marked, mark = once(lambda: server.wait_for(len(PROMPTS)))
    groups = sampler.generate(PROMPTS, 1, SAMPLING, (1,), mark)
    assert server.asked == [0, 1, 2, 3] and marked == ["0", "1", "2", "3"]
    assert [[(r.prompt.id, r.score) for r in group] for group in groups] == [[(id_, 1.0)] for id_ in marked]


def test_prompts_that_are_asked_for_on_the_way_are_sampled_too(server: Server, sampler: VLLMSampler) -> None:
    """The second one is asked for while the first batch is under way, the others once it has ended; one is refused."""
    told = dict[int, list[str]]()
    server.answer = lambda body, answer: (400, {}) if body["token_ids"] == [3] else answer

    def more(place: int, group: Sequence[Rollout]) -> Sequence[Prompt]:
        told[place] = [rollout.prompt.id for rollout in group]
        return {0: PROMPTS[1:2], 1: PROMPTS[2:]}.get(place, ())

    groups = sampler.generate(PROMPTS[:1], 1, SAMPLING, (1,), on_group=more)
    assert [[rollout.prompt.id for rollout in group] for group in groups] == [["0"], ["1"], ["2"], []]
    assert told == {0: ["0"], 1: ["1"], 2: ["2"], 3: []}
    assert sorted(server.asked) == [0, 1, 2, 3] and "3" in sampler.dropped


def test_no_request_has_more_samples_than_its_answer_can_hold(
    server: Server, sampler: VLLMSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample g has the seed of its prompt plus g, as vLLM numbers those of one request; what fails comes again."""
    monkeypatch.setattr("jaxrl.sampling.vllm.AT_ONCE", 3 * SAMPLING.max_tokens)
    asked, failed = list[tuple[int, int]](), list[int]()

    def answer(body: JsonObject, whole: JsonObject) -> JsonObject | tuple[int, JsonObject]:
        sampling = body["sampling_params"]
        if sampling["n"] == 2 and not failed:
            failed.append(1)
            return 503, {}
        asked.append((sampling["seed"], sampling["n"]))
        for choice in whole["choices"]:
            choice["token_ids"] = [2 + sampling["seed"] % 97 + choice["index"], 1]
            choice["logprobs"]["content"] = [{"logprob": -0.25}] * 2
            choice["weight_versions"][0]["end"] = 2
            choice["finish_reason"] = "stop"
        return whole

    server.answer = answer
    (group,) = sampler.generate(PROMPTS[1:2], 8, SAMPLING, (1,))
    seed = request_seed((1, 0))
    assert failed and set(asked) == {(seed, 3), (seed + 3, 3), (seed + 6, 2)}
    parts = [(seed + first, g) for first, n in ((0, 3), (3, 3), (6, 2)) for g in range(n)]
    assert [int(r.tokens[0]) for r in group] == [2 + first % 97 + g for first, g in parts]


@pytest.mark.parametrize("error", [InputError, RunError, KeyError, KeyboardInterrupt])
def test_what_a_mark_raises_ends_the_batch_and_nothing_else(
    server: Server, sampler: VLLMSampler, error: type[BaseException]
) -> None:
    def fail() -> None:
        raise error("of the mark")

    _, mark = once(fail)
    with pytest.raises(error, match="of the mark"):
        sampler.generate(PROMPTS, 1, SAMPLING, (1,), mark)
    assert len(server.asked) == len(set(server.asked))  # nothing is asked for again
    assert all(sampler.generate(PROMPTS, 1, SAMPLING, (2,)))


def test_a_prompt_that_fails_again_and_again_is_not_asked_for_without_end(
    server: Server, sampler: VLLMSampler
) -> None:
    """What arrived before it is marked."""
    server.fails = {2}
    marked, mark = once(lambda: server.wait_for(3))
    with pytest.raises(RunError, match=r"answered 503: \{\}, at attempt 2; see the server's log"):
        sampler.generate(PROMPTS, 1, SAMPLING, (1,), mark)
    assert marked == ["0", "1"] and server.asked == [0, 1, 2, 2]


def test_a_server_that_cuts_completions_is_an_error_of_the_input(
    server: Server, sampler: VLLMSampler
) -> None:
    server.completion, server.reason = [7, 7], "length"
    with pytest.raises(
        InputError, match=r"cut a completion at 1 \+ 2 tokens; start it with --max-model-len 5"
    ):
        sampler.generate(PROMPTS[:1], 1, SAMPLING, (1,))
    assert server.asked == [0]


def test_an_interruption_loses_no_answer(server: Server, sampler: VLLMSampler) -> None:
    called = list[str]()

    def keep(rollout: Rollout) -> Rollout:
        called.append(rollout.prompt.id)
        if len(called) == 1:
            server.wait_for(len(PROMPTS))
            time.sleep(0.5)  # the other answers come
            _thread.interrupt_main()
        return rollout

    with pytest.raises(KeyboardInterrupt):
        sampler.generate(PROMPTS, 1, SAMPLING, (1,), keep)
    assert sorted(called) == [prompt.id for prompt in PROMPTS]


def test_a_server_to_which_another_run_has_published_ends_the_run(
    server: Server, sampler: VLLMSampler
) -> None:
    """Whatever number its version has: what it completes is not this run's, and publishing again would spoil its."""
    server.weights = "0123abcd:0"
    taken = rf"{server.url}: another run samples there; wait for it, or name other"
    with pytest.raises(InputError, match=taken):
        sampler.generate(PROMPTS, 1, SAMPLING, (1,))
    with pytest.raises(InputError, match=taken):
        sampler.publish(None, 1)
    assert server.weights == "0123abcd:0"
