"""Sampling by real vLLM servers on this machine: `make test-vllm`."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import pytest

import tiny_run
from jaxrl import config
from jaxrl.errors import InputError, RunError
from jaxrl.loop import train
from jaxrl.models import Model, initialize, load, save
from jaxrl.models.decoder import Params
from jaxrl.replay import open_replay
from jaxrl.rope import RopeScaling
from jaxrl.sampling import servers
from jaxrl.sampling.answers import Needs
from jaxrl.sampling.client import api_key
from jaxrl.sampling.prefetch import Prefetch, Sampled
from jaxrl.sampling.transports import nccl
from jaxrl.sampling.transports.files import Files
from jaxrl.sampling.transports.nccl import NCCL, Communicator
from jaxrl.sampling.vllm import Restart, VLLMSampler, never
from jaxrl.types import Groups, OnUpdate, Prompt, Rollout, SamplingParams, Say, silent

pytestmark = pytest.mark.vllm
VLLM = os.environ.get("VLLM", ".venv-vllm/bin/vllm")
SAMPLING = SamplingParams(max_tokens=24, stop_ids=(1,))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    # vLLM on a CPU has no smaller head_dim
    folder = tiny_run.make_base(tmp_path_factory.mktemp("base"), head_dim=32)
    return folder, load(folder)


@pytest.fixture(scope="module")
def untied(model: tuple[Path, Model], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    folder = tmp_path_factory.mktemp("untied") / "base"
    config = dataclasses.replace(model[1].config, tied=False)
    save(Model(config, initialize(config, 0)), folder)
    return folder, load(folder)


def settings(folder: Path, backend: str = "jaxrl_file") -> servers.Settings:
    return servers.Settings(VLLM, str(folder), "float32", max_tokens=64, backend=backend)


@pytest.fixture(scope="module")
def running(
    model: tuple[Path, Model], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[servers.Server]]:
    with servers.running(2, settings(model[0]), tmp_path_factory.mktemp("servers")) as started:
        yield started


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes all samplers of a test, whose servers may then be another process's."""
    opened, init = list[VLLMSampler](), VLLMSampler.__init__

    def remembered(self: VLLMSampler, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        opened.append(self)

    monkeypatch.setattr(VLLMSampler, "__init__", remembered)
    yield
    for sampler in opened:
        sampler.close()


def make_sampler(
    urls: list[str],
    model: Model,
    folder: Path,
    section: config.Sampler | None = None,
    restart: Restart = never,
    say: Say = silent,
) -> VLLMSampler:
    needs = Needs(model.config.vocab_size, 59, "float32")
    return VLLMSampler(urls, Files(model.config, folder, "float32"), section, restart, say, needs)


@pytest.fixture
def sampler(running: list[servers.Server], model: tuple[Path, Model], tmp_path: Path) -> VLLMSampler:
    sampler = make_sampler([server.url for server in running], model[1], tmp_path)
    sampler.publish(model[1].params, 0)
    return sampler


def make_prompts(count: int, length: int = 9) -> list[Prompt]:
    ids = [np.random.default_rng(i).integers(2, 9, length).astype(np.int32) for i in range(count)]
    return [Prompt(str(i), row, "") for i, row in enumerate(ids)]


def random_params(model: Model, seed: int) -> Params:
    """Far from uniform, so that log-probs say whose they are."""
    return initialize(model.config, seed, scale=0.1)


def logprobs_of(model: Model, params: Params, rollout: Rollout, temperature: float = 1.0) -> np.ndarray:
    ids = np.append(rollout.prompt.tokens, rollout.tokens)
    logp = jax.nn.log_softmax(model.logits(params, ids[None])[0] / temperature)
    at = np.arange(len(rollout.prompt.tokens) - 1, len(ids) - 1)
    return np.asarray(logp[at, rollout.tokens])


def assert_from(
    model: Model, params: Params, groups: Groups, temperature: float = 1.0, atol: float = 1e-5
) -> None:
    for rollout in [rollout for group in groups for rollout in group]:
        expected = logprobs_of(model, params, rollout, temperature)
        np.testing.assert_allclose(rollout.logprobs, expected, rtol=1e-5, atol=atol)


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


LLAMA3 = RopeScaling("llama3", 8.0, original=16, low=1.0, high=4.0)
YARN = RopeScaling("yarn", 4.0, original=24, beta_fast=32.0, beta_slow=1.0, attention_factor=1.3)
LINEAR = RopeScaling("linear", 4.0)


@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        pytest.param("llama", LLAMA3, marks=pytest.mark.slow, id="llama3"),
        pytest.param("qwen3", YARN, id="yarn"),
        pytest.param("qwen2", LINEAR, marks=pytest.mark.slow, id="linear"),
    ],
)
def test_logprobs_are_the_trainers_with_scaled_rope(
    family: str, scaling: RopeScaling, model: tuple[Path, Model], tmp_path: Path
) -> None:
    """YaRN and linear: beyond the positions that config.json states. A server of another scaling is refused."""
    stated = 64 if scaling is LLAMA3 else 24
    changes = {
        "family": family,
        "tied": False,
        "max_positions": stated,
        "rope_theta": 1e4,
        "rope_scaling": scaling,
    }
    scaled = dataclasses.replace(model[1].config, **changes)
    ours = Model(scaled, initialize(scaled, 0, scale=0.3))
    save(ours, tmp_path / "model")
    beyond = dataclasses.replace(settings(tmp_path / "model"), beyond=stated < 64)
    with servers.running(1, beyond, tmp_path / "servers") as started:
        urls = [server.url for server in started]
        sampler = make_sampler(urls, ours, tmp_path / "weights")
        sampler.publish(ours.params, 0)
        groups = sampler.generate(make_prompts(3, length=20), 2, SamplingParams(max_tokens=40), (1,))
        assert_from(ours, ours.params, groups, atol=1e-4)
        plain = dataclasses.replace(ours, config=dataclasses.replace(scaled, rope_scaling=None))
        with pytest.raises(AssertionError):
            assert_from(plain, ours.params, groups, atol=1e-2)
        with pytest.raises(InputError, match="rope_parameters"):
            make_sampler(urls, plain, tmp_path / "weights")


