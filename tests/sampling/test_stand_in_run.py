"""Whole runs in front of servers that are not real, and behave badly."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import staged
import tiny_run
from jaxrl.types import JsonObject
from json_server import serving
from vllm_stand_in import Nothing, Server

pytestmark = pytest.mark.slow


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(Nothing, "backend", "jaxrl_file")
    return Server()


def arguments(folder: Path, base: Path, server: Server) -> list[object]:
    recipe = tiny_run.write_recipe(
        folder, base, **{"sampler.folder": str(folder / "shm"), "rollout.samples": 2}
    )
    return ["train", recipe, "--samplers", server.url]


def test_a_server_that_is_too_short_ends_the_run_before_the_first_request(
    base: Path, tmp_path: Path, server: Server
) -> None:
    server.start_anew(positions=15)
    with serving(server):
        process = tiny_run.jaxrl(*arguments(tmp_path, base, server))
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 2 and not server.asked, output
    assert output.splitlines()[-1] == (
        f"jaxrl: {server.url} takes 15 tokens of a prompt and its completion, and the recipe needs 16; start it with "
        "--max-model-len 16 or more"
    )


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)], ids=["Ctrl-C", "SIGTERM"]
)
def test_the_first_signal_ends_a_run_that_no_server_answers(
    signum: int, status: int, base: Path, tmp_path: Path, server: Server
) -> None:
    server.answer = lambda *_: (503, {})
    with serving(server):
        process = tiny_run.jaxrl(*arguments(tmp_path, base, server))
        server.wait_for(2, 300)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=60)  # its patience is 600 s
    assert process.returncode == status and "Traceback" not in output, output
    assert f"the step was not finished: {server.url}: /inference/v1/generate answered 503" in output


def test_a_server_that_answers_nonsense_ends_the_run_at_once(
    base: Path, tmp_path: Path, server: Server
) -> None:
    server.completion = [99, 1]
    with serving(server):
        process = tiny_run.jaxrl(*arguments(tmp_path, base, server))
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    assert output.splitlines()[-1] == f"jaxrl: {server.url}: 99 is no token id of a vocabulary of 9"


def test_refill_goes_on_across_stages_one_batch_ahead(base: Path, tmp_path: Path, server: Server) -> None:
    """Answers to 2 are all right, so two groups of three are in the band. Batches that are ahead stop at a switch."""
    temperatures: list[float] = []

    def answer(body: JsonObject, answer: JsonObject) -> JsonObject:
        temperatures.append(body["sampling_params"]["temperature"])
        digit = body["token_ids"][1]
        for k, choice in enumerate(answer["choices"]):
            ids = [4, digit if k or digit == 8 else 8, 5, 1]
            choice["token_ids"] = ids
            choice["logprobs"] = {"content": [{"token_id": i, "logprob": -1.0} for i in ids]}
            choice["weight_versions"] = [{"version": server.weights, "start": 0, "end": 4}]
        return answer

    server.answer = answer
    stages = [
        {"name": "cool", "until": 3, "groups": {"filter": "refill"}, "sampler": {"max_staleness": 1}},
        {"name": "hot", "until": 5, "rollout": {"temperature": 1.25}, "groups": {"filter": "none"}},
    ]
    more = {"sampler.folder": str(tmp_path / "shm"), "rollout.samples": 2, "rollout.engine": "vllm"}
    with serving(server):
        more |= {"sampler.urls": [server.url]}
        recipe = staged.write_recipe(
            tmp_path, base, stages, **more, **{"kl.coefficient": 0.0, "kl.reset_every": 0}
        )
        said = tiny_run.finish("train", recipe)
    rows = tiny_run.metrics(tmp_path / "run")
    assert [row["groups/trained"] for row in rows[:3]] == [8, 8, 8] and "groups/trained" not in rows[3], said
    sampled = [int(row["groups/sampled"]) for row in rows[:3]]
    assert all(count > 8 for count in sampled) and sum(sampled) == sum(t == 1.0 for t in temperatures)
    assert sum(t == 1.25 for t in temperatures) == 2 * 8
    assert [row["sampler/staleness"] for row in rows] == [0, 1, 1, 0, 0]
