"""Which files, tensors and values of a model folder are its weights. The judges are transformers and safetensors."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from jaxrl import models
from jaxrl.errors import InputError
from jaxrl.models import hf, tensors
from jaxrl.models.tensors import safetensors_header

Weights = dict[str, np.ndarray]
TOKENS = np.random.default_rng(0).integers(0, 104, (3, 17))
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """An untied Qwen2 checkpoint of several shards and an index, this test's own."""
    return shutil.copytree(checkpoint("qwen2"), tmp_path / "model")


@pytest.fixture
def tied(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint("qwen2", True), tmp_path / "tied")


@pytest.fixture(params=[False, True], ids=["device", "mesh"])
def load(request: pytest.FixtureRequest) -> Callable[[Path], models.Model]:
    mesh = jax.make_mesh((1, 8), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return lambda folder: models.load(folder, mesh=mesh if request.param else None)


def weights(folder: Path) -> Weights:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def rewrite(folder: Path, content: Weights) -> None:
    """Replaces a folder's weights by one file."""
    for file in folder.glob("*safetensors*"):
        file.unlink()
    save_file(content, folder / "model.safetensors", {"format": "pt"})


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits(model: models.Model) -> np.ndarray:
    return np.asarray(model.logits(model.params, TOKENS))


def assert_as_transformers(model: models.Model, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(torch.from_numpy(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(model), expected, atol=2e-4, rtol=0)


def one_line(folder: Path, call: Callable[[Path], object] = models.load) -> str:
    """The message of the InputError that `call` raises, which names the folder."""
    with pytest.raises(InputError) as caught:
        call(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_files_that_the_index_does_not_name_are_no_weights(
    folder: Path, load: Callable[[Path], models.Model]
) -> None:
    named = sorted(folder.glob("*.safetensors"))
    stale = {name: 2 * array for name, array in weights(folder).items()}
    save_file(stale, folder / "model-00001-of-00001.safetensors")
    save_file({NORM: np.zeros(48, np.int8)}, folder / "weights-int8.safetensors")
    (folder / "consolidated.safetensors").write_bytes(b"nothing")
    assert tensors.weight_files(folder) == named
    assert_as_transformers(load(folder), folder)


def test_the_weights_of_an_evaluation_are_those_files(folder: Path) -> None:
    before = tensors.hash_weights(folder)
    save_file({NORM: np.zeros(48, np.int8)}, folder / "weights-int8.safetensors")
    assert tensors.hash_weights(folder) == before
    shard = tensors.weight_files(folder)[-1]
    save_file({name: 2 * array for name, array in load_file(shard).items()}, shard)
    assert tensors.hash_weights(folder) != before


def test_without_an_index_model_safetensors_is_the_weights(folder: Path) -> None:
    rewrite(folder, weights(folder))
    save_file({name: 2 * array for name, array in weights(folder).items()}, folder / "adapter.safetensors")
    assert tensors.weight_files(folder) == [folder / "model.safetensors"]
    assert_as_transformers(models.load(folder), folder)


def test_shards_without_an_index_are_the_weights(folder: Path) -> None:
    expected = logits(models.load(folder))
    (folder / "model.safetensors.index.json").unlink()
    np.testing.assert_array_equal(logits(models.load(folder)), expected)


def test_the_index_decides_beside_another_whole_file(folder: Path) -> None:
    """As vLLM reads such a folder."""
    expected = logits(models.load(folder))
    save_file({name: 2 * array for name, array in weights(folder).items()}, folder / "model.safetensors")
    np.testing.assert_array_equal(logits(models.load(folder)), expected)


def test_a_tensor_is_where_the_index_says_and_nowhere_else(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    home = folder / index[NORM]
    other = next(folder / file for file in sorted(index.values()) if file != home.name)
    save_file(load_file(other) | {NORM: np.ones(48, np.float32)}, other)
    message = one_line(folder)
    assert NORM in message and home.name in message and other.name in message
    save_file({name: array for name, array in load_file(home).items() if name != NORM} | {"x": TOKENS}, home)
    message = one_line(folder)
    assert f"should be in {home.name}, but is in {other.name}" in message


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    save_file({"norm.weight": np.ones(48, np.float32)}, folder / "more.safetensors")
    message = one_line(folder)
    assert "more.safetensors (norm.weight)" in message and f"({NORM})" in message


def test_tensors_that_nobody_reads_do_not_matter(folder: Path) -> None:
    expected = logits(models.load(folder))
    shards = sorted(folder.glob("*.safetensors"))
    for shard in shards:
        unread = {"rotary_emb.inv_freq": np.ones(4), "optimizer.step": np.ones(3, np.int8)}
        save_file(load_file(shard) | unread, shard)
    np.testing.assert_array_equal(logits(models.load(folder)), expected)


def test_a_type_that_is_not_read_is_named(folder: Path) -> None:
    rewrite(folder, weights(folder) | {NORM: np.zeros(48, np.int8)})
    message = one_line(folder)
    assert NORM in message and "I8" in message


@pytest.mark.parametrize(
    "index",
    [
        *("[]", "{", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\x00"),
        *(json.dumps({"weight_map": {NORM: name}}) for name in (3, None, "", "..", "../model/x.safetensors")),
        *(
            json.dumps({"weight_map": {NORM: name}})
            for name in ("/x.safetensors", "a/x.safetensors", "x.bin")
        ),
        *(
            json.dumps({"weight_map": {NORM: f"{name}.safetensors"}})
            for name in ("\ud800", "a\nb", "\0", "n" * 300)
        ),
    ],
)
def test_a_damaged_index_is_refused(index: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    one_line(folder)


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_names_of_a_base_model(
    is_tied: bool, folder: Path, tied: Path, load: Callable[[Path], models.Model]
) -> None:
    path = tied if is_tied else folder
    rewrite(path, {name.removeprefix("model."): array for name, array in weights(path).items()})
    assert_as_transformers(load(path), path)


def test_a_tied_matrix_under_the_name_of_the_head(tied: Path, load: Callable[[Path], models.Model]) -> None:
    rewrite(tied, {HEAD if name == EMBED else name: array for name, array in weights(tied).items()})
    model = load(tied)
    assert_as_transformers(model, tied)
    assert "head" not in model.params


def test_a_tied_model_may_have_the_matrix_twice(tied: Path) -> None:
    rewrite(tied, weights(tied) | {HEAD: weights(tied)[EMBED]})
    assert "head" not in models.load(tied).params
    assert_as_transformers(models.load(tied), tied)


def test_a_tied_model_with_a_head_of_its_own_is_refused(tied: Path) -> None:
    head = weights(tied)[EMBED].copy()
    head[-1, -1] += 1
    rewrite(tied, weights(tied) | {HEAD: head})
    message = one_line(tied)
    assert HEAD in message and "set tie_word_embeddings to false" in message
    # transformers unties them, which is what the remedy gives
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(tied)
    assert not np.array_equal(reference.lm_head.weight.detach(), reference.model.embed_tokens.weight.detach())
    edit(tied / "config.json", tie_word_embeddings=False)
    assert_as_transformers(models.load(tied), tied)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_are_not_finite_are_refused(
    value: float, dtype: str, folder: Path, load: Callable[[Path], models.Model]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    content = {key: array.astype(dtype) for key, array in weights(folder).items()}
    content[name][[3, -1], [5, -1]] = value
    # safetensors' NumPy front end has no bfloat16
    header = safetensors_header([(key, array.shape) for key, array in content.items()], dtype)
    rewrite(folder, {})
    (folder / "model.safetensors").write_bytes(
        header + b"".join(array.tobytes() for array in content.values())
    )
    assert f"{name} has 2 values that are NaN or infinite" in one_line(folder, load)


@pytest.mark.parametrize(
    ("stored", "value", "dtype"), [("float32", 3.4e38, "bfloat16"), ("float64", 1e39, "float32")]
)
def test_values_that_the_wanted_type_cannot_hold_are_refused(
    stored: str, value: float, dtype: str, folder: Path
) -> None:
    norm = np.ones(48, stored)
    norm[7] = -value
    rewrite(folder, weights(folder) | {NORM: norm})
    message = one_line(folder, lambda path: models.load(path, dtype))
    assert f"{NORM} has 1 values too large for {dtype}" in message


def mutants(whole: bytes) -> Iterator[bytes]:
    """Damaged copies of a safetensors file: header, offsets, shapes, types, lengths, and single bits."""
    size = int.from_bytes(whole[:8], "little")
    header, body = json.loads(whole[8 : 8 + size]), whole[8 + size :]

    def made(text: str, tail: bytes = body) -> bytes:
        encoded = text.encode("utf-8", "surrogatepass")
        return len(encoded).to_bytes(8, "little") + encoded + tail

    numbers = (-1, 0, 1, 3, 4, 8, 24, 64, 2**32, 2**63, 2**64, 2**62 + 1, 1.0, "4", None, [])
    for name in "abcd":
        for field in ("shape", "data_offsets"):
            for i in range(len(header[name][field])):
                for number in numbers:
                    values = list(header[name][field])
                    values[i] = number
                    yield made(json.dumps(header | {name: header[name] | {field: values}}))
            for values in ([], [0], [1, 1, 1], [0, 0], {}, 3):
                yield made(json.dumps(header | {name: header[name] | {field: values}}))
            yield made(json.dumps(header | {name: {k: v for k, v in header[name].items() if k != field}}))
        for dtype in ("F64", "F32", "F16", "BF16", "I8", "I64", "BOOL", "F8_E4M3", "F4", "f32", "", 3, None):
            yield made(json.dumps(header | {name: header[name] | {"dtype": dtype}}))
        yield made(json.dumps(header | {name: header["a"]}))
        yield made(json.dumps(header | {name: header[name] | {"more": 1}}))
    text = json.dumps(header)
    yield from (made(text, tail) for tail in (b"", body[:-1], body + b"\0", body * 2))
    yield from (made(pad + text) for pad in (" ", "\n", "\ufeff", "\0"))
    yield from (made(text + pad) for pad in (" " * 5, "\n", "\0", "{}", ","))
    yield from (
        made(json.dumps(header | {"__metadata__": x})) for x in ({}, None, [], 3, {"a": 1}, {"\ud800": ""})
    )
    yield from (made(json.dumps(x)) for x in ([], {}, 3, None, "a", {"__metadata__": {}}))
    yield made(json.dumps(dict(reversed(header.items()))))
    yield made(text[:-1] + ', "a": ' + json.dumps(header["b"]) + "}")
    yield made(text[:-1] + ', "a": ' + json.dumps(header["a"]) + "}")
    yield made("{" + '"x": {' * 200 + "}" * 201)
    yield from (
        n.to_bytes(8, "little") + whole[8:] for n in (0, 1, 100_000_001, 2**63, 2**64 - 1, size - 1, size + 1)
    )
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.integers(8 + size)] ^= 1 << rng.integers(8)
        yield bytes(damaged)
    yield from (whole[: rng.integers(len(whole))] for _ in range(20))


def test_damaged_files_are_refused_as_safetensors_refuses_them(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shapes = {"a": (2, 3), "b": (4,), "c": (), "d": (3, 0)}
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, path, {"format": "pt"})
    counts = {True: 0, False: 0}
    for content in mutants(path.read_bytes()):
        path.unlink()  # the maps of the last one are of the old file
        path.write_bytes(content)
        try:
            expected = {
                name: (bytes(x["data"]), tuple(x["shape"])) for name, x in safetensors.deserialize(content)
            }
        except safetensors.SafetensorError:
            expected = None
        try:
            found = tensors.Tensors(tmp_path, False).by_name
            got = {name: (x.data.tobytes(), x.shape) for name, (x,) in found.items()}
        except InputError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            got = None
        assert got == expected, content
        counts[got is None] += 1
    assert counts[True] > 300 and counts[False] > 30, counts


def command(message: str) -> str:
    """The Python of the command at a message's end."""
    python, option, code = shlex.split(message[message.index("python -c") :])
    assert (python, option) == ("python", "-c")
    return code


@pytest.mark.parametrize("shard", ["60kB", "1GB"])
def test_pytorch_weights_alone_are_refused_with_what_converts_them(
    shard: str, folder: Path, tmp_path: Path
) -> None:
    import torch

    expected = logits(models.load(folder))
    old = {name: torch.from_numpy(array) for name, array in weights(folder).items()}
    for file in folder.glob("*safetensors*"):
        file.unlink()
    if shard == "1GB":
        torch.save(old, folder / "pytorch_model.bin")
    else:
        files = {name: f"pytorch_model-0000{i % 2}-of-00002.bin" for i, name in enumerate(old)}
        for file in set(files.values()):
            torch.save({name: x for name, x in old.items() if files[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": files})
        )
    folder = folder.rename(tmp_path / 'it\'s a "model"')
    message = one_line(folder)
    assert one_line(folder, hf.read_config) == message
    exec(command(message), {})
    np.testing.assert_array_equal(logits(models.load(folder)), expected)


def test_an_adapter_is_refused_with_what_merges_it(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    message = one_line(folder)
    assert "adapter" in message and compile(command(message), "", "exec")
    for file in (*folder.glob("model*"), folder / "config.json"):
        file.unlink()
    assert one_line(folder) == message


def test_a_folder_of_gguf_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.Q4.gguf").write_bytes(b"GGUF")
    assert "GGUF" in one_line(tmp_path)


@pytest.mark.parametrize("name", ["shard", "model.safetensors.index.json", "config.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling"])
def test_what_is_no_file_is_refused_at_once(name: str, kind: str, folder: Path) -> None:
    path = min(folder.glob("*.safetensors")) if name == "shard" else folder / name
    path.unlink()
    {"pipe": os.mkfifo, "folder": Path.mkdir, "dangling": lambda path: path.symlink_to("nowhere")}[kind](path)
    assert path.name in one_line(folder)