def test_equal_seeds_give_equal_answers(sampler: VLLMSampler) -> None:
    def ids(groups: Groups) -> list[list[list[int]]]:
        return [[rollout.tokens.tolist() for rollout in group] for group in groups]

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


def test_rollouts_are_given_as_they_come(sampler: VLLMSampler) -> None:
    seen: list[str] = []

    def mark(rollout: Rollout) -> Rollout:
        seen.append(rollout.prompt.id)
        return dataclasses.replace(rollout, score=float(len(rollout.tokens)))

    groups = [r for group in sampler.generate(make_prompts(8), 2, SAMPLING, (5,), mark) for r in group]
    assert sorted(seen) == sorted(rollout.prompt.id for rollout in groups)
    assert all(rollout.score == len(rollout.tokens) for rollout in groups)
    assert len({rollout.server for rollout in groups}) == 2  # both took part


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
    """Its requests move to the other; it is started again and has to take the newest weights first."""
    params = random_params(model[1], 9)
    with servers.running(2, settings(model[0]), tmp_path / "logs") as started:
        own = {server.url: server for server in started}

        def restart(url: str, unwell: float) -> bool:
            return own[url].restart(unwell)

        section = config.Sampler(concurrency=4)
        sampler = make_sampler(list(own), model[1], tmp_path / "weights", section, restart)
        sampler.publish(params, 4)
        prompts, seen, killed = make_prompts(48), [], started[0].process

        def kill(rollout: Rollout) -> Rollout:
            seen.append(rollout)
            if len(seen) == 8:
                os.killpg(killed.pid, signal.SIGKILL)
            return rollout

        groups = sampler.generate(prompts, 4, SamplingParams(max_tokens=50), (7,), kill)
        assert killed.poll() is not None
        assert [len(group) for group in groups] == [4] * 48 and len(seen) == 48 * 4
        assert_from(model[1], params, groups[-3:])

        servers.wait(started[0], 300)
        assert started[0].process is not killed
        for again in range(50):  # the other does not wait while it loads
            groups = sampler.generate(prompts, 4, SAMPLING, (8, again))
            assert_from(model[1], params, groups[::7])
            served = {rollout.server for group in groups for rollout in group}
            if served == set(own):
                break
        assert served == set(own)


