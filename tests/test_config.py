import ast
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from jaxrl import config
from jaxrl.config import Recipe
from jaxrl.errors import InputError

# JustRL as run: the released script, and verl v0.4.0's defaults where the script is silent.
JUSTRL = {
    "run.steps": 4380,
    "run.seed": 1,
    "model.path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "model.dtype": "bfloat16",
    "model.remat": "auto",  # full in the script: the same gradients
    "data.path": "BytedTsinghua-SIA/DAPO-Math-17k",
    "data.suffix": "\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "data.strip_dapo_wrapper": True,
    "data.chat_template": True,
    "data.max_prompt_tokens": 1024,
    "data.order": "shuffle",
    "rollout.prompts": 256,
    "rollout.samples": 8,
    "rollout.max_tokens": 15_360,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "reward.verifier": "strict_boxed",
    "advantage.center": "group",
    "advantage.scale": "group",
    "advantage.epsilon": 1e-6,
    "loss.clip_low": 0.2,
    "loss.clip_high": 0.28,
    "loss.dual_clip": 10.0,
    "loss.normalization": "token_mean",
    "optimizer.learning_rate": 1e-6,
    "optimizer.warmup_steps": 10,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.999,
    "optimizer.epsilon": 1e-8,
    "optimizer.weight_decay": 0.1,
    "optimizer.max_grad_norm": 1.0,
    "optimizer.minibatch_prompts": 64,
    "checkpoint.every": 50,
}
SOURCE, RULES = (
    ast.parse(Path(config.__file__).with_name(name).read_text()) for name in ("sections.py", "rules.py")
)
FIELDS = {
    f"{section.name}.{field.name}": field
    for section in dataclasses.fields(Recipe)
    if section.name != "stages"
    for field in dataclasses.fields(section.default_factory)
}


