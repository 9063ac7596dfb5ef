"""From paths to prompts: files, rows, chats and answers (chats.py), batches (prompts.py), token ids (tokens.py)."""

from jaxrl.data.chats import DAPO_PREFIX, DAPO_SUFFIX, chat_of
from jaxrl.data.files import FORMATS, Choice, find_files
from jaxrl.data.prompts import COPIES, Part, PromptSet, batch, load_prompts, problem_texts
from jaxrl.data.rows import read_rows
from jaxrl.data.stops import Vocabulary, read_vocabulary
from jaxrl.data.tokens import detokenizer, encode, load_tokenizer, require_template, tokenizer_digest

__all__ = [
    "COPIES",
    "DAPO_PREFIX",
    "DAPO_SUFFIX",
    "FORMATS",
    "Choice",
    "Part",
    "PromptSet",
    "Vocabulary",
    "batch",
    "chat_of",
    "detokenizer",
    "encode",
    "find_files",
    "load_prompts",
    "load_tokenizer",
    "problem_texts",
    "read_rows",
    "read_vocabulary",
    "require_template",
    "tokenizer_digest",
]