def test_untied_weights_and_then_no_server_left(untied: tuple[Path, Model], tmp_path: Path) -> None:
    with servers.running(1, settings(untied[0]), tmp_path / "logs") as started:
        section = config.Sampler(patience_seconds=3)
        sampler = make_sampler([started[0].url], untied[1], tmp_path / "weights", section)
        check_publishing(sampler, untied[1])
        os.killpg(started[0].process.pid, signal.SIGKILL)
        with pytest.raises(RunError, match=r"was not back after 3 s\. Start it again"):
            sampler.generate(make_prompts(4), 2, SAMPLING, (1,))
        with pytest.raises(RunError, match="was not back"):
            sampler.publish(untied[1].params, 4)


def test_a_server_that_hangs_without_dying_loses_nothing(
    running: list[servers.Server], model: tuple[Path, Model], tmp_path: Path
) -> None:
    """Its requests time out and go to the other; when it goes on it serves again."""
    said: list[str] = []
    urls = [server.url for server in running]
    sampler = make_sampler(urls, model[1], tmp_path, config.Sampler(request_seconds=3), say=said.append)
    sampler.publish(model[1].params, 3)
    os.killpg(running[0].process.pid, signal.SIGSTOP)
    try:
        groups = sampler.generate(make_prompts(12), 2, SAMPLING, (9,))
    finally:
        os.killpg(running[0].process.pid, signal.SIGCONT)
    assert [len(group) for group in groups] == [2] * 12
    assert {rollout.server for group in groups for rollout in group} == {urls[1]}
    assert any(urls[0] in line and "no answer (ReadTimeout)" in line for line in said)
    groups = sampler.generate(make_prompts(40), 2, SAMPLING, (10,))
    assert_from(model[1], model[1].params, groups)
    assert {rollout.server for group in groups for rollout in group} == set(urls)


def test_a_server_with_other_options_is_refused_whenever_it_comes(
    model: tuple[Path, Model], tmp_path: Path
) -> None:
    """Started by hand with other options between two batches, and before the start."""
    sampling = dataclasses.replace(SAMPLING, temperature=1.5)
    with servers.running(1, settings(model[0]), tmp_path / "logs") as started:
        server = started[0]
        sampler = make_sampler([server.url], model[1], tmp_path / "weights")
        sampler.publish(model[1].params, 0)
        assert_from(model[1], model[1].params, sampler.generate(make_prompts(2), 2, sampling, (1,)), 1.5)

        def start_with(option: str, value: str) -> None:
            server.kill()
            server.arguments[server.arguments.index(option) + 1] = value
            servers.begin(server)
            servers.wait(server, 300)

        start_with("--logprobs-mode", "raw_logprobs")
        with pytest.raises(InputError, match="start it with --logprobs-mode processed_logprobs"):
            sampler.publish(model[1].params, 1)
        sampler.close()
        server.arguments[server.arguments.index("--logprobs-mode") + 1] = "processed_logprobs"
        start_with("--max-model-len", "40")
        with pytest.raises(InputError, match=r"takes 40 tokens .* start it with --max-model-len 59"):
            make_sampler([server.url], model[1], tmp_path / "weights")


def test_an_update_that_a_killed_run_left_open_is_done_again(
    running: list[servers.Server], model: tuple[Path, Model], tmp_path: Path
) -> None:
    headers = {"Authorization": f"Bearer {api_key()}"}
    for route in ("/pause?mode=keep", "/start_weight_update"):
        assert httpx.post(running[0].url + route, headers=headers, timeout=60).status_code == 200
    sampler = make_sampler([running[0].url], model[1], tmp_path)
    params = random_params(model[1], 3)
    sampler.publish(params, 2)
    assert_from(model[1], params, sampler.generate(make_prompts(4), 2, SAMPLING, (1,)))
    sampler.close()


