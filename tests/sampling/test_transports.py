"""The file of model weights, read by safetensors itself."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from jaxrl.config import from_dict
from jaxrl.errors import InputError
from jaxrl.models import Config, decoder, initialize
from jaxrl.parallel import processes
from jaxrl.parallel.mesh import mesh_over, sharding_of
from jaxrl.sampling import open as open_
from jaxrl.sampling import vllm_plugin
from jaxrl.sampling.transports import files
from jaxrl.types import silent

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
    """Whatever lies there already, of a run that went further, and whatever the versions are."""
    config = CONFIGS["qwen2"]
    leave(tmp_path, "weights_00000099.partial", "weights_00000098.safetensors", "weights_00000002.partial")
    transport, memory = files.Files(config, tmp_path), list[int]()
    with files.own_folder(tmp_path, silent):
        versions = [7, 8, 9, 4, 5, 5, 6, 7]
        for seed, version in enumerate(versions):
            params = initialize(config, seed)
            transport.prepare(params, version)
            published = transport._kept[-1]
            vllm_plugin.verify_digest(published.path, published.blake3)
            wanted = expected(config, params, "bfloat16")
            assert all(x.tobytes() == wanted[name].tobytes() for name, x in read(published.path).items())
            names = {path.name for path in tmp_path.iterdir()} - {"lock"}
            two = {f"weights_{v:08d}.safetensors" for v in versions[max(0, seed - 1) : seed + 1]}
            assert names in (two, {published.path.name})  # one is left where a version comes twice
            memory.append(published.path.stat().st_ino)
        assert memory[2] == memory[0] and memory[3] == memory[1]
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def leave(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"x" * 10**6)


def test_no_other_user_can_read_weights(tmp_path: Path) -> None:
    config, folder = CONFIGS["qwen2"], tmp_path / "shared" / "weights"
    folder.mkdir(parents=True, mode=0o755)
    before = os.umask(0)
    try:
        with files.own_folder(folder, silent):
            published = files.write(initialize(config, 0), config, folder, 0)
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert stat.S_IMODE(published.path.stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_a_folder_of_others_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    leave(target, "weights_00000001.safetensors")
    link.symlink_to(target)
    (tmp_path / "file").touch()
    for folder in (link, tmp_path / "file"):
        with (
            pytest.raises(InputError, match="is no folder of this user; delete it"),
            files.own_folder(folder),
        ):
            pass
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(InputError, match="is no folder of this user; delete it"), files.own_folder(target):
        pass
    assert [path.name for path in target.iterdir()] == ["weights_00000001.safetensors"]


def test_no_link_is_followed(tmp_path: Path) -> None:
    config, other = CONFIGS["qwen2"], tmp_path / "other"
    other.write_text("of another user")
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("weights_00000000.safetensors", "weights_00000000.partial", "weights_00000009.safetensors"):
        (folder / name).symlink_to(other)
    files.write(initialize(config, 0), config, folder, 0)
    assert not (folder / "weights_00000000.safetensors").is_symlink()
    with pytest.raises(
        InputError, match="cannot be written"
    ):  # as if it had been put in the place of an own file
        files.write(initialize(config, 0), config, folder, 1, spare=folder / "weights_00000009.safetensors")
    with files.own_folder(folder, silent):
        assert [path.name for path in folder.iterdir()] == ["lock"]
    assert other.read_text() == "of another user"


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        files.own_folder(tmp_path, silent),
        pytest.raises(InputError, match=f"process {os.getpid()} on .* is at work there .publishing"),
        files.own_folder(tmp_path, silent),
    ):
        pass


def test_only_the_first_process_of_a_run_has_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one that ends takes no file of the first with it."""
    config = CONFIGS["qwen2"]
    sampler = {"folder": str(tmp_path), "urls": ["http://127.0.0.1:1"]}
    values = {"rollout": {"engine": "vllm"}, "sampler": sampler, "run": {"directory": "~/a/run"}}
    recipe, mesh = from_dict(values), mesh_over(jax.devices()[:1])
    with ExitStack() as first:
        transport = open_._open_transport(recipe, config, silent, first)
        transport.prepare(initialize(config, 0), 3)
        with monkeypatch.context() as patch:
            patch.setattr(processes, "chief", lambda: False)
            with open_.open_own_sampler(recipe, tmp_path, config, mesh, silent):
                pass
        (folder,) = tmp_path.iterdir()
        assert folder.name.startswith(f"jaxrl-{os.geteuid()}-run-")
        assert (folder / "weights_00000003.safetensors").exists()
    assert not list(folder.glob("weights_*"))


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
    assert not list(tmp_path.iterdir())  # nor is memory taken by what was written of it


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
