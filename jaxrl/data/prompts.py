"""Prompts: from rows to what is sampled. A batch is a function of the seed and its place in the order."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import numpy as np
from blake3 import blake3
from jaxtyping import Float64, Int64

from jaxrl import config
from jaxrl.data.chats import answer_of, arguments_of, chat_of, hint_of, with_hint
from jaxrl.data.files import Choice, find_files, listed
from jaxrl.data.messages import Chat
from jaxrl.data.rows import read_rows
from jaxrl.data.stops import Vocabulary
from jaxrl.data.tokens import encode, require_template
from jaxrl.errors import InputError
from jaxrl.rewards import can_win
from jaxrl.types import JsonObject, Order, Prompt, Tokenizer, Verifier

ID_COLUMNS = ("id", "index", "extra_info.index")  # the first of these that a row has names its prompt
COPIES = 100  # of each row, in the released DAPO-Math-17k
SOLUTION = "####"  # stands before the answer of GSM8K's worked solutions
BLOCK = 1024  # places of the order in which sources are mixed; each block has every source's share

T = TypeVar("T")


class Part(NamedTuple):
    """The prompts of one source, which lie one after another in the list."""

    prompts: int
    weight: float


@dataclasses.dataclass(frozen=True)
class Problem:
    """A row that was kept."""

    id: str
    chat: Chat
    answer: str
    hint: str | None = ""  # what is to follow the problem; None where no solution has the answer
    columns: Mapping[str, object] | None = None  # that reward functions take

    @property
    def digest(self) -> str:
        """The digest in `Prompt.problem`."""
        text = json.dumps([self.chat.problem, self.answer])
        return blake3(text.encode("utf-8", "surrogatepass")).hexdigest(8)


@dataclasses.dataclass
class Counts:
    """Counts of the rows that were read, and the first row of each kind that needs a look."""

    rows: int = 0
    duplicates: int = 0
    conflicts: int = 0  # rows whose problem was there with another answer
    unanswered: int = 0
    unmatched: int = 0  # answers that the verifier cannot match
    overlong: int = 0
    outside: int = 0  # problems that are not between data.min_characters and data.max_characters
    unhinted: int = 0  # rows without a worked solution that has the answer, where hints are wanted
    first_conflict: str = ""
    first_unmatched: str = ""


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts ready for sampling, and counts of the rows that they come from."""

    prompts: list[Prompt]
    path: str
    counts: Counts
    files: tuple[str, ...] = ()  # that were read
    sources: tuple[PromptSet, ...] = ()
    mixture: tuple[Part, ...] = ()  # for `batch`; empty for one source

    @property
    def rows(self) -> int:
        return self.counts.rows

    @property
    def duplicates(self) -> int:
        return self.counts.duplicates

    @property
    def overlong(self) -> int:
        return self.counts.overlong

    def digest(self) -> str:
        """A digest of all that a run takes from the rows, in their order and mixture."""
        whole = blake3(repr(self.mixture).encode())
        for prompt in self.prompts:
            texts = json.dumps([prompt.id, prompt.answer, len(prompt.tokens)])
            whole.update(texts.encode() + prompt.tokens.tobytes())
            if prompt.columns:
                whole.update(json.dumps(prompt.columns, sort_keys=True, default=str).encode())
        return whole.hexdigest()

    def without(self, keys: Collection[str]) -> PromptSet:
        """The same set without the prompts of these `Prompt.key`; a source without any is not drawn from."""
        out = frozenset(keys)
        prompts = [prompt for prompt in self.prompts if prompt.key not in out]
        left, end = list[list[Prompt]](), 0
        for part in self.mixture:
            begin, end = end, end + part.prompts
            left.append([prompt for prompt in self.prompts[begin:end] if prompt.key not in out])
        mixture = tuple(Part(len(own), part.weight) for own, part in zip(left, self.mixture, strict=True))
        sources = tuple(
            dataclasses.replace(one, prompts=own) for one, own in zip(self.sources, left, strict=True)
        )
        return dataclasses.replace(self, prompts=prompts, sources=sources, mixture=mixture)

    def summary(self) -> str:
        """Lines for people: one of counts, and one for whatever needs a look."""
        if self.sources:
            weights = [part.weight if part.prompts else 0.0 for part in self.mixture]
            total = sum(weights) or 1.0
            shares = [f"{100 * weight / total:.3g}% of the prompts from " for weight in weights]
            return "\n".join(share + one.summary() for share, one in zip(shares, self.sources, strict=True))
        c = self.counts
        unanswered = f"{c.unanswered:,} unanswered, " if c.unanswered else ""
        outside = f"{c.outside:,} too short or long in characters, " if c.outside else ""
        unhinted = f"{c.unhinted:,} without a worked solution that has the answer, " if c.unhinted else ""
        lines = [
            f"{self.path}: {len(self.prompts):,} prompts from {c.rows:,} rows "
            f"({c.duplicates:,} duplicates, {unanswered}{outside}{unhinted}{c.overlong:,} over-long left out)"
        ]
        if len(self.files) > 1 or (self.files and self.files[0] != self.path):
            folder = os.path.commonpath([Path(file).parent for file in self.files])
            names = listed(os.path.relpath(file, folder) for file in self.files)
            lines.append(f"files read ({len(self.files)}) of {folder}: {names}")
        if 2 * c.duplicates > c.rows:
            lines.append(
                "more than half of the rows are duplicates: right for DAPO-Math-17k, which has 100 copies of each; "
                "else look at data.problem_column"
            )
        if c.conflicts:
            lines.append(
                f"{c.conflicts:,} rows have another answer than an earlier row with the same problem, the first in "
                f"{c.first_conflict}"
            )
        if c.unmatched:
            lines.append(c.first_unmatched)
        return "\n".join(lines)


