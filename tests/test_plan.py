"""The planner against published step times, published FLOP counts, plain arithmetic and plain common sense."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import plan_bytes
from jaxrl import aot, cli, config
from jaxrl.errors import InputError
from jaxrl.models import decoder
from jaxrl.plan import (
    HARDWARE,
    KNOWN,
    Assumptions,
    Workload,
    _workload,
    best_split,
    compiled_bytes,
    compiler,
    decode_seconds,
    estimated_bytes,
    parameters,
    pass_seconds,
    plan,
    predict,
    response_lengths,
    sequence_flops,
    show,
    with_remat,
)
from jaxrl.programs import layout_of
from jaxrl.sampling.servers import SERVERS_MEMORY, TRAINERS_MEMORY
from jaxrl.types import JsonObject, Remat

RECIPES = Path(__file__).parents[1] / "recipes"
R1_DISTILL = KNOWN["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"]
LLAMA_8B = decoder.Config("llama", 128_256, 4096, 32, 32, 8, 128, 14_336, 5e5, 1e-5, False, 131_072)
QWEN3_32B = decoder.Config("qwen3", 151_936, 5120, 64, 64, 8, 128, 25_600, 1e6, 1e-6, False, 40_960)
JUSTRL = Workload(R1_DISTILL, 256, 8, 150, 5000, cap=15_360, eager=True)


def nemo(model: decoder.Config, response: int, prompt: int, tensor: int = 1) -> Workload:
    """NeMo-RL's performance recipes: 64 prompts x 32, 4,096 tokens in all, a reference model's log-probs too."""
    return Workload(model, 64, 32, prompt, response, 4096 - prompt, logprob_passes=2, tensor=tensor)


# AReaL with a quarter of the devices training; an H800 is an H100 with less NVLink
AREAL_8K = Workload(R1_DISTILL, 64, 16, 150, 3500, cap=8042)
AREAL_27K = Workload(R1_DISTILL, 512, 16, 150, 9300, cap=27_648)

# name, workload, hardware, trainers, samplers, colocated, published seconds; docs/planning.md has the sources
Row = tuple[str, Workload, str, int, int, bool, float]
PUBLISHED: list[Row] = [
    ("JustRL, R1-Distill-Qwen-1.5B, 32 A800", JUSTRL, "A800", 32, 32, True, 296),
    ("NeMo-RL 0.3, Llama-3.1-8B, 8 H100", nemo(LLAMA_8B, 795, 130), "H100", 8, 8, True, 112),
    ("NeMo-RL 0.4, Llama-3.1-8B, 16 H100", nemo(LLAMA_8B, 1060, 132), "H100", 16, 16, True, 97.7),
    ("NeMo-RL 0.4, Llama-3.1-8B, 8 + 8 H100", nemo(LLAMA_8B, 1129, 130), "H100", 8, 8, False, 74.6),
    ("NeMo-RL 0.4, Qwen3-32B, 32 H100", nemo(QWEN3_32B, 3206, 110, tensor=4), "H100", 32, 32, True, 393),
    ("NeMo-RL 0.4, Qwen3-32B, 32 + 32 H100", nemo(QWEN3_32B, 3207, 110, tensor=4), "H100", 32, 32, False, 215),
    ("AReaL, R1-Distill-Qwen-1.5B, 8k, 2 + 6 H800", AREAL_8K, "H100", 2, 6, False, 75),
    ("AReaL, R1-Distill-Qwen-1.5B, 27k, 32 + 96 H800", AREAL_27K, "H100", 32, 96, False, 283),
]  # fmt: skip


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0])
def test_published_step_times_within_half(row: Row) -> None:
    name, workload, hardware, trainers, samplers, colocated, published = row
    predicted = predict(workload, HARDWARE[hardware], trainers, samplers, colocated).total
    assert 1 / 1.5 < predicted / published < 1.5
    documented = f"| {name} | {published} | {predicted:.0f} | {predicted / published:.2f} |"
    assert documented in (Path(__file__).parents[1] / "docs" / "planning.md").read_text(), documented


def test_published_phases_within_half() -> None:
    """NVIDIA-NeMo/RL issue 959, first row: training 28 s, generation 58, log-probs 18, refit 5."""
    _, workload, _, devices, _, _, _ = PUBLISHED[1]
    step = predict(workload, HARDWARE["H100"], devices, devices, colocated=True)
    training, generation = step.update + step.communication, step.prefill + step.decode
    phases = {28: training, 58: generation, 18: step.old_logprobs, 5: step.publish}
    assert all(1 / 1.5 < predicted / published < 1.5 for published, predicted in phases.items()), phases


def mfu(model: decoder.Config, length: int, remat: Remat | None) -> float:
    """Model FLOPs over the peak of an H100 for one sequence: of forward and backward, or without remat of log-probs."""
    lengths = np.array([length])
    seconds = pass_seconds(model, lengths, HARDWARE["H100"], remat).total
    return (3 if remat else 1) * sequence_flops(model, lengths) / (HARDWARE["H100"].flops * seconds)


def test_published_mfu_within_half() -> None:
    """AReaL's trainer (arXiv 2505.24298, figure 6a): 427 TFLOP/s on H800; fms-fsdp without recomputation: 46%."""
    assert 1 / 1.5 < mfu(R1_DISTILL, 16_384, "full") / (427e12 / 989e12) < 1.5
    assert mfu(LLAMA_8B, 4096, "none") == pytest.approx(0.46, rel=0.1)


