"""From files to prompts: rows of files (rows.py), problems and batches (prompts.py), token ids (tokens.py)."""

from jaxrl.data.prompts import COPIES, DAPO_PREFIX, DAPO_SUFFIX, PromptSet, batch, load_prompts
from jaxrl.data.rows import read_rows
from jaxrl.data.tokens import detokenizer, encode, load_tokenizer, require_template

__all__ = [
    "COPIES",
    "DAPO_PREFIX",
    "DAPO_SUFFIX",
    "PromptSet",
    "batch",
    "detokenizer",
    "encode",
    "load_prompts",
    "load_tokenizer",
    "read_rows",
    "require_template",
]
