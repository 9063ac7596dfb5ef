"""The file of model weights, read by safetensors itself."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from jaxrl.errors import InputError
from jaxrl.models import Config, decoder, initialize
from jaxrl.parallel.mesh import mesh_over, sharding_of
from jaxrl.sampling import vllm_plugin
from jaxrl.sampling.transports import files

SIZES = {"vocab_size": 40, "width": 16, "heads": 4, "kv_heads": 2, "head_dim": 4, "mlp_width": 24}
SHAPE = SIZES | {"layers": 3, "rope_theta": 1e4, "norm_epsilon": 1e-6, "max_positions": 64}
CONFIGS = {
    "qwen2": Config("qwen2", tied=False, **SHAPE),
    "qwen3-tied": Config("qwen3", tied=True, **SHAPE),
    "llama": Config("llama", tied=False, **SHAPE),
}


def read(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="flax") as file:
        return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def expected(config: Config, params: decoder.Params, dtype: str) -> dict[str, np.ndarray]:
    found = {}
    for spec, array in zip(decoder.specs(config), jax.tree.leaves(params), strict=True):
        array = np.asarray(jnp.asarray(array, dtype))
        layers = enumerate(array) if spec.stacked else [(0, array)]
        found |= {spec.name.format(i): part for i, part in layers}
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("devices", [1, 8])
def test_what_is_written_is_the_model(name: str, dtype: str, devices: int, tmp_path: Path) -> None:
    config = CONFIGS[name]
    mesh = mesh_over(jax.devices()[:devices])
    params = jax.tree.map(lambda x: jax.device_put(x, sharding_of(x.shape, mesh)), initialize(config, 1))
    published = files.write(params, config, tmp_path, 7, dtype)
    found, wanted = read(published.path), expected(config, params, dtype)
    assert found.keys() == wanted.keys() and ("lm_head.weight" in found) != config.tied
    for key, array in wanted.items():
        assert found[key].dtype == array.dtype and found[key].tobytes() == array.tobytes(), key
    vllm_plugin.verify_digest(published.path, published.blake3)


def test_two_generations_are_kept_and_old_space_is_used_again(tmp_path: Path) -> None:
    config = CONFIGS["qwen2"]
    (tmp_path / "weights_00000099.partial").write_bytes(b"x" * 10**6)  # of a run that was killed, and longer
    for version in range(5):
        params = initialize(config, version)
        published = files.write(params, config, tmp_path, version)
        vllm_plugin.verify_digest(published.path, published.blake3)
        wanted = expected(config, params, "bfloat16")
        assert all(x.tobytes() == wanted[name].tobytes() for name, x in read(published.path).items())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["weights_00000003.safetensors", "weights_00000004.safetensors"]


def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    published = files.write(initialize(config, 0), config, tmp_path, 0)
    data = bytearray(published.path.read_bytes())
    data[-100] ^= 1
    published.path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        vllm_plugin.verify_digest(published.path, published.blake3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_published(value: float, tmp_path: Path) -> None:
    config = CONFIGS["qwen2"]
    params = initialize(config, 0)
    params["layers"]["up"] = params["layers"]["up"].at[1, 2, 3].set(value)
    with pytest.raises(InputError, match=r"mlp\.up_proj\.weight holds values that are not finite"):
        files.write(params, config, tmp_path, 0)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """There is a file in its place: root may write into every folder."""
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/weights_00000000\.safetensors: cannot be written"):
        files.write(initialize(CONFIGS["qwen2"], 0), CONFIGS["qwen2"], tmp_path / "file", 0)


def test_what_is_not_the_model_is_not_published(tmp_path: Path) -> None:
    params = initialize(CONFIGS["qwen2"], 0)
    for other in (CONFIGS["llama"], CONFIGS["qwen3-tied"]):
        with pytest.raises(InputError, match="not those of the model"):
            files.write(params, other, tmp_path, 0)
    del params["layers"]["up"]
    with pytest.raises(InputError, match="not those of the model"):
        files.write(params, CONFIGS["qwen2"], tmp_path, 0)