def test_what_is_kept_and_longer_sequences_raise_the_mfu() -> None:
    by_remat = [mfu(R1_DISTILL, 5000, remat) for remat in get_args(Remat)]
    assert by_remat == sorted(by_remat) and len(set(by_remat)) == len(by_remat)
    assert mfu(R1_DISTILL, 5000, None) > by_remat[-1]
    assert mfu(R1_DISTILL, 16_384, "products") > mfu(R1_DISTILL, 512, "products")


@pytest.mark.parametrize("remat", get_args(Remat))
@given(st.integers(1, 40_000))
@settings(deadline=None, max_examples=10)
def test_no_pass_has_fewer_flops_than_the_model(remat: Remat, length: int) -> None:
    """At peak and without waiting for memory, a log-prob pass has exactly the model's."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PRODUCTS": 1.0, "ATTENTION": 1.0, "BANDWIDTH": np.inf}.items():
            patch.setattr(f"jaxrl.plan.{name}", value)
        assert mfu(R1_DISTILL, length, None) == pytest.approx(1)
        assert mfu(R1_DISTILL, length, remat) < 1


# ms of one stream of 2 x 16,384 tokens on an H100, by jaxrl.hlo from the compiled programs; see docs/planning.md
COMPILED: list[tuple[Remat | None, tuple[float, float, float]]] = [
    ("full", (383.6, 210.1, 141.6)),
    ("products", (322.3, 163.4, 122.6)),
    (None, (102.3, 46.7, 34.0)),
]


@pytest.mark.parametrize(("remat", "compiled"), COMPILED)
def test_parts_of_a_pass_are_those_of_the_compiled_program(
    remat: Remat | None, compiled: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PRODUCTS", "ATTENTION", "BANDWIDTH"):
        monkeypatch.setattr(f"jaxrl.plan.{name}", 1.0)
    parts = pass_seconds(R1_DISTILL, np.full(2, 16_384), HARDWARE["H100"], remat)
    assert (1e3 * parts.products, 1e3 * parts.attention) == pytest.approx(compiled[:2], rel=1e-3)
    assert 1e3 * parts.memory == pytest.approx(compiled[2], rel=0.1)


GIGAFLOPS = [(5000, 3.517), (7000, 3.689), (16_384, 4.496), (32_768, 5.906)]


@pytest.mark.parametrize(("length", "gigaflops"), GIGAFLOPS)
def test_flops_of_a_token_of_r1_distill(length: int, gigaflops: float) -> None:
    """2 x (28 x 46,792,704 + 233,373,696) + 172,032 x length / 2."""
    assert sequence_flops(R1_DISTILL, np.array([length])) / length == pytest.approx(gigaflops * 1e9, rel=2e-4)


def test_parameters_are_the_published_counts() -> None:
    assert parameters(R1_DISTILL) == 1_777_088_000
    assert parameters(LLAMA_8B) == 8_030_261_248
    assert parameters(KNOWN["Qwen/Qwen3-1.7B"]) == 1_720_574_976


def test_decoding_equal_responses_at_the_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,048 responses of 5,000 tokens on one H100 read 778 TB of cache: 232 s at 3.35 TB/s."""
    for name, value in {"BANDWIDTH": 1.0, "STEP_OVERHEAD": 0.0, "PRODUCTS": 1e9}.items():
        monkeypatch.setattr(f"jaxrl.plan.{name}", value)
    equal = dataclasses.replace(JUSTRL, eager=False, spread=0.0)
    h100 = dataclasses.replace(HARDWARE["H100"], memory=1e15)  # room for all at once
    seconds, tail = decode_seconds(equal, h100, response_lengths(equal))
    prompts = 2048 * 5000 * 150 * 28_672 / 3.35e12
    parameters = 5000 * 2 * (1_777_088_000 - 233_373_696) / 3.35e12
    assert seconds - prompts - parameters == pytest.approx(2048 * 28_672 * 5000**2 / 2 / 3.35e12, rel=1e-3)
    assert seconds - prompts - parameters == pytest.approx(2048 * 0.38e12 / 3.35e12, rel=0.07)
    assert tail == 0


