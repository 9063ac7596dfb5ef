"""A tokenizer small enough to read: one token per character, and the special ones that models have; files of rows."""

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

SPECIAL = ["<pad>", "<eos>", "<bos>", "<user>", "<assistant>"]
TEMPLATE = (
    "<bos>{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def jsonl(path: Path, rows: Sequence[object]) -> str:
    """Writes rows as JSON lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path: Path) -> list[Any]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def rollout_rows(run: Path, step: int) -> list[Any]:
    """The rows of the rollouts of a step, 0 for the first."""
    return pq.read_table(run / "rollouts" / f"step_{step:06d}.parquet").to_pylist()


def tiny_tokenizer(path: Path, chat_template: str | None = TEMPLATE) -> Any:
    """Saves a Hugging Face tokenizer to the folder, and returns it.

    Like Llama's, it puts a <bos> before plain text, and its chat template writes one too.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    symbols = [*SPECIAL, "<unk>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        chat_template=chat_template, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.save_pretrained(path)
    return fast
