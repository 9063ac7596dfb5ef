"""config.json in both of its dialects, to and from the decoder's Config."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from jaxrl.errors import InputError
from jaxrl.models.decoder import Config
from jaxrl.types import JsonObject

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def read_config(folder: Path) -> Config:
    """Reads config.json, of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

    Raises:
      InputError: if it is missing, of another architecture, or has a feature that the decoder lacks.
    """
    path = folder / "config.json"
    raw = read_json(path)
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        raise InputError(f"{path}: model_type = {family!r} is not supported; {', '.join(ARCHITECTURES)} are")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_parameters = {rope!r} is not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        f"rope scaling of type {kind!r}": kind != "default",
        "sliding-window attention": bool(raw.get("use_sliding_window")),
        f"hidden_act = {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": family != "qwen2" and bool(raw.get("attention_bias")),
        "mlp_bias": bool(raw.get("mlp_bias")),
    }
    if any(refused.values()):
        features = ", ".join(feature for feature, present in refused.items() if present)
        raise InputError(f"{path}: {features} is not supported; only the plain {family} decoder is")
    fields = raw | rope
    integer, real = functools.partial(_integer, path, fields), functools.partial(_real, path, fields)
    heads = integer("num_attention_heads")
    return Config(
        family=family,
        vocab_size=integer("vocab_size"),
        width=integer("hidden_size"),
        layers=integer("num_hidden_layers"),
        heads=heads,
        kv_heads=integer("num_key_value_heads", heads),
        head_dim=integer("head_dim", integer("hidden_size") // heads),
        mlp_width=integer("intermediate_size"),
        rope_theta=real("rope_theta", 10_000.0),
        norm_epsilon=real("rms_norm_eps", 1e-6),
        tied=bool(raw.get("tie_word_embeddings", False)),
        max_positions=integer("max_position_embeddings", 32_768),
    )


def _integer(path: Path, fields: JsonObject, name: str, default: int | None = None) -> int:
    return int(_positive(path, fields, name, default, (int,)))


def _real(path: Path, fields: JsonObject, name: str, default: float) -> float:
    return float(_positive(path, fields, name, default, (int, float)))


def _positive(
    path: Path, fields: JsonObject, name: str, default: float | None, kinds: tuple[type, ...]
) -> float:
    """A field that has to be a positive number of one of these types."""
    value = default if fields.get(name) is None else fields[name]
    if value is None:
        raise InputError(f"{path}: the field {name} is missing")
    if type(value) not in kinds or value <= 0:
        raise InputError(f"{path}: {name} = {value!r} is not a positive {kinds[-1].__name__}")
    return value


def describe(c: Config) -> JsonObject:
    """The fields of config.json that describe a model."""
    return {
        "architectures": [ARCHITECTURES[c.family]],
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_epsilon,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": c.tied,
    }


def read_json(path: Path) -> JsonObject:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: missing; a Hugging Face folder has one") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value
