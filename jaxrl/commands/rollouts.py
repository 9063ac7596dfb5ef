"""jaxrl rollouts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrl.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from jaxrl.telemetry.rollouts import Answer

HELP = "print the sampled answers of a step"
ENDS = {"stop": "ended", "length": "cut off"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")
    step = "as the console and the report number it, from 1 on (default: the newest that is stored)"
    parser.add_argument("--step", type=int, metavar="N", help=step)
    outcome = parser.add_mutually_exclusive_group()
    outcome.add_argument("--right", action="store_true", help="right answers alone")
    outcome.add_argument("--wrong", action="store_true", help="wrong answers alone")
    parser.add_argument("--prompt", metavar="ID", help="answers to the prompt of this id alone")
    parser.add_argument("--limit", type=int, default=3, metavar="N", help="answers; 0: all (default: 3)")
    characters = "of an answer, half from its beginning and half from its end; 0: all (default: 3000)"
    parser.add_argument("--characters", type=int, default=3000, metavar="N", help=characters)


def run(args: argparse.Namespace, _: list[str]) -> None:
    from rich.console import Console

    from jaxrl.telemetry.rollouts import read_answers

    file, step = _file(args.run_folder, args.step)
    if min(args.limit, args.characters) < 0:
        raise InputError("--limit and --characters take a number from 0 on; 0 shows all")
    console, asked, damaged = Console(), dict[str, None](), 0
    found = sampled = 0
    shown: Answer | None = None
    for row in read_answers(file):
        if row is None:
            damaged += 1
            continue
        sampled += 1
        asked[row["prompt_id"]] = None
        if _wanted(row, args):
            found += 1
            if not args.limit or found <= args.limit:
                _print(console, row, shown, args.characters)
                shown = row
    if args.prompt is not None and args.prompt not in asked:
        some = ", ".join(list(asked)[:10]) + (", ..." if len(asked) > 10 else "")
        raise InputError(f"{file}: has no prompt {args.prompt!r} (--prompt); there are: {some or 'none'}")
    kind = "right " if args.right else "wrong " if args.wrong else ""
    to = f" to prompt {args.prompt}" if args.prompt is not None else ""
    printed = min(found, args.limit or found)
    line = f"{printed:,} of {found:,} {kind}answers{to} in step {step} ({file.name}, {sampled:,} answers)"
    line += f"; --limit {found} shows all" if printed < found else ""
    line += f"; {damaged:,} damaged lines or files are left out" if damaged else ""
    _say(console, line, "dim")


def _file(folder: Path, step: int | None) -> tuple[Path, int]:
    """The rollout file of a step, numbered from 1 on, or of the newest; and the step.

    Raises:
      InputError: if there is none.
    """
    from jaxrl.telemetry.rollouts import rollout_files, step_of

    files = {step_of(file) + 1: file for file in rollout_files(folder)}
    if not files:
        raise InputError(
            f"{folder}: no stored rollouts; give the folder of a run whose run.rollouts_every is not 0"
        )
    wanted = max(files) if step is None else step
    if wanted not in files:
        raise InputError(
            f"{folder}: no stored rollouts of step {wanted} (--step); there are {len(files):,} steps from "
            f"{min(files)} to {max(files)}: run.rollouts_every and run.rollouts_keep choose which"
        )
    return files[wanted], wanted


def _wanted(row: Answer, args: argparse.Namespace) -> bool:
    right = row["score"] > 0
    of_prompt = args.prompt is None or row["prompt_id"] == args.prompt
    return of_prompt and not (args.right and not right) and not (args.wrong and right)


def _print(console: Console, row: Answer, last: Answer | None, characters: int) -> None:
    """Prints an answer: its prompt, unless that of the last one is the same; what it is; its text."""
    right = row["score"] > 0
    parts = {name: value for name, value in (row.get("rewards") or {}).items() if value is not None}
    if last is None or (last["prompt_id"], last["prompt"]) != (row["prompt_id"], row["prompt"]):
        title = f"prompt {row['prompt_id']} · reference answer {row['answer']}"
        _say(console, title, "bold")
        _say(console, row["prompt"].rstrip() + "\n", "dim")
    facts = [
        f"sample {row['sample']} of prompt {row['prompt_id']}",
        "right" if right else "wrong",
        f"reward {row['reward']:.4g}" + "".join(f", {name} {value:.4g}" for name, value in parts.items()),
        f"{ENDS.get(row['finish_reason'], row['finish_reason'])} after {row['tokens']:,} tokens",
        f"mean log-prob {row['logprob_mean']:.3f}",
        f"model version {row['version']}",
    ]
    _say(console, " · ".join(facts), "bold green" if right else "bold red")
    _say(console, _cut(row["completion"].rstrip(), characters) + "\n", "")


def _cut(text: str, characters: int) -> str:
    """The text, or its beginning and its end around a line with the number of characters that are left out."""
    if not characters or len(text) <= characters:
        return text
    begin, end = text[: (characters + 1) // 2], text[len(text) - characters // 2 :]
    return f"{begin}\n[... {len(text) - characters:,} characters ...]\n{end}"


def _say(console: Console, text: str, style: str) -> None:
    """Prints text as it is, with control characters as escapes: an answer must not command the terminal."""
    from rich.text import Text

    shown = "".join(c if c.isprintable() or c in "\n\t\u3000\xa0" else ascii(c)[1:-1] for c in text)
    console.print(Text(shown, style), soft_wrap=True)
