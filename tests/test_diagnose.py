"""What makes sampler and trainer differ: of runs whose sampler's arithmetic is known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiny_run
from jaxrl import diagnose as diagnosis
from jaxrl.errors import InputError
from jaxrl.models import decoder, initialize
from jaxrl.replay import open_replay
from jaxrl.report import disagreement
from jaxrl.types import Prompt, Rollout, silent

_, ROUNDED, _, LOGITS = diagnosis.LADDER
TINY = decoder.Config("qwen2", 97, 32, 3, 4, 2, 8, 48, 1e4, 1e-6, True, 512)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnosed")
    recipe = tiny_run.write_recipe(folder, base, **{"run.steps": 3, "rollout.temperature": 0.8})
    tiny_run.finish("train", recipe, "--quiet")
    return folder / "run"


def answers(count: int = 6) -> list[Rollout]:
    rng = np.random.default_rng(0)

    def one(length: int) -> Rollout:
        prompt = Prompt(str(length), rng.integers(TINY.vocab_size, size=5).astype(np.int32), "")
        tokens = rng.integers(TINY.vocab_size, size=length).astype(np.int32)
        return Rollout(prompt, tokens, np.zeros(length, np.float32), "stop", 0)

    return [one(20 + 40 * k) for k in range(count)]


@pytest.mark.parametrize("rounded", ["nothing", "weights", "logits"])
def test_scores_are_those_of_whole_rows_in_float64(rounded: str) -> None:
    def bfloat16(x: jax.Array | np.ndarray) -> np.ndarray:
        return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32)

    params, rollouts = initialize(TINY, 0, scale=0.2), answers(3)
    dtypes = ["bfloat16" if rounded == name else "float32" for name in ("weights", "layers", "logits")]
    found = diagnosis._scored(TINY, params, rollouts, 0.7, diagnosis.Arithmetic("", *dtypes))
    own = jax.tree.map(lambda w: jnp.asarray(bfloat16(w)), params) if rounded == "weights" else params
    wanted = []
    for rollout in rollouts:
        tokens = np.concatenate([rollout.prompt.tokens, rollout.tokens])
        logits = np.asarray(decoder.logits(TINY, own, tokens[None]))[0]
        scaled = (bfloat16(logits) if rounded == "logits" else logits).astype(np.float64) / 0.7
        logprobs = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
        at = np.arange(len(rollout.prompt.tokens), len(tokens))
        wanted.append(logprobs[at - 1, tokens[at]])
    # a logit at the edge of two bfloat16 numbers may be either
    np.testing.assert_allclose(found, np.concatenate(wanted), atol=4e-2 if rounded == "logits" else 2e-5)
    assert np.mean(np.abs(found - np.concatenate(wanted)) < 2e-5) > 0.9


def test_a_layer_is_off_by_its_own_rounding_and_by_that_of_the_layers_before() -> None:
    params, rollouts = initialize(TINY, 0, scale=0.2), answers(2)
    layers = diagnosis._layers(TINY, params, rollouts)
    assert len(layers) == TINY.layers
    assert all(
        1e-4 < each["alone"] < 0.02 for each in layers
    )  # bfloat16 has 8 bits: 0.4% at most of each number
    assert layers[-1]["so_far"] > layers[-1]["alone"]


def test_a_sampler_in_float32_agrees(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = diagnosis.diagnose(run, None, 40)
    assert found["step"] == 3 and found["answers"] == 40
    assert found["findings"][0].startswith("sampler and trainer agree")
    assert found["ladder"][0]["from_sampler"] == pytest.approx(found["told"] or 0, abs=1e-5)
    assert sum(part["tokens"] for part in found["positions"]) == found["tokens"]
    assert sum(part["tokens"] for part in found["probabilities"]) == found["tokens"]
    assert diagnosis.diagnose(run, 1, 4)["step"] == 1  # by the model's own weights


@pytest.mark.parametrize(
    ("arithmetic", "said"),
    [(ROUNDED, "weights in bfloat16 explains it"), (LOGITS, "and logits in bfloat16 explains it")],
)
def test_what_a_sampler_rounds_is_named(
    run: Path, tmp_path: Path, arithmetic: diagnosis.Arithmetic, said: str
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    with open_replay(copy, (), 0.0, silent) as replay:
        began, model = replay.began(1), replay.setup.model
    params = jax.device_put(jax.device_get(began.carry.state.params), jax.devices()[0])
    scored = [
        diagnosis._scored(model, params, [rollout], 0.8, arithmetic).tolist()
        for group in began.groups
        for rollout in group
    ]
    file = copy / "rollouts" / "step_000000.parquet"
    table = pq.read_table(file)
    rows = [row | {"logprobs": own} for row, own in zip(table.to_pylist(), scored, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
    found = diagnosis.diagnose(copy, 1, 64)
    assert said in found["findings"][0]


def test_findings_by_place_and_size() -> None:
    def rung(own: float, left: float) -> diagnosis.Rung:
        return {"name": "x", "from_float32": own, "from_sampler": left, "correlation": None}

    def parts(*sizes: float) -> list[diagnosis.Part]:
        return [
            {"name": "", "tokens": 9, "mean": 0.0, "mean_abs": size, "p99": size, "largest": size}
            for size in sizes
        ]

    def found(left: float, own: float, *sizes: float) -> str:
        ladder = [rung(0, 0.04), rung(own / 4, 0.04), rung(own / 2, 0.04), rung(own, left)]
        return "\n".join(diagnosis.findings(ladder, parts(*sizes)))

    even = (0.04, 0.04, 0.04, 0.04)
    assert "x explains it" in found(0.01, 0.04, *even)
    assert "explains its size" in found(0.04, 0.04, *even) and "look at" not in found(0.04, 0.04, *even)
    assert "does not explain it" in found(0.04, 0.004, *even)
    assert "look at the prompt" in found(0.04, 0.04, 0.4, 0.04, 0.04, 0.04)
    assert "grows along an answer" in found(0.04, 0.04, 0.01, 0.01, 0.04, 0.08)


def test_what_is_written(run: Path) -> None:
    shown = tiny_run.finish("diagnose", run, "3", "--answers", "8")
    assert "step 3: 8 answers" in shown and "weights in bfloat16" in shown
    found = json.loads((run / "diagnose" / "step_000002.json").read_text())
    assert found["step"] == 3 and disagreement.text(found) in shown
    assert (run / "diagnose" / "step_000002.png").stat().st_size > 10_000


def test_what_was_not_kept_is_said(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "rollouts" / "step_000000.parquet").unlink()
    with pytest.raises(InputError, match="steps 3 have both answers as parquet and a checkpoint before"):
        diagnosis.diagnose(copy, 1, 8)