@given(st.floats(10, 15_000), st.floats(0, 2), st.integers(1, 64))
@settings(deadline=None, max_examples=50)
def test_lengths_have_the_mean_and_the_cap(mean: float, spread: float, prompts: int) -> None:
    w = dataclasses.replace(JUSTRL, prompts=prompts, response_tokens=mean, spread=spread)
    lengths = response_lengths(w)
    assert len(lengths) == w.sequences and lengths.min() >= 1 and lengths.max() <= w.cap
    assert (np.diff(lengths) <= 0).all()
    assert lengths.mean() == pytest.approx(mean, abs=0.51)


@given(st.sampled_from(sorted(HARDWARE)), st.integers(1, 40), st.integers(1, 40), st.floats(200, 10_000))
@settings(deadline=None, max_examples=40)
def test_more_work_takes_longer_and_more_devices_do_not(
    name: str, trainers: int, samplers: int, mean: float
) -> None:
    hardware = HARDWARE[name]
    w = dataclasses.replace(JUSTRL, prompts=32, response_tokens=mean)
    step = predict(w, hardware, trainers, samplers)
    longer = predict(dataclasses.replace(w, response_tokens=1.2 * mean), hardware, trainers, samplers)
    assert longer.total > step.total
    assert predict(w, hardware, trainers, samplers + 1).decode <= step.decode
    assert predict(w, hardware, trainers + 1, samplers).update < step.update
    faster = dataclasses.replace(hardware, bandwidth=2 * hardware.bandwidth)
    assert predict(w, faster, trainers, samplers).decode < step.decode
    ahead, in_turn = (predict(w, hardware, trainers, trainers, colocated) for colocated in (False, True))
    assert in_turn.total >= ahead.total
    assert 0 <= step.tail <= step.decode


@pytest.mark.parametrize(("devices", "least"), [(2, 1), (16, 1), (24, 4)])
def test_the_split_is_the_fastest(devices: int, least: int) -> None:
    def seconds(trainers: int) -> float:
        return predict(JUSTRL, HARDWARE["A100"], trainers, devices - trainers).total

    found = best_split(
        JUSTRL, HARDWARE["A100"], devices, fits=lambda trainers: "full" if trainers >= least else None
    )
    assert (found.trainers, found.samplers) == (found.trainers, devices - found.trainers)
    assert found.total == min(seconds(t) for t in range(least, devices))


