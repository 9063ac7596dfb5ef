"""RoPE scalings, as transformers computes them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from evals import suite
from evals.task import Task
from jaxrl import config as recipes
from jaxrl import models, plan
from jaxrl.errors import InputError
from jaxrl.models import config_json, decoder, hf
from jaxrl.rope import RopeScaling
from jaxrl.sampling import servers, vllm_plugin
from jaxrl.sampling.local import LocalSampler
from jaxrl.sampling.transports.files import Files
from jaxrl.types import JsonObject, Prompt, SamplingParams

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ORIGINAL = {"original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | ORIGINAL
YARN = {"rope_type": "yarn", "factor": 4.0} | ORIGINAL
LINEAR = {"rope_type": "linear", "factor": 2.5}
LLAMA_3_2 = LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}
WITHIN = {"rope_theta": 50_000.0}
# What config.json says beside the sizes of a model.
SETTINGS: dict[str, JsonObject] = {
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500_000.0},
    "llama-3.2": {"rope_scaling": LLAMA_3_2, "rope_theta": 500_000.0, "max_position_embeddings": 131_072},
    "llama3 of the length stated": {
        "rope_parameters": LLAMA3 | WITHIN | {"original_max_position_embeddings": 128}
    },
    "linear": {"rope_parameters": LINEAR | WITHIN},
    "linear by type": {"rope_scaling": {"type": "linear", "factor": 3}, "rope_theta": 1e6},
    "linear of 1": {"rope_scaling": {"type": "linear", "factor": 1.0}},
    "yarn": {"rope_parameters": YARN | WITHIN},
    "yarn by type": {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1e6},
    "rope_type counts": {"rope_scaling": YARN | {"type": "linear"}},
    "yarn of the ratio": {"rope_parameters": YARN | WITHIN | {"factor": None}},
    "length outside": {"rope_parameters": YARN | WITHIN, "original_max_position_embeddings": 64},
    "attention_factor": {"rope_parameters": YARN | WITHIN | {"attention_factor": 1.5, "mscale": 2.0}},
    "mscale": {"rope_parameters": YARN | WITHIN | {"mscale": 0.7, "mscale_all_dim": 2.0}},
    "mscale alone": {"rope_parameters": YARN | WITHIN | {"mscale": 0.7, "mscale_all_dim": 0}},
    "betas": {
        "rope_parameters": YARN | WITHIN | {"beta_fast": 4, "beta_slow": 0.5, "attention_factor": None}
    },
    "betas of 0": {"rope_parameters": YARN | WITHIN | {"beta_fast": 0, "beta_slow": None}},
    "truncate": {"rope_parameters": YARN | WITHIN | {"beta_fast": 8, "truncate": False}},
    "bounds meet": {"rope_parameters": YARN | WITHIN | {"beta_fast": 1e6, "beta_slow": 9e5}},
    "both": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": YARN},
    "both thetas": {"rope_theta": 7e4, "rope_parameters": LINEAR | {"rope_theta": 5e5}},
    "empty rope_scaling": {"rope_parameters": LINEAR | {"rope_theta": 5e5}, "rope_scaling": {}},
}


@pytest.fixture
def write(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """(family, settings) -> a folder whose config.json has these settings and no other of RoPE."""

    def build(family: str, settings: JsonObject) -> Path:
        folder = shutil.copytree(checkpoint(family), tmp_path / family, dirs_exist_ok=True)
        raw = json.loads((checkpoint(family) / "config.json").read_text())
        del raw["rope_parameters"]
        (folder / "config.json").write_text(json.dumps(raw | settings))
        return folder

    return build


def reference_frequencies(config: PretrainedConfig) -> tuple[np.ndarray, float]:
    """As the rotary embedding of transformers' Llama makes them when it is created."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    embedding = LlamaRotaryEmbedding(config)
    return embedding.inv_freq.numpy(), embedding.attention_scaling


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_are_those_of_transformers(name: str, write: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = write("llama", SETTINGS[name])
    config = hf.read_config(folder)
    expected, attention = reference_frequencies(AutoConfig.from_pretrained(folder))
    scaling = config.rope_scaling or RopeScaling("linear", 1.0)
    got = scaling.frequencies(config.rope_theta, config.head_dim)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=3e-7)
    assert scaling.attention_factor == attention
    if not config.rope_scaling:
        return
    # what is written of it says the same, to the trainer and to transformers
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.json").write_text(json.dumps(config_json.describe(config)))
    assert hf.read_config(again) == config
    described, attention = reference_frequencies(AutoConfig.from_pretrained(again))
    np.testing.assert_allclose(described, expected, rtol=3e-7)
    assert scaling.attention_factor == attention


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *[(family, name) for family in ("llama", "qwen2", "qwen3") for name in ("llama3", "yarn", "linear")],
        *[("qwen3", name) for name in ("both", "mscale", "truncate", "linear of 1")],
    ],
)
def test_logits_are_those_of_transformers(family: str, name: str, write: Callable[..., Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = write(family, SETTINGS[name])
    tokens = np.random.default_rng(0).integers(0, 104, (2, 120))  # of 32 in pretraining
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)).logits.numpy()
    model = models.load(folder)
    np.testing.assert_allclose(model.logits(model.params, tokens), expected, atol=2e-4, rtol=0)
    if name != "linear of 1":
        plain = dataclasses.replace(model.config, rope_scaling=None)
        assert np.abs(np.asarray(decoder.logits(plain, model.params, tokens)) - expected).max() > 0.1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": None, "rope_theta": 1e4}}, "None"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "['yarn']"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}, "full_attention"),
        ({"rope_parameters": []}, "rope_parameters"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_parameters": LINEAR | {"rope_theta": None}}, "rope_theta"),
        ({"rope_parameters": YARN | {"rope_theta": 1.0}}, "rope_theta"),
        ({"rope_theta": float("inf")}, "Infinity"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": {"type": "yarn"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": YARN | {"truncate": None}}, "truncate"),
        ({"rope_scaling": YARN | {"beta_fast": "32"}}, "beta_fast"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 32.0}}, "original_max_position_embeddings"),
        ({"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(settings: JsonObject, named: str, write: Callable[..., Path]) -> None:
    folder = write("llama", settings)
    with pytest.raises(InputError) as caught:
        hf.read_config(folder)
    message = str(caught.value)
    assert message.startswith(str(folder / "config.json")) and named in message and "\n" not in message


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        ({"rope_theta": 1e4}, 128),
        ({"rope_scaling": LLAMA3}, 128),  # 4 * 32: stated already
        ({"rope_scaling": LLAMA_3_2}, 128),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 512),  # as Qwen2.5 and Qwen3 advise
        ({"rope_scaling": YARN}, 128),
        ({"rope_scaling": YARN | {"factor": 2.0}}, 128),
        ({"rope_scaling": YARN | {"factor": None}}, 128),
        ({"rope_scaling": LINEAR}, 320),
    ],
)
def test_positions(settings: JsonObject, positions: int, write: Callable[..., Path]) -> None:
    config = hf.read_config(write("llama", settings))
    assert (config.max_positions, config.positions) == (128, positions)
    decoder.require_positions(config, positions)
    with pytest.raises(InputError, match=f"{positions} positions"):
        decoder.require_positions(config, positions + 1)


