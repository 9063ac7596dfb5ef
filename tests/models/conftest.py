"""Random checkpoints that transformers itself wrote."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.models import decoder
from jaxrl.models.decoder import Config, Params, Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIGS = {"qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "llama": "LlamaConfig"}
# Grouped heads (6 over 2), and for qwen3 a head_dim that is not width / heads.
SHAPE = {
    "vocab_size": 104,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
}


@pytest.fixture(scope="session")
def reference_model() -> Callable[[str, bool], PreTrainedModel]:
    """(family, tied) -> a transformers model whose every parameter, biases and norms included, is random."""
    import torch
    import transformers

    torch.set_num_threads(1)

    @functools.cache
    def build(family: str, tied: bool) -> PreTrainedModel:
        shape = SHAPE | {"head_dim": 16 if family == "qwen3" else 8, "tie_word_embeddings": tied}
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, CONFIGS[family])(**shape))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = 0.2 if parameter.ndim > 1 else 0.5
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(noise + 1 if "norm" in name else noise)
        return model.float().eval()

    return build


@pytest.fixture(scope="session")
def checkpoint(
    reference_model: Callable[[str, bool], PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """(family, tied, dtype) -> a folder with several shards and an index, shared: do not change it."""
    import torch

    @functools.cache
    def write(family: str, tied: bool = False, dtype: str = "float32") -> Path:
        folder = tmp_path_factory.mktemp(f"{family}-{'tied' if tied else 'untied'}-{dtype}")
        model = copy.deepcopy(reference_model(family, tied)).to(getattr(torch, dtype))
        model.save_pretrained(folder, max_shard_size="60kB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        return folder

    return write


@pytest.fixture(scope="session")
def random_params() -> Callable[[Config], Params]:
    """Like `initialize`, but biases and norms are random too and the matrices are large enough to matter."""

    def build(config: Config) -> Params:
        rng = np.random.default_rng(0)

        def create(spec: Spec) -> jax.Array:
            noise = 0.3 * rng.standard_normal(decoder.stacked_shape(spec, config))
            return jnp.asarray(noise + (spec.init == "ones"), jnp.float32)

        return jax.tree.map(create, decoder.declare(config))

    return build
