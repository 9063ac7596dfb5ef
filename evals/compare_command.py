"""jaxrl compare."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrl.commands.options import positive
from jaxrl.errors import InputError, RunError

if TYPE_CHECKING:
    from evals.matrix import Cell, Matrix

HELP = "train variants of a recipe over the same seeds, and say which differ"
SHOWN = 3  # runs that failed
FIRST = 20  # steps of a run by which it is known how many a budget of tokens or seconds takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("matrix", help="MATRIX.toml, or the name of one that comes along: justrl, techniques")
    add(
        "--jobs",
        type=positive,
        default=1,
        metavar="N",
        help="runs at a time here, on a share of the cores each",
    )
    add(
        "--launch",
        metavar="COMMAND",
        help="start missing runs by this: 'sbatch launch/slurm.sbatch {recipe}'",
    )
    add("--report-only", action="store_true", help="start nothing, and compare the runs that are finished")
    add("--dry-run", action="store_true", help="say which runs are missing, and do nothing")


def run(args: argparse.Namespace, _: list[str]) -> None:
    from evals import compare, compare_page, matrix
    from jaxrl.lock import alone

    if args.launch and "{recipe}" not in args.launch:
        raise InputError("--launch: the command has no {recipe}, the place of the recipe's path")
    table = matrix.load(args.matrix)
    cells = matrix.cells(table, table.budget.steps or FIRST)
    runs = compare.find(cells, table.budget)
    missing = [
        (cell, steps)
        for cell, run in runs
        if (steps := compare.steps_wanted(cell, table.budget, run)) is not None
    ]
    failed: list[str] = []
    if args.dry_run:
        for cell, steps in missing:
            print(f"{cell.title}: to {steps} steps in {cell.folder}")
    elif not args.report_only:
        with alone(Path(table.directory), "comparison"):
            if args.launch:
                _launch(args.launch, missing)
            else:
                failed = _train(table, missing, args.jobs)
    ready = compare.finished(compare.find(cells, table.budget), table.budget)
    print(f"{len(ready)} of {len(cells)} runs are finished")
    if not args.dry_run and any(each.cell.variant == matrix.BASELINE for each in ready):
        for path in compare_page.write(table, cells, compare.compare(table, ready), ready):
            print(path)
    if failed:
        more = f"; and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
        raise RunError(
            f"{len(failed)} runs failed; the same command tries them again: {'; '.join(failed[:SHOWN])}{more}"
        )


def _recipe(cell: Cell, steps: int) -> Path:
    """Writes the recipe of a cell beside its run folder."""
    from jaxrl import config
    from jaxrl.files import write_atomically

    path = cell.folder.with_suffix(".toml")
    write_atomically(path, config.to_toml(config.load(cell.recipe, {"run.steps": steps})))
    return path


def _launch(template: str, missing: Sequence[tuple[Cell, int]]) -> None:
    """Starts each run that was not started for so many steps before."""
    from jaxrl.files import write_atomically

    for cell, steps in missing:
        marker = cell.folder.with_suffix(".launched")
        if marker.exists() and int(marker.read_text(encoding="utf-8")) >= steps:
            print(f"{cell.title}: started before, and not finished; remove {marker} to start it again")
            continue
        command = [part.replace("{recipe}", str(_recipe(cell, steps))) for part in shlex.split(template)]
        print(f"{cell.title}: {shlex.join(command)}", flush=True)
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RunError(
                f"--launch: {error}; the runs before it are started, and the same command goes on"
            ) from None
        write_atomically(marker, f"{steps}\n")


def _train(table: Matrix, missing: Sequence[tuple[Cell, int]], jobs: int) -> list[str]:
    """Trains runs here, so many at a time; returns a line for each that failed."""
    from evals import compare

    stopping, running = threading.Event(), set[subprocess.Popen[bytes]]()
    shares, number = queue.SimpleQueue[Sequence[int]](), itertools.count(1)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for job in range(jobs):
        shares.put(cores[job::jobs] or cores)

    def wanted(cell: Cell) -> int | None:
        [(_, run)] = compare.find([cell], table.budget)
        return compare.steps_wanted(cell, table.budget, run)

    def trained(cell: Cell, steps: int | None, log: Path, share: Sequence[int]) -> str:
        """Trains until the budget is used; returns what failed."""
        before = None
        while steps is not None and not stopping.is_set():
            if steps == before:
                return "ended short of its budget"
            command = [sys.executable, "-m", "jaxrl.cli", "train", str(_recipe(cell, steps)), "--quiet"]
            with log.open("ab") as file:  # in a session of its own, so that Ctrl-C reaches it once, from here
                process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
            running.add(process)
            if stopping.is_set():
                process.send_signal(signal.SIGINT)
            with contextlib.suppress(ProcessLookupError):  # it may have ended already
                if share:
                    os.sched_setaffinity(process.pid, share)
            status = process.wait()
            running.discard(process)
            if status and not stopping.is_set():
                return f"status {status}"
            before, steps = steps, wanted(cell)
        return ""

    def one(cell: Cell, steps: int) -> str:
        if stopping.is_set():
            return ""
        share, began, log = shares.get(), time.monotonic(), cell.folder.with_suffix(".log")
        try:
            failure = trained(cell, steps, log, share)
        finally:
            shares.put(share)
        said = f"{cell.title}: {failure}, see {log}" if failure else ""
        if not stopping.is_set():
            took = f"{cell.title}, {time.monotonic() - began:.0f} s"
            print(f"{next(number)} of {len(missing)}: {said or took}", flush=True)
        return said

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            return [line for line in pool.map(one, *zip(*missing, strict=True)) if line]
        except BaseException:
            stopping.set()
            for process in list(running):
                process.send_signal(signal.SIGINT)  # they save their steps
            raise
