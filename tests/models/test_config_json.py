"""What config.json means: the same as to transformers, or refused in a line."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrl import json_fields
from jaxrl.errors import InputError
from jaxrl.models import config_json, hf
from jaxrl.models.config_json import read_json
from jaxrl.types import JsonObject

FAMILIES = ("qwen2", "qwen3", "llama")
SIZES = {
    "vocab_size": 104,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
}
FULL, SLIDING = "full_attention", "sliding_attention"
# Fields that are left out or take one of these.
CHOICES: dict[str, list[object]] = {
    "num_key_value_heads": [8, 32, None, 5, 2.0, "8"],
    "num_attention_heads": [32, 64, 7, 16],
    "head_dim": [6, 128, None, 7, 0],
    "hidden_act": ["silu", "gelu", None],
    "max_position_embeddings": [4096, None, 128.0],
    "rms_norm_eps": [1e-5, None, "1e-5"],
    "tie_word_embeddings": [True, False, None, 1, "false"],
    "rope_theta": [5e5, 10_000, "1e4"],
    "rope_scaling": [None, {}, {"type": "linear", "factor": 2.0}, "linear"],
    "rope_parameters": [None, {}, {"rope_type": "default", "rope_theta": 7e4}, {"rope_theta": 7e4}],
    "use_sliding_window": [True, False, None],
    "sliding_window": [None, 64],
    "max_window_layers": [0, 2, 3, 28, None],
    "layer_types": [None, [FULL] * 3, [FULL, FULL, SLIDING], [FULL] * 2],
    "attention_bias": [False, True, None],
    "mlp_bias": [False, True],
    "partial_rotary_factor": [None, 1.0, 0.5],
    "pretraining_tp": [1, 2],
    "attention_dropout": [0.0, 0.1],
    "quantization_config": [None, {"quant_method": "awq"}],
}


def written(folder: Path, raw: JsonObject) -> Path:
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_loads_means_what_it_means_to_transformers(
    family: str, tmp_path: Path, data: st.DataObject
) -> None:
    from transformers import AutoConfig

    chosen = data.draw(st.lists(st.sampled_from(sorted(CHOICES)), max_size=4, unique=True))
    changes = {name: data.draw(st.sampled_from(CHOICES[name])) for name in chosen}
    folder = written(tmp_path, {"model_type": family} | SIZES | changes)
    try:
        c = hf.read_config(folder)
    except InputError as error:
        assert "\n" not in str(error) and str(folder / "config.json") in str(error)
        return
    t = AutoConfig.from_pretrained(folder)
    head_dim = getattr(t, "head_dim", None) or t.hidden_size // t.num_attention_heads
    rope = t.rope_parameters
    theirs = (t.num_attention_heads, t.num_key_value_heads, head_dim, t.rms_norm_eps, t.tie_word_embeddings)
    assert (c.heads, c.kv_heads, c.head_dim, c.norm_epsilon, c.tied) == theirs
    assert (c.max_positions, c.rope_theta) == (t.max_position_embeddings, rope["rope_theta"])
    scaling = ("default", 1.0) if c.rope_scaling is None else (c.rope_scaling.kind, c.rope_scaling.factor)
    assert scaling == (rope["rope_type"], rope.get("factor", 1.0))
    assert t.hidden_act == "silu" and not getattr(t, "mlp_bias", False)
    assert family == "qwen2" or not getattr(t, "attention_bias", False)
    assert set(getattr(t, "layer_types", None) or [FULL]) == {FULL}
    assert c.heads % c.kv_heads == 0 == c.head_dim % 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    t = AutoConfig.for_model(family)
    c = hf.read_config(written(tmp_path, {"model_type": family} | SIZES))
    head_dim = getattr(t, "head_dim", None) if family == "qwen3" else None
    assert (c.max_positions, c.norm_epsilon, c.tied) == (
        t.max_position_embeddings, t.rms_norm_eps, t.tie_word_embeddings,
    )  # fmt: skip
    assert c.rope_theta == t.rope_parameters["rope_theta"] and c.head_dim == (head_dim or 2)
    assert config_json.QWEN_KV_HEADS == AutoConfig.for_model("qwen2").num_key_value_heads == c.kv_heads
    with pytest.raises(InputError, match="num_hidden_layers"):
        hf.read_config(written(tmp_path, {"model_type": family} | SIZES | {"num_hidden_layers": None}))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0, "layer_types": [FULL] * 3},
        {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": {"type": "default"}},
        {
            "quantization_config": None,
            "attention_bias": False,
            "mlp_bias": False,
            "partial_rotary_factor": None,
        },
    ],
)
def test_settings_that_change_nothing_load(changes: JsonObject, tmp_path: Path) -> None:
    for family in ("qwen2", "qwen3"):
        c = hf.read_config(written(tmp_path, {"model_type": family} | SIZES | changes))
        assert c == hf.read_config(written(tmp_path, {"model_type": family} | SIZES))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_sliding_window": True}, None),  # from layer 28 on: there is none
        ({"use_sliding_window": True, "num_hidden_layers": 29}, "sliding-window"),
        ({"use_sliding_window": True, "max_window_layers": 2}, "sliding-window"),
        ({"layer_types": [FULL, FULL, SLIDING]}, "sliding-window"),
        ({"layer_types": [FULL]}, "layer_types"),
        ({"model_type": "llama", "sliding_window": 64}, "sliding-window"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"model_type": ["qwen2"]}, "model_type"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"num_attention_heads": 16}, "num_key_value_heads"),  # of 32, where none are stated
        ({"head_dim": 7}, "head_dim"),
        ({"num_attention_heads": 128}, "head_dim"),
        ({"model_type": "llama", "hidden_size": 65}, "hidden_size"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**30}, "parameters"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"hidden_size": "x" * 10**6}, "hidden_size"),
    ],
    ids=json_fields.shown,
)
def test_settings_that_are_refused_by_name(changes: JsonObject, named: str | None, tmp_path: Path) -> None:
    folder = written(tmp_path, {"model_type": "qwen2"} | SIZES | changes)
    if named is None:
        hf.read_config(folder)
        return
    with pytest.raises(InputError) as caught:
        hf.read_config(folder)
    message = str(caught.value)
    assert message.startswith(str(folder / "config.json")) and named in message
    assert "\n" not in message and len(message) < 1000


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"[" * 10**6, "nested"),
        (b'{"a":' * 10**6, "nested"),
        (b" " * (json_fields.LARGEST_FILE + 1), "bytes"),
        (b'{"rms_norm_eps": NaN}', "NaN"),
        (b'{"rope_theta": -Infinity}', "Infinity"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"", "JSON"),
        (b"[1]", "object"),
    ],
    ids=["lists", "objects", "large", "NaN", "Infinity", "digits", "BOM", "Latin", "empty", "list"],
)
def test_files_that_are_no_json_objects(text: bytes, named: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    assert_refused(path, named)


def test_values_as_deep_as_json_may_be(tmp_path: Path) -> None:
    for depth in range(850, 1000, 5):
        nested = "[" * depth + "]" * depth
        (tmp_path / "config.json").write_text('{"model_type": "qwen2", "hidden_act": ' + nested + "}")
        with pytest.raises(InputError):
            hf.read_config(tmp_path)


def assert_refused(path: Path, named: str) -> None:
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        read_json(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and named in message and "\n" not in message and len(message) < 1000
    assert time.monotonic() < start + 5


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert_refused(path, "missing")
    os.mkfifo(path)
    assert_refused(path, "regular")
    path.unlink()
    path.mkdir()
    assert_refused(path, "regular")
    path.rmdir()
    path.symlink_to(path)
    assert_refused(path, "read")
    path.unlink()
    path.symlink_to("/dev/zero")
    assert_refused(path, "regular")
    assert_refused(tmp_path / ("n" * 300), "read")