def test_a_plan_has_room_as_far_as_yarn_reaches(write: Callable[..., Path]) -> None:
    model = recipes.Model(path=str(write("qwen2", SETTINGS["yarn by type"])))
    data = recipes.Data(max_prompt_tokens=112)
    assumptions = plan.Assumptions(devices=1, mean_response=100, mean_prompt=50, compile=False)

    def predict(max_tokens: int) -> plan.Plan:
        rollout = recipes.Rollout(max_tokens=max_tokens)
        return plan.plan(recipes.Recipe(model=model, data=data, rollout=rollout), assumptions)

    assert predict(400)["steps"]
    with pytest.raises(InputError, match="512 positions"):
        predict(401)


def test_an_evaluation_has_room_as_far_as_yarn_reaches(write: Callable[..., Path], tmp_path: Path) -> None:
    folder = write("qwen2", SETTINGS["yarn by type"])
    prompt = Prompt("p", np.zeros(112, np.int32), "")
    task = Task("t", "t", problems=[], prompts=[prompt], samples=1)

    def job(max_tokens: int) -> suite.Job:
        recipe = recipes.Recipe(rollout=recipes.Rollout(max_tokens=max_tokens))
        return suite.Job("m", folder, {}, recipe, tmp_path)

    assert suite._fitted(job(400), [task]).max_tokens == 512
    with pytest.raises(InputError, match="512 positions"):
        suite._fitted(job(401), [task])