def value(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def one_line(path: Path, overrides: list[str] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        config.load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: " if overrides is None else "command line: ")
    return message


@pytest.mark.parametrize("key", JUSTRL)
def test_the_default_is_justrl(key: str) -> None:
    default = value(Recipe(), key)
    assert default == JUSTRL[key] and type(default) is type(JUSTRL[key])


def test_an_empty_recipe_is_the_baseline(tmp_path: Path) -> None:
    recipe = config.load(write(tmp_path, ""))
    assert recipe == Recipe()
    assert recipe.updates_per_step == 4


def test_a_toml_round_trip_loses_nothing(tmp_path: Path) -> None:
    recipe = config.from_dict(
        {
            "run": {"directory": 'a "quoted" \\ path/ü', "seed": 7, "tensorboard": False},
            "data": {"suffix": "\n\ttab \\boxed{}", "prefix": "'''\"\"\"", "order": "replacement"},
            "optimizer": {"learning_rate": 3.3e-7, "epsilon": 1e-15},
            "loss": {"dual_clip": float("inf")},
            "mesh": {"data": 2, "fsdp": 4},
        }
    )
    assert config.load(write(tmp_path, config.to_toml(recipe))) == recipe
    assert config.load(write(tmp_path, config.to_toml(Recipe()))) == Recipe()


def test_integers_do_for_floats(tmp_path: Path) -> None:
    recipe = config.load(write(tmp_path, "[loss]\nclip_low = 0\n"))
    assert recipe.loss.clip_low == 0.0 and isinstance(recipe.loss.clip_low, float)


def test_differences() -> None:
    changed = config.from_dict({"run": {"seed": 2}, "model": {"dtype": "float32"}})
    assert config.differences(Recipe(), Recipe()) == []
    assert config.differences(Recipe(), changed) == [
        "run.seed: 1 -> 2",
        "model.dtype: 'bfloat16' -> 'float32'",
    ]


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "[rollout]\nsamples = 4\nprompts = 128\n[model]\npath = 'here'\n")
    arguments = {
        "--rollout.samples": "16",
        "--optimizer.learning_rate": "2e-5",
        "--optimizer.weight-decay": "0",  # hyphens do too
        "--data.chat_template": "false",  # as TOML writes it
        "--run.tensorboard": "False",
        "--loss.normalization": "dr_grpo",
        "--data.suffix": "",
    }
    recipe = config.load(path, [word for pair in arguments.items() for word in pair])
    expected = config.from_dict(
        {
            "rollout": {"samples": 16, "prompts": 128},
            "model": {"path": "here"},
            "optimizer": {"learning_rate": 2e-5, "weight_decay": 0.0},
            "data": {"chat_template": False, "suffix": ""},
            "run": {"tensorboard": False},
            "loss": {"normalization": "dr_grpo"},
        }
    )
    assert recipe == expected
    for key in FIELDS:
        assert type(value(recipe, key)) is type(value(Recipe(), key)), key


def test_what_is_impossible_is_judged_after_the_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "[rollout]\nmax_tokens = 40_000\n")
    assert "packing.stream_tokens" in one_line(path)
    assert config.load(path, ["--packing.stream_tokens", "43008"]).rollout.max_tokens == 40_000
    assert "packing.stream_tokens" in one_line(write(tmp_path, ""), ["--rollout.max_tokens", "40000"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rollout.samples", "eight"],
        ["--rollout.samples", "8.5"],
        ["--data.chat_template", "maybe"],
        ["--model.dtype", "fp8"],
        ["--rollout.samplez", "8"],
        ["--run.nonsense"],
        ["--rollout.samples"],
    ],
    ids=" ".join,
)
def test_overrides_that_cannot_be_read_exit_with_2(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        config.load(write(tmp_path, ""), arguments)
    assert caught.value.code == 2
    assert arguments[0].lstrip("-").split(".")[-1].replace("_", "-") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[rolout]\nsamples = 8", ("'rolout'", "did you mean 'rollout'?")),
        ("[rollout]\nsample = 8", ("'rollout.sample'", "did you mean 'samples'?")),
        ("[optimizer]\nlerning_rate = 8", ("'optimizer.lerning_rate'", "did you mean 'learning_rate'?")),
        ("[reward]\nzzz = 8", ("'reward.zzz'", "known here: verifier")),
        ("zzz = 8", ("'zzz'", "known here: run, model")),
        ("[model.path]\nx = 1", ("model.path", "valid string")),
        ("rollout = 3", ("rollout = 3", "object")),
        ("[rollout]\nsamples = '8'", ("rollout.samples = '8'", "valid integer")),
        ("[rollout]\nsamples = 8.0", ("rollout.samples = 8.0", "valid integer")),
        ("[rollout]\nsamples = true", ("rollout.samples = True", "valid integer")),
        ("[loss]\nclip_low = 'x'", ("loss.clip_low = 'x'", "valid number")),
        ("[run]\ntensorboard = 1", ("run.tensorboard = 1", "valid boolean")),
        ("[model]\npath = 3", ("model.path = 3", "valid string")),
        ("[model]\ndtype = 'fp8'", ("model.dtype = 'fp8'", "'bfloat16' or 'float32'")),
        ("[rollout]\nsamples = 0", ("rollout.samples = 0", "greater than 0")),
        ("[run]\nsteps = -1", ("run.steps = -1", "greater than or equal to 0")),
        ("[rollout]\ntop_p = 0.0", ("rollout.top_p = 0.0", "greater than 0")),
        ("[rollout]\ntop_p = 1.1", ("rollout.top_p = 1.1", "less than or equal to 1")),
        (
            "[advantage]\nnormalize_std = true",
            ("unknown key 'advantage.normalize_std'", "now advantage.scale"),
        ),
        ('[advantage]\ncenter = "mean"', ("advantage.center = 'mean'", "none, group", "module:function")),
        ('[loss]\nsurrogate = "my loss:f"', ("loss.surrogate = 'my loss:f'", "clip, score, sigmoid")),
        ("[loss]\ndual_clip = 1.0", ("loss.dual_clip = 1.0", "greater than 1")),
        ("[optimizer]\nbeta2 = 1.0", ("optimizer.beta2 = 1.0", "less than 1")),
        ("[optimizer]\nlearning_rate = nan", ("optimizer.learning_rate = nan", "finite")),
        ("[optimizer]\nlearning_rate = inf", ("optimizer.learning_rate = inf", "finite")),
        ("[optimizer]\nmax_grad_norm = nan", ("optimizer.max_grad_norm = nan", "finite")),
    ],
)
def test_a_bad_value_is_named(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    path = write(tmp_path, text)
    message = one_line(path)
    assert all(word in message for word in words), message
    with pytest.raises(InputError) as caught:  # and overrides of other keys do not hide it
        config.load(path, ["--run.seed", "3"])
    assert str(caught.value) == message


def refused(number: float) -> set[str]:
    """The numeric fields that are named where all of them are this number."""
    values: dict[str, dict[str, float]] = {}
    for key in NUMERIC:
        section, name = key.split(".")
        values.setdefault(section, {})[name] = number
    with pytest.raises(InputError) as caught:
        config.from_dict(values)
    return {line.removeprefix("recipe: ").split(" = ")[0] for line in str(caught.value).splitlines()}


NUMERIC = {key for key in FIELDS if type(value(Recipe(), key)) in (int, float)}
REAL = {key for key in NUMERIC if type(value(Recipe(), key)) is float}
UNBOUNDED = {"loss.dual_clip", "loss.log_ratio_bound", "sampler.correction_cap"}  # infinity turns them off


def test_a_number_that_devices_do_not_hold_is_named_in_every_field() -> None:
    for number in (math.nan, -math.inf, 1e-46, -1e-400 or -1e-46):
        assert refused(number) == NUMERIC
    negative = {"reward.wrong", "reward.threshold", "reward.failure_value"}  # what may be
    assert refused(-1) == NUMERIC - negative
    for number in (math.inf, 1e39, 10**400):
        assert refused(number) >= NUMERIC - UNBOUNDED
    for number in (1 << 31, 1 << 63):
        assert refused(number) >= NUMERIC - REAL - {"run.seed"}
    assert refused(1 << 64) >= NUMERIC - REAL
    assert {"optimizer.beta1", "optimizer.beta2"} <= refused(0.99999999)


def test_each_of_several_problems_has_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "[run]\nsteps = -1\nseeed = 1\n[loss]\nclip_low = 'a'\n")
    with pytest.raises(InputError) as caught:
        config.load(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and all(line.startswith(f"{path}: ") for line in lines)


IMPOSSIBLE = {
    "functions_in_two_places": (
        {"reward": {"function": "a:b", "functions": [{"path": "c:d"}]}},
        ("reward.function and reward.functions", "give one"),
        {"reward": {"function": ""}},
    ),
    "functions_of_one_name": (
        {"reward": {"functions": [{"path": "a:b"}, {"path": "c.py:b"}]}},
        ("reward.functions", "two are named 'b'"),
        {"reward": {"functions": [{"path": "a:b"}, {"path": "c.py:b", "name": "d"}]}},
    ),
    "nothing_to_reward": (
        {"reward": {"verifier": "none"}},
        ('reward.verifier = "none"', "give it, or leave them out"),
        {"reward": {"function": "an-entry-point"}},
    ),
    "rewards_that_may_differ": (
        {"reward": {"function": "a:b"}, "groups": {"rescue": True}},
        ("groups.rescue", "reward.function"),
        {"groups": {"rescue": False}},
    ),
    "thoughts_that_nobody_reads": (
        {"reward": {"verifier": "math_verify", "thoughts": "closed"}},
        ('reward.thoughts = "closed"', 'reward.verifier = "math_verify"', "leave it out"),
        {"reward": {"thoughts": "required"}},
    ),
    "stream_too_short": (
        {"rollout": {"max_tokens": 31_745}},
        ("packing.stream_tokens", "data.max_prompt_tokens", "rollout.max_tokens", "raise it to 34816"),
        {"packing": {"stream_tokens": 34_816}},
    ),
    "stream_not_in_buckets": (
        {"packing": {"bucket_tokens": 3000, "logprob_chunk": 512}},
        ("packing.stream_tokens", "packing.bucket_tokens", "use 192000"),
        {"packing": {"stream_tokens": 192_000}},
    ),
    "chunk_does_not_divide": (
        {"packing": {"logprob_chunk": 1000}},
        ("packing.stream_tokens", "packing.logprob_chunk", "use a divisor"),
        {"packing": {"logprob_chunk": 1024}},
    ),
    "nothing_is_forgotten": (
        {"mesh": {"gather": "layer"}, "model": {"remat": "none"}},
        ("mesh.gather", "model.remat", 'set model.remat to "full"'),
        {"model": {"remat": "full"}},
    ),
    "minibatch_does_not_divide": (
        {"optimizer": {"minibatch_prompts": 60}},
        ("optimizer.minibatch_prompts", "rollout.prompts = 256", "use a divisor"),
        {"optimizer": {"minibatch_prompts": 32}},
    ),
    "penalty_longer_than_answers": (
        {"reward": {"overlong_tokens": 20_000}},
        ("reward.overlong_tokens = 20000", "rollout.max_tokens = 15360", "lower it"),
        {"reward": {"overlong_tokens": 15_360}},
    ),
    "cut_off_for_a_better_reward": (
        {"length": {"truncated_factor": 0.0}},
        ("length.truncated_factor = 0.0", "reward.wrong = -1.0", "set both to 0"),
        {"reward": {"wrong": 0.0}},
    ),
    "a_gate_of_nothing": (
        {"entropy": {"quantile": 0.8}, "kl": {"place": "reward"}},
        ("entropy.quantile = 0.8", 'kl.place = "loss"'),
        {"kl": {"place": "loss"}},
    ),
    "a_cosine_that_is_never_on": (
        {"length": {"cosine_off": 5}},
        ("length.cosine_off = 5", "set cosine_on"),
        {"length": {"cosine_on": 100}},
    ),
    "part_of_the_vocabulary": (
        {"rollout": {"top_p": 0.9, "top_k": 20}},
        ("rollout.top_p = 0.9", "rollout.top_k = 20", "whole vocabulary", "eval.top_p"),
        {"rollout": {"top_p": 1.0, "top_k": 0}},
    ),
    "nothing_to_evaluate_on": (
        {"eval": {"every": 50}},
        ("eval.every = 50", "eval.path", "eval.benchmarks"),
        {"eval": {"benchmarks": "aime24"}},
    ),
    "greedy_training": (
        {"rollout": {"temperature": 0.0, "samples": 5}},
        ("rollout.temperature", "5 times", "raise it"),
        {"rollout": {"temperature": 0.5}},
    ),
    "no_servers": (
        {"rollout": {"engine": "vllm"}},
        ("rollout.engine", "sampler.urls", "sampler.servers", "either"),
        {"sampler": {"servers": 2}},
    ),
    "colder_than_servers_sample": (
        {"rollout": {"temperature": 0.005}},
        ("rollout.temperature = 0.005", "0.01 or more"),
        {"rollout": {"temperature": 0.01}},
    ),
    "a_server_twice": (
        {"sampler": {"urls": ["http://a:80", "A:80/"]}},
        ("sampler.urls", "http://a:80, http://a:80", "name each once"),
        {"sampler": {"urls": ["http://a:80", "http://a:81"]}},
    ),
    "ahead_on_the_same_devices": (
        {"sampler": {"max_staleness": 1}},
        ("sampler.max_staleness", "rollout.engine"),
        {"rollout": {"engine": "vllm"}, "sampler": {"servers": 2}},
    ),
    "solved_prompts_without_a_stage_before": (
        {"data": {"drop_solved": 0.9}},
        ("data.drop_solved = 0.9", "stage before"),
        {"stages": [{"until": 10}, {"until": 20}]},
    ),
    "a_restart_of_what_is_new": (
        {"stages": [{"until": 10, "restart": ["data"]}]},
        ("stages.0.restart", "leave it out"),
        {"stages": [{"until": 10}, {"until": 20, "restart": ["data"]}]},
    ),
    "a_filter_and_whole_steps": (
        {"groups": {"filter": "drop"}, "loss": {"normalization": "verl_dynamic"}},
        ("groups.filter", "verl_dynamic", "token_mean"),
        {"loss": {"normalization": "token_mean"}},
    ),
    "a_stage_that_ends_before_it_begins": (
        {"stages": [{"until": 10}, {"name": "late", "until": 10}]},
        ("stage 'late'", "until = 10 is not after 10"),
        {"stages": [{"until": 10}, {"name": "late", "until": 11}]},
    ),
    "a_stage_with_another_mesh": (
        {"stages": [{"name": "wide", "until": 10, "mesh": {"fsdp": 8}}]},
        ("stage 'wide'", "mesh.fsdp", "[mesh]"),
        {"stages": [{"name": "wide", "until": 10}], "mesh": {"fsdp": 8}},
    ),
    "two_stages_of_a_name": (
        {"stages": [{"name": "8k", "until": 10}, {"name": "8k", "until": 20}]},
        ("two stages", "'8k'"),
        {"stages": [{"name": "8k", "until": 10}, {"name": "16k", "until": 20}]},
    ),
    "a_band_without_a_share": (
        {"groups": {"filter": "drop", "keep": [0.5, 0.6]}},
        ("groups.keep = [0.5, 0.6]", "right answers of 8", "widen"),
        {"groups": {"keep": [0.5, 0.7]}},
    ),
    "rescue_ahead": (
        {
            "groups": {"filter": "refill", "rescue": True},
            "rollout": {"engine": "vllm"},
            "sampler": {"servers": 2, "max_staleness": 1},
        },
        ("groups.rescue", "sampler.max_staleness = 0"),
        {"sampler": {"max_staleness": 0}},
    ),
    "a_reset_of_no_reference": (
        {"kl": {"reset_every": 100}},
        ("kl.reset_every = 100", "kl.coefficient"),
        {"kl": {"coefficient": 1e-3}},
    ),
    "a_hint_without_a_column": (
        {"data": {"hint_share": 0.5}},
        ("data.hint_share = 0.5", "data.hint_column"),
        {"data": {"hint_column": "solution"}},
    ),
    "no_length_between": (
        {"data": {"min_characters": 300, "max_characters": 200}},
        ("data.min_characters = 300", "data.max_characters = 200"),
        {"data": {"max_characters": 400}},
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_combination_is_refused_and_the_remedy_works(name: str) -> None:
    values, words, remedy = IMPOSSIBLE[name]
    with pytest.raises(InputError) as caught:
        config.from_dict(values, "here")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("here: ")
    assert all(word in message for word in words), message
    for section, keys in remedy.items():
        values = values | {section: values.get(section, {}) | keys if isinstance(keys, dict) else keys}
    config.from_dict(values)


def test_every_impossible_combination_is_tried() -> None:
    functions = [node for node in ast.walk(RULES) if isinstance(node, ast.FunctionDef)]
    rules = [node for node in functions if node.name.endswith("_rules")]
    assert sum(ast.unparse(rule).count("yield (") for rule in rules) == len(IMPOSSIBLE)


def test_a_missing_recipe(tmp_path: Path) -> None:
    message = one_line(tmp_path / "absent.toml")
    assert "No such file" in message and "give the path" in message
    assert "Is a directory" in one_line(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"[run",
        b"a = ",
        b"[run]\nseed = 1\nseed = 2",
        b"\xff\xfe",
        b"a = " + b"9" * 5000,
        b"a = " + b"[" * 9999,
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_file_that_is_not_toml(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    assert "not valid TOML" in one_line(path)


def docstrings() -> dict[str, str]:
    """Docstring by section.field, from the source: an attribute's docstring is the string that follows it."""
    sections = {
        field.default_factory.__name__: field.name
        for field in dataclasses.fields(Recipe)
        if field.name != "stages"
    }
    found = {}
    for node in SOURCE.body:
        if isinstance(node, ast.ClassDef) and node.name in sections:
            for one, two in zip(node.body, [*node.body[1:], None], strict=True):
                if (
                    isinstance(one, ast.AnnAssign)
                    and isinstance(two, ast.Expr)
                    and isinstance(two.value, ast.Constant)
                ):
                    found[f"{sections[node.name]}.{one.target.id}"] = two.value.value
    return found


def test_every_field_is_documented() -> None:
    assert set(docstrings()) == set(FIELDS)
    assert all(text.endswith(".") and len(text) > 10 for text in docstrings().values())


def test_help_shows_every_field_with_its_docstring(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as caught:
        config.load(write(tmp_path, "[rollout]\nsamples = 77"), ["--help"])
    assert caught.value.code == 0
    help_text = re.sub(r"[\s│]+", "", capsys.readouterr().out)
    for key, text in docstrings().items():
        if key in ("data.sources", "reward.functions"):  # each of the file's has flags of its own
            continue
        start = help_text.index("--" + key.replace("_", "-"))
        assert re.sub(r"\s+", "", text) in help_text[start : start + 600], key
    assert "(default:77)" in help_text


MIXED = """
[[data.sources]]
path = "a.jsonl"
weight = 3
answer_pattern = "#### (.+)"
[[data.sources]]
path = "b.jsonl"
"""


def test_sources_of_data_come_back_from_files_and_take_overrides(tmp_path: Path) -> None:
    recipe = config.load(write(tmp_path, MIXED))
    assert [(s.path, s.weight, s.answer_pattern) for s in recipe.data.sources] == [
        ("a.jsonl", 3.0, "#### (.+)"),
        ("b.jsonl", 1.0, ""),
    ]
    assert config.load(write(tmp_path, config.to_toml(recipe))) == recipe
    changed = config.load(write(tmp_path, MIXED), ["--data.sources.1.weight", "2"])
    assert [s.weight for s in changed.data.sources] == [3.0, 2.0]
    assert [line.partition(":")[0] for line in config.differences(recipe, changed)] == ["data.sources"]


FUNCTIONS = """
[[reward.functions]]
path = "mine.py:score"
weight = 3
[[reward.functions]]
path = "theirs:score"
name = "theirs"
"""


def test_functions_come_back_from_files_with_whole_paths_and_take_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = write(tmp_path, FUNCTIONS)
    assert config.load(path).reward.functions[0].path == "mine.py:score"  # it is nowhere yet
    (tmp_path / "here" / "mine.py").touch()
    assert config.load(path).reward.functions[0].path == f"{tmp_path}/here/mine.py:score"
    (tmp_path / "mine.py").touch()
    recipe = config.load(path, ["--reward.functions.1.weight", "0"])
    found = [(f.path, f.weight, f.title) for f in recipe.reward.functions]
    assert found == [(f"{tmp_path}/mine.py:score", 3.0, "score"), ("theirs:score", 0.0, "theirs")]
    assert config.load(write(tmp_path, config.to_toml(recipe))) == recipe
    stages = "[[stages]]\nuntil = 2\nreward.function = 'mine.py:score'\n"
    staged = config.load(write(tmp_path, stages))
    assert staged.stages[0].changes["reward"]["function"] == f"{tmp_path}/mine.py:score"


@pytest.mark.parametrize("path", ["mine.py", "mine.py:", "my module:f", "a:b:c", "a.py:1"])
def test_what_names_no_function_is_refused(path: str) -> None:
    with pytest.raises(InputError, match=r'reward.function = .*not a "FILE.py:FUNCTION"'):
        config.from_dict({"reward": {"function": path}})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "a", "wieght": 1}, "unknown key 'data.sources.0.wieght'; did you mean 'weight'?"),
        ({"path": "a", "weight": 0}, "data.sources.0.weight = 0: input should be greater than 0"),
        ({"weight": 1}, "'data.sources.0.path' is missing"),
        (
            {"path": "a", "answer_pattern": "("},
            "data.sources.0.answer_pattern = '(': value error, not a regular",
        ),
        ({"path": "a", "answer_pattern": "x"}, "0 groups; the answer is one group"),
    ],
)
def test_sources_that_cannot_be_are_named(source: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        config.from_dict({"data": {"sources": [source]}})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_home_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    path = tmp_path / "recipe.toml"
    path.write_text('[run]\ndirectory = "~/runs/x"\n[data]\npath = "~/rows.jsonl"\n')
    recipe = config.load(path, ["--model.path", "~/base"])
    paths = (recipe.run.directory, recipe.data.path, recipe.model.path)
    assert paths == ("/home/me/runs/x", "/home/me/rows.jsonl", "/home/me/base")


@pytest.mark.parametrize(
    ("spelled", "url"),
    {
        "http://10.0.0.2:8000/": "http://10.0.0.2:8000",
        " 10.0.0.2:8000 ": "http://10.0.0.2:8000",
        "HTTP://Node-1.Example:8000//": "http://node-1.example:8000",
        "https://node_1": "https://node_1",
        "[FD00:0:0::1]:8000": "http://[fd00::1]:8000",
    }.items(),
)
def test_a_servers_url_has_one_spelling(spelled: str, url: str) -> None:
    recipe = config.from_dict({"rollout": {"engine": "vllm"}, "sampler": {"urls": [spelled]}})
    assert recipe.sampler.urls == (url,)
    assert config.from_dict(config.to_dict(recipe)) == recipe


NO_SERVERS = [
    *["", "http://", "http:///v1", "fd00::1:8000", "http://[fd00::1", "http://[zz]:1", "http://[fe80::1%eth0]:80"],
    *["http://a:65536", "http://a:0", "http://a:b", "http://a b:80", "ftp://a:80", "http:/a:80", "http://a,b"],
    *["http://user@a:80", "http://:key@a:80", "http://a:80/v1", "http://a:80?key=1", "http://a:80#x"],
]  # fmt: skip


@pytest.mark.parametrize("spelled", NO_SERVERS)
def test_what_is_no_url_of_a_server_is_named(spelled: str) -> None:
    with pytest.raises(InputError, match=r"sampler\.urls\.0 = .*a server|sampler\.urls\.0 = .*of a server"):
        config.from_dict({"rollout": {"engine": "vllm"}, "sampler": {"urls": [spelled]}})