def test_another_model_is_refused(
    running: list[servers.Server], model: tuple[Path, Model], tmp_path: Path
) -> None:
    deeper = dataclasses.replace(model[1].config, layers=3, vocab_size=10)
    with pytest.raises(InputError) as caught:
        make_sampler([running[0].url], Model(deeper, None), tmp_path)
    message = str(caught.value)
    assert message.startswith(running[0].url)
    assert "has another model: vocab_size is 9, not 10, num_hidden_layers is 2, not 3" in message


@pytest.mark.parametrize("on_update", ["keep", "drain"])
def test_weights_change_while_requests_are_under_way(
    running: list[servers.Server], model: tuple[Path, Model], tmp_path: Path, on_update: OnUpdate
) -> None:
    """Each token is of one policy: with "drain" all of a completion, with "keep" all after the change."""
    urls = [server.url for server in running]
    # few requests at once, so that most of them begin after the change
    section = config.Sampler(on_update=on_update, concurrency=8)
    sampler = make_sampler(urls, model[1], tmp_path, section)
    old, new = random_params(model[1], 1), random_params(model[1], 2)
    sampler.publish(old, 6)
    begun, published = threading.Event(), threading.Event()

    def mark(rollout: Rollout) -> Rollout:
        begun.set()
        return rollout

    def change() -> None:
        begun.wait(60)
        sampler.publish(new, 7)
        published.set()

    changing = threading.Thread(target=change)
    changing.start()
    groups = sampler.generate(make_prompts(150), 4, SamplingParams(max_tokens=54), (3,), mark)
    changing.join()
    assert published.is_set() and {len(group) for group in groups} == {4}
    cut = set()
    for rollout in (rollout for group in groups[::7] for rollout in group):
        differences = [logprobs_of(model[1], params, rollout) - rollout.logprobs for params in (old, new)]
        of_old, of_new = np.abs(differences) < 1e-5
        first_new = next((t for t in range(54) if of_new[t:].all()), 54)
        assert of_old[:first_new].all()
        assert rollout.version == (6 if first_new else 7)
        cut.add(0 < first_new < 54)
    versions = {rollout.version for group in groups for rollout in group}
    assert versions == {6, 7}  # it did change on the way
    if on_update == "drain":
        assert cut == {False}