def load_prompts(
    section: config.Data,
    tokenizer: Tokenizer,
    held_out: config.Eval | None = None,
    verifier: Verifier | None = None,
    vocabulary: Vocabulary | None = None,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> PromptSet:
    """Reads, cleans, templates and tokenizes problems.

    Args:
      section: the recipe's [data].
      tokenizer: of the model.
      held_out: the recipe's [eval], to read its problems instead, the first n that are not over-long, of any number
        of characters and without hints.
      verifier: is asked whether it can match the answers; None asks none.
      vocabulary: the model's, to which token ids are held; None holds them to none.
      columns: that prompts keep for reward functions, each with what has to be set where it is missing, or "" where it
        may be.

    Raises:
      InputError: naming the file, and the row or column, for anything that cannot be used as it is.
    """
    require_template(tokenizer, section)
    if held_out:
        choice = Choice(
            held_out.path, held_out.config, held_out.split, held_out.files, "eval", evaluation=True
        )
        whole = dataclasses.replace(
            section, min_characters=0, max_characters=0, hint_column="", hint_share=0.0
        )
        return _load(whole, tokenizer, choice, verifier, vocabulary, columns, held_out.problems)
    if not section.sources:
        ((_, choice),) = _sources(section)
        return _load(section, tokenizer, choice, verifier, vocabulary, columns)
    found = [
        _load(one, tokenizer, choice, verifier, vocabulary, columns) for one, choice in _sources(section)
    ]
    prompts = [
        dataclasses.replace(prompt, id=_of_source(number, prompt.id))
        for number, one in enumerate(found, 1)
        for prompt in one.prompts
    ]
    weights = [source.weight for source in section.sources]
    mixture = tuple(Part(len(one.prompts), weight) for one, weight in zip(found, weights, strict=True))
    names = [f.name for f in dataclasses.fields(Counts) if not f.name.startswith("first_")]
    counts = Counts(*(sum(getattr(one.counts, name) for one in found) for name in names))
    files = tuple(file for one in found for file in one.files)
    return PromptSet(prompts, ", ".join(one.path for one in found), counts, files, tuple(found), mixture)


def problem_texts(section: config.Data) -> dict[str, str]:
    """The problems in the files of [data] that are on this machine, by `Prompt.key`.

    Raises:
      InputError: for a file that cannot be used.
    """
    found: dict[str, str] = {}
    for number, (one, choice) in enumerate(_sources(section), 1):
        if Path(choice.path).exists():
            for problem in _problems(find_files(choice), one, Counts()):
                name = _of_source(number, problem.id) if section.sources else problem.id
                found[f"{name} {problem.digest}"] = problem.chat.problem
    return found


def _sources(section: config.Data) -> list[tuple[config.Data, Choice]]:
    """Each source of [data] as a [data] of its own, and its files; that itself where it has none."""
    if not section.sources:
        return [(section, Choice(section.path, section.config, section.split, section.files))]
    found = []
    for number, source in enumerate(section.sources):
        own = {f.name: getattr(source, f.name) for f in dataclasses.fields(source) if f.name != "weight"}
        changed = dataclasses.replace(section, sources=(), **{k: v for k, v in own.items() if v})
        choice = Choice(source.path, source.config, source.split, source.files, f"data.sources.{number}")
        found.append((changed, choice))
    return found


def _of_source(number: int, name: str) -> str:
    """A prompt's id where there are several sources."""
    return f"{number}:{name}"


def _load(
    section: config.Data,
    tokenizer: Tokenizer,
    choice: Choice,
    verifier: Verifier | None,
    vocabulary: Vocabulary | None,
    columns: Mapping[str, str],
    limit: int = 0,
) -> PromptSet:
    """One source's prompts, the first `limit` or all."""
    counts, files, source = Counts(), find_files(choice), choice.path
    problems = list(_problems(files, section, counts, columns))
    if not problems:
        raise InputError(f"{source}: no rows in it; give a file with problems")
    for column, key in columns.items():
        if key and all((problem.columns or {}).get(column) is None for problem in problems):
            raise InputError(f"{source}: no row has a column '{column}'. Set {key}")
    problems = _wanted(problems, section, source, counts)
    if verifier:
        _require_matchable(problems, verifier, source, counts)
    prompts: list[Prompt] = []
    tokenized = encode(tokenizer, section, [problem.chat for problem in problems], vocabulary)
    for problem, tokens in zip(problems, tokenized, strict=False):
        if limit and len(prompts) == limit:
            break
        if len(tokens) > section.max_prompt_tokens:
            counts.overlong += 1
        else:
            prompts.append(Prompt(problem.id, tokens, problem.answer, problem.digest, problem.columns))
    if not prompts:
        raise InputError(
            f"{source}: all {counts.overlong} prompts are longer than data.max_prompt_tokens = "
            f"{section.max_prompt_tokens}; raise it"
        )
    return PromptSet(prompts, source, counts, tuple(map(str, files)))


def batch(
    prompts: Sequence[Prompt],
    seed: int,
    first: int,
    size: int,
    order: Order,
    mixture: Sequence[Part] = (),
    restart: int = 0,
) -> list[Prompt]:
    """The prompts at some places of the order, a pure function of the arguments.

    `shuffle` goes through epochs, each a permutation of its own, and a batch may span two or more; an epoch of
    `copies` has every prompt COPIES times. With a mixture each part has epochs of its own, and every BLOCK places of
    the order have its share of them, to within one. In all of these, what is at a place does not depend on the
    batches that the order is taken in.

    `replacement` draws independently, and its draws follow from both `first` and `size`: the same places in batches of
    other sizes have other prompts.

    Args:
      prompts: all there are.
      seed: of the order.
      first: the place in the order of the first prompt, which is the number of those taken before.
      size: how many to take.
      order: see above.
      mixture: the parts of `prompts`, in order; empty for one source. A part without prompts is not drawn from.
      restart: number of the order, which begins anew as another one; 0 for the first.
    """
    if mixture:
        return [prompts[i] for i in _mixed(mixture, seed, first, size, order, restart)]
    n = len(prompts)
    if order == "replacement":
        return [prompts[i] for i in _drawing(seed, first, size, restart).integers(n, size=size)]
    rows = n * COPIES if order == "copies" else n
    places = range(first, first + size)
    epochs = {e: _random(seed, restart, e).permutation(rows) for e in {p // rows for p in places}}
    return [prompts[epochs[p // rows][p % rows] % n] for p in places]


def _random(seed: int, restart: int, *key: int) -> np.random.Generator:
    """The generator of an order's part, named by one or two numbers.

    The key of an order that begins anew has its number in the fourth place. The first one's has no such zeros: NumPy
    leaves zeros out of account only within four words, and a seed of 2^32 or more is two.
    """
    return np.random.default_rng((seed, *key, *[0] * (2 - len(key)), restart) if restart else (seed, *key))


def _drawing(seed: int, first: int, size: int, restart: int) -> np.random.Generator:
    """The generator of a batch of independent draws: for batches of one size, named by the batch's number."""
    number, rest = divmod(first, size)
    return _random(seed, restart, number, rest) if rest else _random(seed, restart, number)


def _mixed(
    mixture: Sequence[Part], seed: int, first: int, size: int, order: Order, restart: int
) -> Iterator[int]:
    """Indices of the prompts at some places of a mixture's order."""
    counts = np.array([part.prompts for part in mixture])
    firsts = np.cumsum(counts) - counts
    weights = np.array([part.weight if part.prompts else 0.0 for part in mixture], np.float64)
    ends = np.cumsum(weights / weights.sum())
    ends[np.flatnonzero(counts)[-1] :] = 1.0  # rounding leaves nothing to the parts behind, which are empty
    if order == "replacement":
        random = _drawing(seed, first, size, restart)
        parts = np.searchsorted(ends, random.random(size), side="right")
        yield from (int(i) for i in firsts[parts] + random.integers(counts[parts]))
        return
    parts, draws = _places(ends, seed, first, size, restart)
    rows = counts * COPIES if order == "copies" else counts
    epochs: dict[tuple[int, int], Int64[np.ndarray, " rows"]] = {}
    for part, draw in zip(parts.tolist(), draws.tolist(), strict=True):
        epoch, place = divmod(draw, int(rows[part]))
        if (part, epoch) not in epochs:
            epochs[part, epoch] = _random(seed, restart, epoch, part + 1).permutation(rows[part])
        yield int(firsts[part] + epochs[part, epoch][place] % counts[part])


def _places(
    ends: Float64[np.ndarray, " K"], seed: int, first: int, size: int, restart: int
) -> tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, " P"]]:
    """The part of each of the places from `first` on, and how many places before it have the same part.

    Block b cuts [0, 1) at (i + offset(b)) / BLOCK, i < BLOCK, and a part has the cuts before its end and not before the
    last one's. Offsets by the golden ratio are spread evenly, so that a share below 1 / BLOCK is kept too.
    """
    blocks = np.arange((first + size - 1) // BLOCK + 1)
    offsets = (blocks * (np.sqrt(5) - 1) / 2) % 1
    before = (
        np.ceil(BLOCK * ends - offsets[:, None]).astype(np.int64).clip(0, BLOCK)
    )  # [blocks, K] cuts before ends
    done = np.diff(before, axis=1, prepend=0)
    parts: list[Int64[np.ndarray, " BLOCK"]] = []
    draws: list[Int64[np.ndarray, " BLOCK"]] = []
    start = first // BLOCK
    for b in range(start, len(blocks)):
        cuts = _random(seed, restart, b, 0).permutation(BLOCK)
        part = np.searchsorted(before[b], cuts, side="right")
        draw = np.zeros(BLOCK, np.int64)
        for k in range(len(ends)):
            draw[part == k] = done[:b, k].sum() + np.arange((part == k).sum())
        parts.append(part)
        draws.append(draw)
    here = slice(first - start * BLOCK, first - start * BLOCK + size)
    return np.concatenate(parts)[here], np.concatenate(draws)[here]


Key = str | tuple[object, ...]


def _problems(
    files: Sequence[Path],
    section: config.Data,
    counts: Counts,
    taken: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Problem]:
    """The rows of files with a problem and an answer, without duplicates where the recipe wants that.

    Counts them on the way. DAPO's file has 1.8 million rows, so a copy of a row costs one look-up.

    Raises:
      InputError: if a row cannot be used.
    """
    columns = (section.problem_column, section.answer_column)
    arguments = (section.template_column,) if section.template_column else ()
    hints = {section.hint_column: "data.hint_column"} if section.hint_column else {}
    copies: set[Key] = set()  # raw values, and what answers them
    chats: set[Key] = set()
    answers: dict[Key, str] = {}
    names: set[str] = set()
    objects = {**taken, **dict.fromkeys(arguments, "data.template_column")}
    for where, row in read_rows(files, columns, ID_COLUMNS, objects, hints):
        counts.rows += 1
        raw = _raw_key(row, columns) if section.deduplicate and not arguments else None
        if raw in copies:
            counts.duplicates += 1
            continue
        extra = arguments_of(row[section.template_column], section, where) if arguments else {}
        chat = chat_of(row[section.problem_column], section, where, extra)
        answer = _answer(row, section, where)
        if answer is None:
            counts.unanswered += 1
            continue
        if raw is not None:
            copies.add(raw)
        if answers.setdefault(_chat_key(chat, str.strip), answer) != answer:
            counts.conflicts += 1
            counts.first_conflict = counts.first_conflict or where
        key = _chat_key(chat, str)
        if section.deduplicate and key in chats:
            counts.duplicates += 1
            continue
        chats.add(key)
        name = next((str(row[c]) for c in ID_COLUMNS if row.get(c) is not None), str(counts.rows))
        name = f"{name}#{counts.rows}" if name in names else name
        names.add(name)
        hint = hint_of(row[section.hint_column], answer, section, where) if hints else ""
        own = {column: row[column] for column in taken if column in row} if taken else None
        yield Problem(name, chat, answer, hint, own)


def _wanted(problems: list[Problem], section: config.Data, source: str, counts: Counts) -> list[Problem]:
    """The problems that are neither too short nor too long, with hints where the recipe wants them; counts the others.

    Rows have their names and their duplicates before this, so a prompt has one id whatever the bounds and hints are.

    Raises:
      InputError: if there are none left.
    """
    low, high = section.min_characters, section.max_characters
    lengths = [len(problem.chat.problem) for problem in problems]
    kept = [p for p, n in zip(problems, lengths, strict=True) if low <= n and (n <= high or not high)]
    counts.outside = len(problems) - len(kept)
    if not kept:
        raise InputError(
            f"{source}: data.min_characters = {low} and data.max_characters = {high} leave out all {len(problems):,} "
            f"problems, which have {min(lengths)} to {max(lengths)} characters; change them, 0 is no bound"
        )
    if not section.hint_column:
        return kept
    pairs = [(problem, problem.hint) for problem in kept if problem.hint is not None]
    hinted = [dataclasses.replace(p, chat=with_hint(p.chat, hint, section)) for p, hint in pairs]
    counts.unhinted = len(kept) - len(hinted)
    if not hinted:
        raise InputError(
            f"{source}: data.hint_column = '{section.hint_column}' has no worked solution with the row's answer in "
            f"any of {len(kept):,} rows; name the column of solutions, or empty it"
        )
    return hinted


def _answer(row: JsonObject, section: config.Data, where: str) -> str | None:
    """The row's answer; None where rows without one are skipped."""
    column = section.answer_column
    answer = answer_of(row[column], section, where)
    if answer is not None or section.skip_unanswered:
        return answer
    if section.answer_pattern and row[column] is not None and str(row[column]).strip():
        raise InputError(
            f"{where}: '{column}' does not match data.answer_pattern = {section.answer_pattern!r}; correct it, or set "
            "data.skip_unanswered = true"
        )
    raise InputError(
        f"{where}: '{column}' is empty; every row needs an answer, remove it or fill it in, or set "
        "data.skip_unanswered = true"
    )


def _raw_key(row: JsonObject, columns: tuple[str, str]) -> Key | None:
    """The values of a row that is text or a chat of one message; None for others."""
    problem, answer = row[columns[0]], row[columns[1]]
    if type(problem) is str and type(answer) is str:
        return problem, answer
    if isinstance(problem, list) and len(problem) == 1 and isinstance(problem[0], dict):
        problem = tuple(problem[0].values())
        if not all(isinstance(each, str) for each in problem):
            return None
    whole = (
        isinstance(problem, str | tuple) and isinstance(answer, str | int) and not isinstance(answer, bool)
    )
    return (problem, answer) if whole else None


def _chat_key(chat: Chat, of: Callable[[str], str]) -> Key:
    """The whole of a chat and its arguments."""
    if len(chat.messages) == 1 and not chat.arguments:
        return of(chat.problem)
    messages = [(each["role"], of(each["content"])) for each in chat.messages[:-1]]
    return (*messages, of(chat.problem), *sorted((k, repr(v)) for k, v in chat.arguments.items()))


def _require_matchable(problems: Sequence[Problem], verifier: Verifier, source: str, counts: Counts) -> None:
    """Counts the answers that no response can match, in the verifier's own form.

    Raises:
      InputError: if they are more than half.
    """
    # GSM8K's worked solutions may fit into a box, and nobody writes them there.
    lost = [each for each in problems if SOLUTION in each.answer or not can_win(verifier, each.answer)]
    counts.unmatched = len(lost)
    if not lost:
        return
    where, answer = lost[0].chat.where, lost[0].answer
    shown = answer if len(answer) <= 60 else f"{answer[:28]} ... {answer[-28:]}"
    remedy = "correct them, or choose another reward.verifier"
    if any(SOLUTION in problem.answer for problem in lost):
        remedy = "set data.answer_pattern = '#### (.+)'"
    counts.first_unmatched = (
        f"{len(lost):,} of {len(problems):,} answers cannot be matched by {verifier}, the first in {where}: {shown!r}; "
        f"{remedy}"
    )
    if 2 * len(lost) > len(problems):
        raise InputError(f"{source}: {counts.first_unmatched}")


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the prompts, or of what else there is many of, evenly spaced over all of them."""
    taken = min(count, len(items))
    return [items[i * len(items) // taken] for i in range(taken)]