def test_samples_as_far_as_yarn_reaches(write: Callable[..., Path]) -> None:
    model = models.load(write("qwen2", SETTINGS["yarn by type"]))
    sampler = LocalSampler(model.config, dtype="float32", slots=1)
    sampler.publish(model.params, 0)
    prompt = Prompt("p", np.arange(500, dtype=np.int32) % 104, "")
    (rollout,) = sampler.generate([prompt], 1, SamplingParams(max_tokens=12), (1,))[0]
    ids = np.append(prompt.tokens, rollout.tokens)
    logits = np.asarray(model.logits(model.params, ids[None])[0], np.float64)[499:-1]
    expected = logits[np.arange(12), rollout.tokens] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-4)
    with pytest.raises(InputError, match="512 positions"):
        sampler.generate([prompt], 1, SamplingParams(max_tokens=13), (1,))


def greeting(config: models.Config, tmp_path: Path) -> JsonObject:
    """What the trainer sends a server of its model."""
    import asyncio

    sent: JsonObject = {}

    class Client:
        async def order(self, url: str, path: str, body: JsonObject, limit: float) -> None:
            sent.update(json.loads(json.dumps(body)))

    asyncio.run(Files(config, tmp_path).greet(Client(), "url"))  # type: ignore[arg-type]
    return sent["init_info"]["model"]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_server_of_the_same_folder_is_the_trainers(
    name: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoConfig

    folder = write("qwen3", SETTINGS[name])
    served = AutoConfig.from_pretrained(folder)
    served.standardize_rope_params()  # as vLLM does
    vllm_plugin.require_same_model(greeting(hf.read_config(folder), tmp_path), served)


@pytest.mark.parametrize(
    ("ours", "theirs", "named"),
    [
        ({"rope_theta": 1e4}, {"rope_theta": 1e6}, "rope_parameters"),
        ({"rope_theta": 1e4}, {"rope_theta": 1e4, "rope_scaling": YARN}, "rope_parameters"),
        ({"rope_scaling": LLAMA3}, {"rope_scaling": LLAMA3 | {"factor": 8.0}}, "rope_parameters"),
        ({"rope_scaling": YARN}, {"rope_scaling": YARN | {"beta_fast": 16}}, "rope_parameters"),
        ({"rope_scaling": YARN}, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-6}, "rms_norm_eps"),
    ],
)
def test_a_server_with_another_function_is_refused(
    ours: JsonObject, theirs: JsonObject, named: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoConfig

    served = AutoConfig.from_pretrained(write("qwen2", theirs))
    model = greeting(hf.read_config(write("qwen2", ours)), tmp_path)
    with pytest.raises(ValueError, match=named):
        vllm_plugin.require_same_model(model, served)


def test_a_server_that_gives_a_llama_a_window_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = write("llama", {"use_sliding_window": False, "sliding_window": 64})
    with pytest.raises(ValueError, match="sliding_window is 64, not None"):
        vllm_plugin.require_same_model(
            greeting(hf.read_config(folder), tmp_path), AutoConfig.from_pretrained(folder)
        )


def test_a_server_that_does_not_say_is_believed() -> None:
    vllm_plugin.require_same_model(
        {"vocab_size": 9, "rope_parameters": {"rope_theta": 1e4}}, SimpleNamespace()
    )


@pytest.mark.parametrize("beyond", [True, False])
def test_servers_go_beyond_what_is_stated_only_where_told_to(beyond: bool, tmp_path: Path) -> None:
    settings = servers.Settings("vllm", "model", "float32", max_tokens=512, beyond=beyond)
    server = servers.prepare(settings, tmp_path / "log", on_cpu=True)
    assert ("VLLM_ALLOW_LONG_MAX_MODEL_LEN" in server._all_environment()) == beyond
