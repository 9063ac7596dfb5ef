from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pytest

from faults import largest_file
from jaxrl import models
from jaxrl.errors import InputError
from jaxrl.models import hf
from jaxrl.models.decoder import Params
from jaxrl.types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VARIANTS = [(family, tied) for family in ("qwen2", "qwen3", "llama") for tied in (True, False)]
TOKENS = np.random.default_rng(0).integers(0, 104, (3, 17))
SMOLLM2 = Path(os.environ.get("SMOLLM2", Path(__file__).parents[2] / "models/smollm2-135m-instruct"))


def reference_logits(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def logits(model: models.Model, tokens: np.ndarray = TOKENS) -> np.ndarray:
    return np.asarray(model.logits(model.params, tokens))


def assert_same_bits(a: Params, b: Params) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def zeros(config: hf.Config) -> Params:
    shapes = jax.eval_shape(functools.partial(models.initialize, config, 0))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A Qwen2 checkpoint of this test's own."""
    return shutil.copytree(checkpoint("qwen2"), tmp_path / "model")


def edit_config(folder: Path, remove: tuple[str, ...] = (), **changes: object) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if key not in remove}))


def one_line(call: Callable[[], object]) -> str:
    """The message of the InputError that `call` raises."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("family", "tied"), VARIANTS)
def test_logits_are_those_of_transformers(
    family: str, tied: bool, reference_model: Callable[..., PreTrainedModel], checkpoint: Callable[..., Path]
) -> None:
    expected = reference_logits(reference_model(family, tied), TOKENS)
    assert np.std(expected) > 0.5
    got = logits(models.load(checkpoint(family, tied)))
    np.testing.assert_allclose(got, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_bfloat16_weights_are_read_exactly(family: str, checkpoint: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoint(family, False, "bfloat16")
    expected = reference_logits(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), TOKENS)
    got = logits(models.load(folder))
    np.testing.assert_allclose(got, expected, atol=2e-4, rtol=0)


def test_tokens_of_any_rank(checkpoint: Callable[..., Path]) -> None:
    model = models.load(checkpoint("qwen2"))
    rows = logits(model)
    np.testing.assert_allclose(logits(model, TOKENS[1]), rows[1], atol=1e-5)


@pytest.mark.parametrize("dialect", ["rope_theta", "rope_parameters"])
def test_both_dialects_of_rope(
    dialect: str, folder: Path, reference_model: Callable[..., PreTrainedModel]
) -> None:
    if dialect == "rope_theta":
        edit_config(folder, remove=("rope_parameters",), rope_theta=50_000.0, rope_scaling=None)
    else:
        edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 50_000.0})
    assert hf.read_config(folder).rope_theta == 50_000.0
    expected = reference_logits(reference_model("qwen2", False), TOKENS)
    np.testing.assert_allclose(logits(models.load(folder)), expected, atol=2e-4, rtol=0)


def test_fields_that_old_configs_leave_out(folder: Path) -> None:
    edit_config(
        folder,
        remove=("head_dim", "rope_parameters", "rms_norm_eps", "tie_word_embeddings"),
    )
    config = hf.read_config(folder)
    assert (config.head_dim, config.rope_theta) == (8, 10_000.0)
    assert (config.norm_epsilon, config.tied) == (1e-6, False)


@pytest.mark.parametrize(("family", "tied"), VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_save_load_keeps_every_bit(
    family: str, tied: bool, dtype: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    first = models.load(checkpoint(family, tied, dtype), dtype)
    models.save(first, tmp_path / "out")
    second = models.load(tmp_path / "out", dtype)
    assert second.config == first.config
    assert_same_bits(first.params, second.params)


@pytest.mark.parametrize(("family", "tied"), VARIANTS)
@pytest.mark.parametrize("with_folder", [True, False], ids=["from_folder", "from_config"])
def test_transformers_loads_what_is_saved(
    family: str,
    tied: bool,
    with_folder: bool,
    reference_model: Callable[..., PreTrainedModel],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = models.load(checkpoint(family, tied))
    models.save(loaded if with_folder else hf.Model(loaded.config, loaded.params), tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    expected = reference_logits(reference_model(family, tied), TOKENS)
    np.testing.assert_array_equal(reference_logits(model, TOKENS), expected)


def test_saves_as_bfloat16_on_request(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    models.save(models.load(checkpoint("qwen3")), tmp_path, "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    expected = models.load(checkpoint("qwen3"), "bfloat16")
    assert_same_bits(models.load(tmp_path, "bfloat16").params, expected.params)


def test_a_model_without_a_folder_is_described_by_its_config(tmp_path: Path) -> None:
    config = hf.Config("qwen3", 40, 16, 2, 4, 2, 8, 24, 12_345.0, 1e-5, True, 77)
    models.save(hf.Model(config, zeros(config)), tmp_path)
    assert hf.read_config(tmp_path) == config
    raw = json.loads((tmp_path / "config.json").read_text())  # both dialects: servers read either
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 12_345.0
    assert raw["dtype"] == raw["torch_dtype"] == "float32"


def test_companions_travel(folder: Path, tmp_path: Path) -> None:
    companions = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"a": 1}',
        "special_tokens_map.json": "{}",
        "added_tokens.json": "{}",
        "vocab.json": "{}",
        "merges.txt": "a b",
        "chat_template.jinja": "{{ x }}",
        "generation_config.json": '{"eos_token_id": [3, 4]}',
        "LICENSE": "terms",
        "LICENSE.txt": "more terms",
    }
    for name, text in companions.items():
        (folder / name).write_text(text)
    edit_config(folder, a_field_of_others=7)
    (folder / "optimizer.bin").write_text("not a companion")
    out = tmp_path / "deep" / "out"
    models.save(models.load(folder), out)
    assert {name: (out / name).read_text() for name in companions} == companions
    assert {file.name for file in out.iterdir()} == {*companions, "config.json", "model.safetensors"}
    assert json.loads((out / "config.json").read_text())["a_field_of_others"] == 7


def test_saving_over_a_sharded_folder_replaces_it(folder: Path) -> None:
    model = models.load(folder)
    doubled = hf.Model(model.config, jax.tree.map(lambda x: 2 * x, model.params), folder)
    models.save(doubled, folder)
    assert [file.name for file in folder.glob("*safetensors*")] == ["model.safetensors"]
    assert not list(folder.glob("*.tmp"))
    assert_same_bits(models.load(folder).params, doubled.params)


def test_a_save_without_room_leaves_the_old_weights(folder: Path) -> None:
    model = models.load(folder)
    doubled = hf.Model(model.config, jax.tree.map(lambda x: 2 * x, model.params), folder)
    refused = pytest.raises(InputError, match=r"model\.safetensors\.tmp: cannot be written \(File too large")
    with largest_file(2000), refused:
        models.save(doubled, folder)
    assert_same_bits(models.load(folder).params, model.params)


def test_a_save_leaves_files_of_others_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "no model"
    out.mkdir()
    (out / "mine.safetensors").write_bytes(b"mine")
    models.save(models.load(folder), out)
    assert (out / "mine.safetensors").read_bytes() == b"mine"


class Died(BaseException):
    """The end of the process, as seen from inside."""


def dies_at(line: int, call: Callable[[], None]) -> bool:
    """Calls, and dies before the given line of hf.py; whether it came so far.

    Lines count as they are run, each of them twice: a loop's third round is like its second.
    """
    counts, before = collections.Counter[int](), sys.gettrace()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != hf.__file__:
            return None
        if event == "line" and counts[frame.f_lineno] < 2:
            counts[frame.f_lineno] += 1
            if counts.total() > line:
                raise Died
        return trace

    sys.settrace(trace)
    try:
        call()
    except Died:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("layout", ["whole", "index", "no index"])
def test_a_save_that_dies_anywhere_leaves_no_mixture(
    layout: str, tmp_path: Path, random_params: Callable[..., Params]
) -> None:
    from safetensors.numpy import load_file, save_file

    old_folder, new_folder, out = tmp_path / "old", tmp_path / "new", tmp_path / "out"
    config = hf.Config("qwen2", 40, 16, 1, 4, 2, 4, 24, 1e4, 1e-6, False, 64)
    models.save(hf.Model(config, random_params(config)), old_folder)
    new_config = dataclasses.replace(config, rope_theta=5e4)  # of the same shapes
    models.save(hf.Model(new_config, jax.tree.map(lambda x: 2 * x, random_params(config))), new_folder)
    for folder in (old_folder, new_folder):
        (folder / "tokenizer_config.json").write_text(json.dumps({"of": folder.name}))
    if layout != "whole":
        whole = load_file(old_folder / "model.safetensors")
        (old_folder / "model.safetensors").unlink()
        files = {name: f"part{i % 3}.safetensors" for i, name in enumerate(whole)}
        for file in set(files.values()):
            save_file({name: whole[name] for name in whole if files[name] == file}, old_folder / file)
        if layout == "index":
            (old_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    def state(folder: Path) -> tuple[hf.Config, list[bytes], str]:
        model = models.load(folder)
        leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model.params)]
        return model.config, leaves, (folder / "tokenizer_config.json").read_text()

    old, new, model = state(old_folder), state(new_folder), models.load(new_folder)
    outcomes, line = [], 0
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(old_folder, out)
        died = dies_at(line, lambda: models.save(model, out))
        try:
            found = state(out)
            assert found in (old, new), line
            outcomes.append("old" if found == old else "new")
        except InputError as error:
            assert "\n" not in str(error)
            outcomes.append("none")
        models.save(model, out)
        assert state(out) == new
        assert [file.name for file in out.glob("*safetensors*")] == ["model.safetensors"]
        if not died:
            break
        line += 1
    # in this order, and the old one until the new weights are written
    assert list(dict.fromkeys(outcomes)) == ["old", "none", "new"] and outcomes.count("old") > 20, outcomes


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_manifest_and_named_tensors_agree_with_the_file(family: str, checkpoint: Callable[..., Path]) -> None:
    from safetensors import safe_open

    model = models.load(checkpoint(family))
    saved = {}
    for file in checkpoint(family).glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            saved |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    named = list(hf.named_tensors(model.config, model.params))
    assert [(name, array.shape) for name, array in named] == hf.manifest(model.config)
    assert len(named) == len(saved)
    for name, array in named:
        np.testing.assert_array_equal(array, saved[name], err_msg=name)


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize(("family", "dtype"), [("qwen2", "float32"), ("qwen3", "bfloat16")])
def test_shards_are_slices_of_the_whole(
    devices: int, family: str, dtype: str, checkpoint: Callable[..., Path]
) -> None:
    mesh = jax.make_mesh(
        (1, devices),
        ("data", "fsdp"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:devices],
    )
    whole = models.load(checkpoint(family), dtype).params
    sharded = models.load(checkpoint(family), dtype, mesh).params
    assert_same_bits(whole, sharded)
    for one, many in zip(jax.tree.leaves(whole), jax.tree.leaves(sharded), strict=True):
        assert len(many.addressable_shards) == devices
        for shard in many.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(one)[shard.index])
    for name in ("embed", "head"):
        assert sharded[name].addressable_shards[0].data.size * devices == sharded[name].size
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        array = sharded["layers"][name]
        assert array.addressable_shards[0].data.size * devices == array.size


def test_norms_may_be_divided_by_layers(tmp_path: Path, random_params: Callable[..., Params]) -> None:
    config = hf.Config("qwen3", 40, 16, 16, 4, 2, 6, 24, 1e4, 1e-6, True, 64)
    mesh = jax.make_mesh((1, 8), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    models.save(hf.Model(config, random_params(config)), tmp_path)
    sharded = models.load(tmp_path, mesh=mesh).params
    assert sharded["layers"]["q_norm"].addressable_shards[0].data.shape == (2, 6)
    assert_same_bits(sharded, random_params(config))


def test_replicas_hold_the_same_shards(checkpoint: Callable[..., Path]) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params = models.load(checkpoint("llama"), mesh=mesh).params
    assert_same_bits(models.load(checkpoint("llama")).params, params)
    assert {shard.data.size * 4 for shard in params["embed"].addressable_shards} == {params["embed"].size}


def test_saving_from_a_mesh(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    mesh = jax.make_mesh((1, 8), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    models.save(models.load(checkpoint("llama"), mesh=mesh), tmp_path)
    assert_same_bits(models.load(tmp_path).params, models.load(checkpoint("llama")).params)


def test_loading_and_saving_need_no_torch(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    code = (
        "import sys; from jaxrl import models; m = models.load(sys.argv[1]); m.logits(m.params, [1, 2, 3]);"
        "models.save(m, sys.argv[2]); print([x for x in ('torch', 'transformers') if x in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(checkpoint("llama")), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


# Peak of the process's own (anonymous) memory: the mapped file's pages belong to the page cache and are not counted.
MEASURE = """
import sys, threading, time
import jax
from jaxrl import models
jax.config.update("jax_num_cpu_devices", 4)
def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
mesh = jax.make_mesh((1, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
jax.block_until_ready(jax.numpy.zeros(8) + 1)
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = jax.block_until_ready(models.load(sys.argv[1], "float32", mesh if sys.argv[2] == "mesh" else None).params)
done = True
thread.join()
print((peak - before) / sum(x.nbytes for x in jax.tree.leaves(model)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, which only Linux has")
@pytest.mark.parametrize("place", ["mesh", "device"])
def test_loading_holds_one_copy(place: str, tmp_path: Path) -> None:
    config = hf.Config("llama", 8192, 512, 8, 8, 4, 64, 2816, 10_000.0, 1e-5, False, 512)
    models.save(hf.Model(config, zeros(config)), tmp_path)
    assert 180e6 < (tmp_path / "model.safetensors").stat().st_size < 250e6
    command = [sys.executable, "-c", MEASURE, str(tmp_path), place]
    copies = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.5 < copies < 1.5  # the parameters, and one of them in flight


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert str(missing) in one_line(lambda: models.load(missing))
    # a Hub id, and there is no network here
    assert "org/absent" in one_line(lambda: models.load("org/absent"))


def test_a_folder_without_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    message = one_line(lambda: models.load(folder))
    assert str(folder) in message and "safetensors" in message


def test_missing_and_invalid_config(folder: Path) -> None:
    path = folder / "config.json"
    for text in ('{"model_type": "qwen2",', "[1, 2]", "\x00\xff", ""):
        path.write_bytes(text.encode("latin-1"))
        assert str(path) in one_line(lambda: models.load(folder))
    path.unlink()
    assert str(path) in one_line(lambda: models.load(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_truncated_weights(dtype: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llama", False, dtype), tmp_path / "model")
    path = sorted(folder.glob("*.safetensors"))[1]
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for size in (0, 1, 7, 8, 9, 8 + header // 2, 8 + header - 1, 8 + header, 8 + header + 5, len(whole) - 1):
        path.write_bytes(whole[:size])
        message = one_line(lambda: models.load(folder))
        assert str(path) in message and "truncated" in message, size


def header_of(entry: object) -> bytes:
    encoded = json.dumps(entry).encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(64)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\xff" * 4096, id="ones"),
        pytest.param(b"\0" * 4096, id="zeros"),
        pytest.param(b"<!DOCTYPE html><html>not found</html>" * 9, id="html"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", id="lfs_pointer"),
        pytest.param(np.random.default_rng(0).bytes(5000), id="random"),
        pytest.param(header_of([1]), id="header_is_a_list"),
        pytest.param(header_of({"a": 3}), id="entry_is_a_number"),
        pytest.param(header_of({"a": {"dtype": "F32", "shape": [2]}}), id="no_offsets"),
        pytest.param(
            header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", 8]}}), id="text_offset"
        ),
        pytest.param(
            header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}), id="backwards"
        ),
        pytest.param(
            header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 8]}}), id="negative"
        ),
        pytest.param(
            header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-16, -8]}}), id="behind_the_end"
        ),
        pytest.param(
            header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}}), id="odd_bytes"
        ),
        pytest.param(
            header_of({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}), id="short_tensor"
        ),
    ],
)
def test_garbage_weights(content: bytes, folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(content)
    assert str(path) in one_line(lambda: models.load(folder))


def test_a_shard_that_the_index_names_is_missing(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    message = one_line(lambda: models.load(folder))
    assert "model.safetensors.index.json" in message and shard.name in message


@pytest.mark.parametrize("with_mesh", [False, True])
def test_tensors_that_do_not_belong_to_the_config(with_mesh: bool, folder: Path) -> None:
    mesh = jax.make_mesh((1, 8), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    load = functools.partial(models.load, folder, mesh=mesh if with_mesh else None)
    edit_config(folder, intermediate_size=88)
    message = one_line(load)
    assert str(folder) in message and "mlp." in message and "(48, 80)" in message and "(48, 88)" in message
    edit_config(folder, remove=("layer_types",), intermediate_size=80, num_hidden_layers=4)
    message = one_line(load)
    assert str(folder) in message and "model.layers.3.input_layernorm.weight" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": None}, "model_type"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "llama3"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ({"rope_parameters": "default"}, "rope_parameters"),
        (
            {"use_sliding_window": True, "sliding_window": 64, "layer_types": None, "max_window_layers": 1},
            "sliding-window",
        ),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"vocab_size": 104.5}, "vocab_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": [1]}}, "rope_theta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_configs_that_are_not_supported(changes: JsonObject, named: str, folder: Path) -> None:
    edit_config(folder, **changes)
    message = one_line(lambda: models.load(folder))
    assert str(folder / "config.json") in message and named in message


@pytest.mark.parametrize(
    "field",
    ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"],
)
def test_config_fields_that_must_be_there(field: str, folder: Path) -> None:
    edit_config(folder, remove=(field,))
    message = one_line(lambda: models.load(folder))
    assert str(folder / "config.json") in message and field in message


@pytest.mark.slow
@pytest.mark.skipif(
    not SMOLLM2.is_dir(),
    reason=f"no SmolLM2-135M-Instruct in {SMOLLM2}; $SMOLLM2 names a Hugging Face folder",
)
def test_real_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = models.load(SMOLLM2)
    assert sum(x.size for x in jax.tree.leaves(model.params)) == 134_515_008
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 64))
    expected = reference_logits(AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype="float32"), tokens)
    np.testing.assert_allclose(logits(model, tokens), expected, atol=1e-3, rtol=0)
    models.save(model, tmp_path, "bfloat16")
    assert_same_bits(models.load(tmp_path).params, model.params)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    np.testing.assert_array_equal(reference_logits(saved, tokens), expected)


def test_a_home_folder_that_is_not_there_is_named() -> None:
    assert "~nobody-here/model: no such model folder" in one_line(lambda: hf.resolve("~nobody-here/model"))
