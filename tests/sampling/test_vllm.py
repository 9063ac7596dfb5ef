"""Sampling by real vLLM servers on this machine: `make test-vllm`."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run

from jaxrl.errors import InputError
from jaxrl.models import Model, initialise, load, save
from jaxrl.sampling import servers
from jaxrl.sampling.sampler import Prompt, Rollout, SamplingParams
from jaxrl.sampling.vllm import VLLMSampler

pytestmark = pytest.mark.vllm
VLLM = os.environ.get("VLLM", ".venv-vllm/bin/vllm")
SAMPLING = SamplingParams(max_tokens=24, stop_ids=(1,))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    folder = tiny_run.make_base(
        tmp_path_factory.mktemp("base"), head_dim=32
    )  # vLLM on a CPU has no smaller one
    return folder, load(folder)


@pytest.fixture(scope="module")
def untied(model: tuple[Path, Model], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    folder = tmp_path_factory.mktemp("untied") / "base"
    config = dataclasses.replace(model[1].config, tied=False)
    save(Model(config, initialise(config, 0)), folder)
    return folder, load(folder)


@pytest.fixture(scope="module")
def running(
    model: tuple[Path, Model], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[servers.Server]]:
    logs = tmp_path_factory.mktemp("servers")
    with servers.running(
        2, VLLM, str(model[0]), logs, dtype="float32", max_tokens=64, on_cpu=True
    ) as started:
        yield started


def make_sampler(urls: list[str], model: Model, folder: Path, **options) -> VLLMSampler:
    return VLLMSampler(urls, model.config, folder, dtype="float32", say=lambda _: None, **options)


@pytest.fixture
def sampler(running: list[servers.Server], model: tuple[Path, Model], tmp_path: Path) -> VLLMSampler:
    sampler = make_sampler([server.url for server in running], model[1], tmp_path)
    sampler.publish(model[1].params, 0)
    return sampler


def make_prompts(count: int, length: int = 9) -> list[Prompt]:
    return [
        Prompt(str(i), np.random.default_rng(i).integers(2, 9, length).astype(np.int32), "")
        for i in range(count)
    ]


def random_params(model: Model, seed: int):
    """Far from uniform, so that log-probs say whose they are."""
    return initialise(model.config, seed, scale=0.1)


def logprobs_of(model: Model, params, rollout: Rollout, temperature: float = 1.0) -> np.ndarray:
    ids = np.append(rollout.prompt.tokens, rollout.tokens)
    logp = jax.nn.log_softmax(model.logits(params, ids[None])[0] / temperature)
    at = np.arange(len(rollout.prompt.tokens) - 1, len(ids) - 1)
    return np.asarray(logp[at, rollout.tokens])


def assert_from(model: Model, params, groups: list[list[Rollout]], temperature: float = 1.0) -> None:
    for rollout in [rollout for group in groups for rollout in group]:
        expected = logprobs_of(model, params, rollout, temperature)
        np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_trainers(
    sampler: VLLMSampler, model: tuple[Path, Model], temperature: float
) -> None:
    sampling = dataclasses.replace(SAMPLING, temperature=temperature)
    groups = sampler.generate(make_prompts(6), 3, sampling, (1,))
    assert [len(group) for group in groups] == [3] * 6
    assert_from(model[1], model[1].params, groups, temperature)
    for rollout in [rollout for group in groups for rollout in group]:
        ended = rollout.tokens[-1] == 1
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert ended or len(rollout.tokens) == 24
        assert rollout.version == 0 and 1 not in rollout.tokens[:-1]


def test_equal_seeds_give_equal_answers(sampler: VLLMSampler) -> None:
    ids = lambda groups: [[rollout.tokens.tolist() for rollout in group] for group in groups]  # noqa: E731
    params = SamplingParams(max_tokens=24)  # nothing stops: long enough to differ
    prompts = make_prompts(5)
    one, two, other = (ids(sampler.generate(prompts, 4, params, seed)) for seed in ((1, 2), (1, 2), (1, 3)))
    assert one == two != other
    assert len({tuple(tokens) for tokens in one[0]}) > 1


def test_greedy(sampler: VLLMSampler, model: tuple[Path, Model]) -> None:
    groups = sampler.generate(make_prompts(3), 2, dataclasses.replace(SAMPLING, temperature=0.0), (1,))
    for a, b in groups:
        assert a.tokens.tolist() == b.tokens.tolist()
        ids = np.append(a.prompt.tokens, a.tokens)
        best = np.argmax(np.asarray(model[1].logits(model[1].params, ids[None])[0]), axis=-1)
        np.testing.assert_array_equal(a.tokens, best[len(a.prompt.tokens) - 1 : -1])


def test_published_weights_answer_and_no_prefix_of_the_old_is_used(
    sampler: VLLMSampler, model: tuple[Path, Model]
) -> None:
    check_publishing(sampler, model[1])


def check_publishing(sampler: VLLMSampler, model: Model) -> None:
    """The prompts are long and the same ones; a cached block of the old weights would show."""
    prompts = make_prompts(3, length=40)
    for version in (1, 2, 3):
        params = random_params(model, version)
        sampler.publish(params, version)
        groups = sampler.generate(prompts, 2, SAMPLING, (version,))
        assert all(rollout.version == version for group in groups for rollout in group)
        assert_from(model, params, groups)
        old = logprobs_of(model, random_params(model, version - 1), groups[0][0])
        assert abs(old - groups[0][0].logprobs).max() > 0.1


def test_rollouts_are_told_of_as_they_come(sampler: VLLMSampler) -> None:
    seen: list[str] = []
    groups = sampler.generate(
        make_prompts(8), 2, SAMPLING, (5,), lambda rollout: seen.append(rollout.prompt.id)
    )
    assert sorted(seen) == sorted(rollout.prompt.id for group in groups for rollout in group)


def test_a_prompt_too_long_is_named_and_left_out(sampler: VLLMSampler) -> None:
    prompts = [*make_prompts(2), Prompt("long", np.full(80, 5, np.int32), "")]
    groups = sampler.generate(prompts, 2, SAMPLING, (6,))
    assert [len(group) for group in groups] == [2, 2, 0]
    assert list(sampler.dropped) == ["long"] and "HTTP 400" in sampler.dropped["long"]
    with pytest.raises(InputError, match="refused every prompt; the last: HTTP 400"):
        sampler.generate(prompts[2:], 2, SAMPLING, (6,))


def test_before_anything_is_published(
    running: list[servers.Server], model: tuple[Path, Model], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no weights"):
        make_sampler([running[0].url], model[1], tmp_path).generate(make_prompts(1), 1, SAMPLING, (1,))


def test_nobody_there(model: tuple[Path, Model], tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{servers.free_port()}"
    with pytest.raises(InputError, match=rf"{url}: no answer .*is a vLLM server of this run there"):
        make_sampler([url], model[1], tmp_path)


def test_kill_9_of_one_server_loses_nothing(model: tuple[Path, Model], tmp_path: Path) -> None:
    """Its requests move to the other; when it is started again it has to take the newest weights first."""
    params = random_params(model[1], 9)
    options = {"dtype": "float32", "max_tokens": 64, "on_cpu": True}
    with servers.running(2, VLLM, str(model[0]), tmp_path / "logs", **options) as started:
        urls = [server.url for server in started]
        sampler = make_sampler(urls, model[1], tmp_path / "weights", concurrency=4)
        sampler.publish(params, 4)
        prompts, seen = make_prompts(48), []

        def kill(rollout: Rollout) -> None:
            seen.append(rollout)
            if len(seen) == 8:
                os.killpg(started[0].process.pid, signal.SIGKILL)

        long = SamplingParams(max_tokens=50)
        groups = sampler.generate(prompts, 4, long, (7,), kill)
        assert started[0].process.poll() is not None
        assert [len(group) for group in groups] == [4] * 48 and len(seen) == 48 * 4
        assert_from(model[1], params, groups[-3:])

        port = int(started[0].url.rsplit(":", 1)[1])
        again = servers.start(VLLM, str(model[0]), tmp_path / "logs" / "again.log", port=port, **options)
        try:
            servers.wait(again, 300)
            groups = sampler.generate(prompts, 4, SAMPLING, (8,))
            assert_from(model[1], params, groups)
        finally:
            again.kill()


def test_untied_weights_and_then_no_server_left(untied: tuple[Path, Model], tmp_path: Path) -> None:
    options = {"dtype": "float32", "max_tokens": 64, "on_cpu": True}
    with servers.running(1, VLLM, str(untied[0]), tmp_path / "logs", **options) as started:
        sampler = make_sampler([started[0].url], untied[1], tmp_path / "weights", patience=3)
        check_publishing(sampler, untied[1])
        os.killpg(started[0].process.pid, signal.SIGKILL)
        with pytest.raises(InputError, match=r"was not back after 3 s\. Start it again"):
            sampler.generate(make_prompts(4), 2, SAMPLING, (1,))
        with pytest.raises(InputError, match="was not back"):
            sampler.publish(untied[1].params, 4)