def test_one_batch_ahead(
    running: list[servers.Server], model: tuple[Path, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates go on while the next batch is being sampled, by weights one step old."""
    taken, updates = [], []
    take, publish = Prefetch.take, VLLMSampler.publish

    def recorded(self: Prefetch[list[list[Rollout]]], step: int) -> Sampled[list[list[Rollout]]]:
        taken.append(take(self, step))
        return taken[-1]

    def timed(self: VLLMSampler, params: Params, version: int) -> None:
        updates.append(time.monotonic())  # the end of the update before it
        publish(self, params, version)

    monkeypatch.setattr(Prefetch, "take", recorded)
    monkeypatch.setattr(VLLMSampler, "publish", timed)
    rollout = {"engine": "vllm", "prompts": 32, "samples": 8, "max_tokens": 24}
    section = {"max_staleness": 1, "folder": str(tmp_path / "shm")}
    values = {f"rollout.{name}": value for name, value in rollout.items()}
    values |= {f"sampler.{name}": value for name, value in section.items()}
    values |= {"sampler.urls": [server.url for server in running], "optimizer.minibatch_prompts": 8}
    values |= {"packing.bucket_tokens": 16, "run.steps": 5}
    train(config.load(tiny_run.write_recipe(tmp_path, model[0], **values)), say=silent)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    staleness = [row["sampler/staleness"] for row in rows]
    assert staleness[0] == 0 and all(0 < s <= 1 for s in staleness[1:])
    assert rows[0]["sampler/logprob_diff_max"] < 1e-5 and rows[1]["sampler/logprob_diff_max"] is None
    # batch s + 1 was begun before the update of batch s had ended; updates[0] is of before the first step
    assert [batch.began < ended for batch, ended in zip(taken[1:], updates[1:], strict=False)] == [True] * 4
    with open_replay(
        tmp_path / "run", (), 0.0, silent
    ) as again:  # from answers whose log-probs are the servers'
        assert [step.findings for step in again.steps(None)] == [[]] * 5


def test_groups_out_of_the_band_are_replaced(
    running: list[servers.Server], model: tuple[Path, Model], tmp_path: Path
) -> None:
    values = {"groups.filter": "refill", "groups.max_rounds": 3, "groups.keep": [0.0, 0.6], "run.steps": 3}
    values |= {"sampler.folder": str(tmp_path / "shm"), "rollout.max_tokens": 16, "packing.bucket_tokens": 16}
    recipe = tiny_run.write_recipe(tmp_path, model[0], **values)
    urls = ",".join(server.url for server in running)
    process = tiny_run.jaxrl("train", recipe, "--samplers", urls, JAXRL_API_KEY=api_key())
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    for row in tiny_run.metrics(tmp_path / "run"):
        assert row["groups/sampled"] > 8 >= row["groups/trained"] and row["groups/rounds"] <= 3, said
    assert "all 3 steps follow" in tiny_run.finish("replay", tmp_path / "run", "--all")


def test_two_trainer_processes(
    running: list[servers.Server], model: tuple[Path, Model], tmp_path: Path
) -> None:
    """The first one calls the servers; the parameters that it publishes are sharded over both."""
    values = {"rollout.max_tokens": 16, "packing.bucket_tokens": 16, "sampler.folder": str(tmp_path / "shm")}
    recipe = tiny_run.write_recipe(tmp_path, model[0], **values, **{"run.steps": 4})
    urls = ",".join(server.url for server in running)
    shared = {
        "JAXRL_COORDINATOR": f"127.0.0.1:{servers.free_port()}",
        "JAXRL_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAXRL_API_KEY": api_key(),
    }
    processes = [
        tiny_run.jaxrl("train", recipe, "--samplers", urls, JAXRL_PROCESS=str(i), **shared) for i in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(row["sampler/logprob_diff_max"] < 1e-5 for row in rows)
    assert all(row["sampler/staleness"] == 0 for row in rows)


@pytest.fixture(scope="module")
def by_nccl(model: tuple[Path, Model], tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    with servers.running(1, settings(model[0], "nccl"), tmp_path_factory.mktemp("nccl")) as started:
        yield started[0]


def nccl_sampler(url: str, model: Model) -> VLLMSampler:
    return VLLMSampler([url], NCCL(model.config, "float32", limit=60), say=silent)


def test_the_way_of_weights_has_to_be_the_servers(
    running: list[servers.Server], by_nccl: servers.Server, model: tuple[Path, Model], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="takes weights by jaxrl_file; start it with --weight-transfer"):
        nccl_sampler(running[0].url, model[1])
    with pytest.raises(InputError, match="takes weights by nccl; start it with --weight-transfer"):
        make_sampler([by_nccl.url], model[1], tmp_path)


def test_nccl_without_a_gpu(
    by_nccl: servers.Server, model: tuple[Path, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All up to the collective: a server that cannot take part is named at once, though this side would wait."""
    with pytest.raises(InputError, match=r"needs NVIDIA GPUs and jax\[cuda\]"):
        nccl_sampler(by_nccl.url, model[1])
    monkeypatch.setattr(nccl, "_this_rank", lambda: nccl.Rank(22907, "GPU"))
    with pytest.raises(InputError, match=f"{by_nccl.url} has no NCCL; it needs NVIDIA GPUs"):
        nccl_sampler(by_nccl.url, model[1])
    monkeypatch.setattr(nccl, "_require_version", lambda *_: None)
    sampler = nccl_sampler(by_nccl.url, model[1])
    joined = []

    def join(self: Communicator, unique: bytes, world: int) -> None:
        joined.append((unique, world))
        threading.Event().wait()  # as NCCL does until all have joined

    monkeypatch.setattr(Communicator, "unique_id", lambda: bytes(range(128)))
    monkeypatch.setattr(Communicator, "__init__", join)
    began = time.monotonic()
    reason = rf"{by_nccl.url}.*Cannot access accelerator device.*start the servers"
    with pytest.raises(RunError, match=reason):
        sampler.publish(model[1].params, 0)
    assert joined == [(bytes(range(128)), 2)] and time.monotonic() - began < 50


def test_every_route_but_health_wants_the_key(
    running: list[servers.Server], model: tuple[Path, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, right = running[0], {"Authorization": f"Bearer {api_key()}"}

    def get(route: str, headers: dict[str, str]) -> httpx.Response:
        return httpx.get(server.url + route, headers=headers, timeout=60)

    def bearer(key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"}

    schema = get("/openapi.json", right).json()
    routes = [(method.upper(), path) for path, methods in schema["paths"].items() for method in methods]
    changing = {"/pause", "/resume", "/update_weights", "/collective_rpc", "/reset_prefix_cache"}
    assert {"/inference/v1/generate", "/v1/models", *changing} <= {path for _, path in routes}
    routes += [("GET", "/metrics"), ("GET", "/openapi.json"), ("OPTIONS", "/pause")]
    routes += [("POST", route) for route in ("//pause", "/health/../pause", "/no/such/route")]
    for headers in ({}, bearer("wrong"), bearer(f"{api_key()}x"), {"Authorization": api_key()}):
        with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
            answers = {route: client.request(*route).status_code for route in routes if route[1] != "/health"}
        assert set(answers.values()) == {401}, answers
    assert get("/is_paused", right).json() == {"is_paused": False}
    assert get("/health", {}).status_code == 200
    shown = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in os.listdir("/proc") if pid.isdigit()]  # noqa: PTH208
    assert not any(api_key().encode() in line for line in shown)

    monkeypatch.setattr("jaxrl.sampling.client.api_key", lambda: "another")
    with pytest.raises(InputError, match=rf"{server.url}: it wants another API key; JAXRL_API_KEY here"):
        make_sampler([server.url], model[1], tmp_path)


def test_a_server_listens_where_it_was_told_to(model: tuple[Path, Model], tmp_path: Path) -> None:
    """127.0.0.2 is this machine too; a server on all interfaces would answer at 127.0.0.1."""
    with servers.running(1, settings(model[0]), tmp_path / "logs", host="127.0.0.2") as started:
        assert started[0].url.startswith("http://127.0.0.2:")
        sampler = make_sampler([started[0].url], model[1], tmp_path / "weights")
        sampler.publish(model[1].params, 0)
        assert_from(model[1], model[1].params, sampler.generate(make_prompts(2), 2, SAMPLING, (1,)))
        with pytest.raises(httpx.ConnectError):
            httpx.get(started[0].url.replace("127.0.0.2", "127.0.0.1") + "/health")


def test_a_server_has_one_run_at_a_time(
    running: list[servers.Server], model: tuple[Path, Model], tmp_path: Path
) -> None:
    """A second run is refused and changes nothing; another gets the servers once the first has ended, or was killed."""
    urls = [server.url for server in running]
    sampler = make_sampler(urls, model[1], tmp_path / "weights")
    sampler.publish(model[1].params, 3)
    second = start_training(tmp_path / "second", model[0], urls, steps=1)
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 2 and f"{urls[0]}: process {os.getpid()} on " in output, output
    groups = sampler.generate(make_prompts(8), 2, SAMPLING, (1,))
    assert_from(model[1], model[1].params, groups)
    assert {rollout.version for group in groups for rollout in group} == {3}
    sampler.close()

    killed = start_training(tmp_path / "killed", model[0], urls, steps=1000)
    while not (tmp_path / "killed" / "run" / "metrics.jsonl").exists():
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.1)
    killed.kill()
    killed.wait()
    last = start_training(tmp_path / "last", model[0], urls, steps=1)
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output


def start_training(folder: Path, base: Path, urls: list[str], steps: int) -> subprocess.Popen[str]:
    folder.mkdir()
    values = {"rollout.max_tokens": 16, "packing.bucket_tokens": 16, "sampler.folder": str(folder / "shm")}
    recipe = tiny_run.write_recipe(folder, base, **values, **{"run.steps": steps})
    return tiny_run.jaxrl("train", recipe, "--samplers", ",".join(urls), JAXRL_API_KEY=api_key())