def test_a_split_has_to_have_the_memory() -> None:
    with pytest.raises(InputError, match="no split of 8 devices"):
        best_split(JUSTRL, HARDWARE["A100"], 8, fits=lambda _: None)


SMALL = decoder.Config("qwen2", 512, 64, 3, 4, 2, 16, 96, 1e4, 1e-6, False, 512)


def small_recipe(**values: dict[str, object]) -> config.Recipe:
    return config.from_dict(
        {
            "model": {"remat": "full"},
            "data": {"max_prompt_tokens": 32},
            "rollout": {"prompts": 8, "samples": 4, "max_tokens": 96},
            "optimizer": {"minibatch_prompts": 4},
            "packing": {"stream_tokens": 256, "bucket_tokens": 32, "logprob_chunk": 64},
        }
        | values
    )


def test_auto_recomputes_the_least_that_fits() -> None:
    recipe = config.from_dict({})

    def chosen(trainers: int, memory: float) -> str:
        hardware = dataclasses.replace(HARDWARE["H100"], memory=memory)
        return with_remat(recipe, R1_DISTILL, trainers, hardware).model.remat

    assert chosen(8, 80e9) == "products"
    assert chosen(8, 50e9) == "projections"
    assert chosen(1, 55e9) == "attention"
    assert chosen(1, 1e9) == "full"
    named = config.from_dict({"model": {"remat": "attention"}})
    assert with_remat(named, R1_DISTILL, 8, HARDWARE["H100"]) == named


def test_a_tpus_compiler_is_not_taken_for_a_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxrl.aot.available", lambda _: True)
    assert [compiler(name) for name in ("H100", "v5p", "B200")] == ["cuda", "cpu", "cpu"]


@pytest.mark.parametrize("gather", ["step", "layer"])
def test_compiled_bytes_are_those_of_arithmetic(gather: str) -> None:
    recipe = small_recipe(model={"dtype": "float32", "remat": "full"}, mesh={"gather": gather})
    held, estimated = compiled_bytes(recipe, SMALL, 4, "v5p"), estimated_bytes(recipe, SMALL, 4)
    assert held["parameters"] == 4 * parameters(SMALL) / 4
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], abs=64)  # and its counters
    assert held["activations"] == 4 * 256 * 3 * 64
    # the arithmetic is that of a GPU's buffers, which are fewer
    assert estimated["temporaries"] < held["temporaries"] < 1.5 * estimated["temporaries"]
    assert held["temporaries of scoring"] < held["temporaries"]


@pytest.mark.parametrize("terms", [{}, {"entropy": {"bonus": 0.1}}])
def test_all_mini_batches_of_a_step_are_counted(terms: dict[str, dict[str, object]]) -> None:
    """They are placed before the first update; with 512 answers a prompt that is gigabytes."""
    recipe = small_recipe(**terms)
    held, estimated = compiled_bytes(recipe, SMALL, 4, "v5p"), estimated_bytes(recipe, SMALL, 4)
    assert estimated["batch"] == pytest.approx(held["batch"], rel=0.01)
    layout = layout_of(recipe, SMALL)
    rows = (
        16 // 4 // (256 // layout.buckets[-1])
    )  # of each device, where all sequences are as long as they may be
    assert recipe.minibatches == 2
    assert held["batch"] == pytest.approx(2 * 4 * rows * 256 * (6 + len(terms)), rel=0.3)


