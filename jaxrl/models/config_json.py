"""config.json in both of its dialects, to and from the decoder's Config.

Reads it as transformers 5 does: what a field that is left out means, and which of two spellings counts.
"""

from __future__ import annotations

import math
from pathlib import Path

from jaxrl.errors import InputError
from jaxrl.json_fields import Fields, read_json, shown
from jaxrl.models import decoder
from jaxrl.models.decoder import Config
from jaxrl.rope import DEFAULT_THETA, describe_rope, read_rope
from jaxrl.types import JsonObject

__all__ = ["describe", "read_config", "read_json"]

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
# Of transformers' config classes, where a field is left out.
POSITIONS = {"qwen2": 32_768, "qwen3": 32_768, "llama": 2048}
QWEN_KV_HEADS, QWEN3_HEAD_DIM, QWEN_WINDOW, QWEN_WINDOW_LAYERS = 32, 128, 4096, 28
# Bounds that no model reaches, so that nonsense is refused before anything is allocated.
MOST_LAYERS, MOST_PARAMETERS = 10_000, 10**13


def read_config(folder: Path) -> Config:
    """Reads config.json, of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Raises:
      InputError: if it is missing, of another architecture, or has a feature that the decoder lacks.
    """
    path = folder / "config.json"
    raw = read_json(path)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise InputError(
            f"{path}: model_type = {shown(family)} is not supported; {', '.join(ARCHITECTURES)} are"
        )
    # where transformers takes null as none
    fields = Fields(str(path), raw).without_null(
        "num_key_value_heads", *() if family == "qwen3" else ("head_dim",)
    )
    rope = _rope(fields)
    _require_plain(fields, family, rope)
    positions = fields.integer("max_position_embeddings", POSITIONS[family])
    theta, scaling = read_rope(str(path), rope, positions)
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = heads if family == "llama" or raw.get("num_key_value_heads", 0) is None else QWEN_KV_HEADS
    config = Config(
        family=family,  # type: ignore[arg-type]
        vocab_size=fields.integer("vocab_size"),
        width=width,
        layers=fields.integer("num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", kv_heads),
        head_dim=fields.integer("head_dim", QWEN3_HEAD_DIM if family == "qwen3" else width // heads),
        mlp_width=fields.integer("intermediate_size"),
        rope_theta=theta,
        norm_epsilon=fields.real("rms_norm_eps", 1e-6),
        tied=fields.flag("tie_word_embeddings", False),
        max_positions=positions,
        rope_scaling=scaling,
    )
    _require_sizes(str(path), config)
    return config


def _rope(fields: Fields) -> JsonObject:
    """The RoPE parameters that transformers would compute with, wherever they are written.

    `rope_scaling` counts before `rope_parameters`, a theta inside before one outside, and a length of the pretraining
    outside before one inside.
    """
    raw = fields.values
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = {} if raw.get(name) is None else raw[name]
    if not isinstance(rope, dict):
        raise InputError(f"{fields.where}: {name} = {shown(rope)} is not an object")
    outside = {"rope_theta": raw.get("rope_theta", DEFAULT_THETA)}
    over = {k: raw[k] for k in ("original_max_position_embeddings",) if k in raw}
    return outside | rope | over


def _require_plain(fields: Fields, family: str, rope: JsonObject) -> None:
    """Raises: InputError for what changes the function and is not in the decoder."""
    raw = fields.values
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    refused = {
        "quantization_config": raw.get("quantization_config") is not None,
        "per_layer_config": raw.get("per_layer_config") is not None,
        "sliding-window attention": _has_sliding_window(fields, family),
        f"partial_rotary_factor = {shown(partial)}": partial not in (None, 1),
        f"hidden_act = {shown(raw.get('hidden_act'))}": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": family != "qwen2" and raw.get("attention_bias", False) is not False,
        "mlp_bias": raw.get("mlp_bias", False) is not False,
    }
    if any(refused.values()):
        features = ", ".join(feature for feature, present in refused.items() if present)
        raise InputError(f"{fields.where}: {features} is not supported; only the plain {family} decoder is")


def _has_sliding_window(fields: Fields, family: str) -> bool:
    """Whether any layer has a window.

    transformers' Llama knows no windows, but vLLM follows `sliding_window` in it too: it has to be switched off.
    """
    raw, layers = fields.values, fields.integer("num_hidden_layers", most=MOST_LAYERS)
    used = family != "llama" and fields.flag("use_sliding_window", False)
    first = 0 if family == "llama" else fields.integer("max_window_layers", QWEN_WINDOW_LAYERS, least=0)
    types = raw.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise InputError(f"{fields.where}: layer_types = {shown(types)} is not a list of {layers} names")
        return any(kind != "full_attention" for kind in types)
    if family == "llama":
        return bool(raw.get("sliding_window")) and bool(raw.get("use_sliding_window", True))
    return used and raw.get("sliding_window", QWEN_WINDOW) is not None and first < layers


def _require_sizes(where: str, c: Config) -> None:
    """Raises: InputError for sizes that do not go together, or that no machine could hold."""
    if c.heads % c.kv_heads:
        raise InputError(
            f"{where}: num_attention_heads = {c.heads} is not a multiple of num_key_value_heads = {c.kv_heads}"
        )
    if c.head_dim % 2:
        raise InputError(f"{where}: head_dim = {c.head_dim} is odd; RoPE turns pairs of dimensions")
    if c.family == "llama" and c.width % c.heads:
        raise InputError(
            f"{where}: hidden_size = {c.width} is not a multiple of num_attention_heads = {c.heads}"
        )
    count = sum(math.prod(spec.shape) * (c.layers if spec.stacked else 1) for spec in decoder.specs(c))
    if count > MOST_PARAMETERS:
        raise InputError(
            f"{where}: its sizes make {count} parameters, more than {MOST_PARAMETERS}; correct them"
        )


def describe(c: Config) -> JsonObject:
    """The fields of config.json that describe a model."""
    rope = describe_rope(c.rope_theta, c.rope_scaling)
    # transformers 4 reads the scaling from there, and 5 lets it count before `rope_parameters`
    scaling = {"rope_scaling": rope} if c.rope_scaling else {}
    return scaling | {
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
        "rope_parameters": rope,
        "tie_word_embeddings": c.tied,
    }