def test_devices_in_turn_are_shared_as_a_run_shares_them() -> None:
    """What a trainer keeps fits beside a server, whose cache is smaller than that of one which has its device alone."""
    recipe = config.load(str(RECIPES / "justrl-deepseek-1.5b.toml"), [])
    in_turn, alone = (
        plan(recipe, Assumptions(compile=False, trainers=8, samplers=samplers)) for samplers in (0, 8)
    )
    memory = HARDWARE["H100"].memory
    assert in_turn["bytes"].pop("sampler") == SERVERS_MEMORY * memory and "sampler" not in alone["bytes"]
    assert sum(in_turn["bytes"].values()) <= TRAINERS_MEMORY * memory < sum(alone["bytes"].values())
    assert in_turn["steps"][0]["decode"] > alone["steps"][0]["decode"]


def test_a_sampler_needs_room_for_the_longest_sequence() -> None:
    """vLLM does not start where its cache cannot hold one."""
    short = dataclasses.replace(JUSTRL, response_tokens=500)
    size = 2 * parameters(R1_DISTILL) + 15_510 * 28_672
    for spare, enough in ((1e6, True), (-1e6, False)):
        hardware = dataclasses.replace(HARDWARE["H100"], memory=(size + spare) / 0.85)
        if enough:
            predict(short, hardware, 8, 8)
        else:
            with pytest.raises(InputError, match="no room for a sequence of 15360 tokens"):
                predict(short, hardware, 8, 8)


def test_a_split_recomputes_what_its_own_trainers_have_no_memory_for() -> None:
    def remat(trainers: int) -> Remat | None:
        return {1: None, 2: "full"}.get(trainers, "products")

    found = best_split(JUSTRL, HARDWARE["A100"], 4, remat)
    totals = [
        predict(dataclasses.replace(JUSTRL, remat=kept), HARDWARE["A100"], t, 4 - t).total
        for t, kept in ((2, "full"), (3, "products"))
    ]
    assert found.trainers in (2, 3) and found.total == min(totals)


def test_state_is_divided_among_fsdp_and_copied_over_data() -> None:
    held = compiled_bytes(small_recipe(mesh={"data": 2}), SMALL, 8, "v5p")
    assert held["parameters"] == 4 * parameters(SMALL) / 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hardware": "T4"}, "A100, A800, H100, H200, B200"),
        ({"mean_response": 20_000}, "not between 1 and the cap of 15360"),
        ({"mean_response": float("nan")}, "--mean-response = nan is not positive"),
        ({"samplers": 4}, "--trainers N and --samplers M"),
        ({"devices": 8, "trainers": 4}, "give --devices N"),
        ({"trainers": -1}, "give --devices N"),
        ({"zero_advantage": 1.0}, "--zero-advantage must be"),
        ({"tensor": 3}, "whole groups of 3"),
    ],
)
def test_impossible_options_are_named(changes: dict[str, float | str], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        plan(config.Recipe(), Assumptions(compile=False, **changes))
    assert len(str(error.value).splitlines()) == 1


def test_models_and_meshes_that_cannot_be() -> None:
    unknown = dataclasses.replace(config.Recipe(), model=config.Model(path="nobody/nothing"))
    with pytest.raises(InputError, match="nobody/nothing: no such folder"):
        plan(unknown, Assumptions(compile=False))
    uneven = dataclasses.replace(config.Recipe(), mesh=config.Mesh(data=3))
    with pytest.raises(InputError, match=r"mesh\.data = 3"):
        plan(uneven, Assumptions(compile=False, devices=8))
    tiny = dataclasses.replace(HARDWARE["H100"], memory=3e9)
    with pytest.raises(InputError, match="raise --tensor"):
        predict(JUSTRL, tiny, 8, 8)


def test_the_command_prints_and_writes_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "plan.json"
    recipe.write_text(config.to_toml(config.Recipe()))
    options = ["--devices", "16", "--no-compile", "--json", str(out), "--rollout.prompts", "128"]
    cli.main(["plan", str(recipe), *options])
    shown, result = capsys.readouterr().out, json.loads(out.read_text())
    assert "one step ahead" in shown and "16 devices" in shown and "optimizer" in shown
    assert result["compiler"] == "none" and "MFU in forward and backward" in shown
    assert result["recipe"]["rollout"]["prompts"] == 128
    assert [s["total"] for s in result["steps"]] == sorted(s["total"] for s in result["steps"])
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", str(recipe), "--hardware", "T4"])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("jaxrl: --hardware = T4")


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
GRID = json.loads((RESULTS / "plan_bytes.json").read_text())["rows"]


@pytest.mark.parametrize("row", GRID, ids=lambda row: "-".join(map(str, list(row.values())[:-2])))
def test_estimated_bytes_are_those_of_the_gpu_compiler(row: JsonObject) -> None:
    case = plan_bytes.Case(**{name: row[name] for name in plan_bytes.Case._fields})
    estimated = estimated_bytes(case.recipe(), plan_bytes.MODELS[case.model], case.trainers)
    assert sum(estimated.values()) == pytest.approx(row["bytes"], rel=0.12)


def test_the_page_has_the_grid_and_the_arithmetic_of_now() -> None:
    page = (RESULTS.parents[1] / "docs" / "planning.md").read_text(encoding="utf-8")
    assert plan_bytes.table(GRID) in page


def test_without_the_gpu_compiler_the_cpu_compiles_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jaxrl.aot.available", lambda _: False)
    monkeypatch.setattr("jaxrl.plan.model_config", lambda _: SMALL)
    made = plan(small_recipe(), Assumptions(trainers=4, mean_response=50, mean_prompt=20))
    show([made])
    assert made["compiler"] == "cpu"
    assert "float32" in capsys.readouterr().out


def test_with_the_gpu_compiler_it_compiles_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not aot.available("H100"):
        pytest.skip("the GPU's compiler is not installed; pip install 'jaxrl[cuda]'")
    monkeypatch.setattr("jaxrl.plan.model_config", lambda _: dataclasses.replace(SMALL, head_dim=64))
    monkeypatch.setattr("jaxrl.plan._cpu_devices", None)  # none are needed
    # 16 trainers are two hosts
    made = plan(small_recipe(), Assumptions(trainers=16, mean_response=50, mean_prompt=20))
    show([made])
    assert made["compiler"] == "cuda"
    assert "compiled for H100 by XLA's GPU compiler" in capsys.readouterr().out
    assert compiler("B200") == compiler("v5p") == "cpu"


@pytest.mark.slow
def test_the_real_recipe_compiles_for_its_real_mesh() -> None:
    held = compiled_bytes(config.Recipe(), R1_DISTILL, 8, "H100")
    assert held["parameters"] + held["optimizer"] == pytest.approx(12 * 1_777_088_000 / 8, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "trained", "passes"),
    [
        ([], 0.6, 0.75 * 0.6),
        (["--loss.skip_zero_advantage", "false"], 1, 0.75),
        (["--advantage.scale", "batch"], 1, 0.75),
        (["--kl.coefficient", "0.001"], 1, 1.75),
        (["--kl.coefficient", "0.001", "--kl.place", "reward"], 1, 2),
        (["--sampler.correction", "masked"], 0.6, 1),
        (["--optimizer.epochs", "2"], 0.6, 0.6),
        (["--groups.filter", "drop"], 0.5 * 0.6, 0.5 * 0.75 * 0.6),
        (["--groups.filter", "refill"], 0.6, 0.75 * 0.6),
    ],
)
def test_a_workload_has_the_sequences_and_passes_of_its_techniques(
    changes: list[str], trained: float, passes: float
) -> None:
    recipe = config.load(Path(__file__).parents[1] / "recipes" / "justrl-deepseek-1.5b.toml", changes)
    found = _workload(recipe, next(iter(KNOWN.values())), Assumptions(zero_advantage=0.4, kept=0.5))
    assert found.kept == (0.5 if recipe.groups.filter == "refill" else 1)
    assert (found.trained, found.logprob_passes) == (pytest.approx(trained), pytest.approx(passes))
