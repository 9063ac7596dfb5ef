"""jaxrl compare."""

from __future__ import annotations

import argparse
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrl import config
from jaxrl.commands.options import positive
from jaxrl.errors import InputError, RunError
from jaxrl.files import write_atomically

if TYPE_CHECKING:
    from evals.matrix import Cell, Matrix

HELP = "train variants of a recipe over the same seeds, and say which differ"
FIRST = 20  # steps of a run by which it is known how many a budget of tokens or seconds takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("matrix", type=Path, help="MATRIX.toml, see docs/compare.md")
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="runs at a time here (default: 1)"
    )
    launch = "start each missing run by this instead, such as 'sbatch launch/slurm.sbatch {recipe}'"
    parser.add_argument("--launch", metavar="COMMAND", help=launch)
    parser.add_argument(
        "--report-only", action="store_true", help="start nothing; compare the runs that are there"
    )


def run(args: argparse.Namespace, _: list[str]) -> None:
    from evals import compare, compare_page, matrix

    table = matrix.load(args.matrix)
    cells = list(matrix.cells(table, table.budget.steps or FIRST))
    missing = [cell for cell in cells if not compare.done(cell, table)]
    if args.launch and "{recipe}" not in args.launch:
        raise InputError("--launch: the command has no {recipe}, the place of the recipe's path")
    failed: list[str] = []
    if missing and args.launch:
        _launch(args.launch, missing)
    elif missing and not args.report_only:
        failed = _train(table, missing, args.jobs)
    left = [cell for cell in cells if not compare.done(cell, table)]
    print(f"{len(cells) - len(left)} of {len(cells)} runs are finished")
    ready = [cell for cell in cells if cell not in left]
    found = compare.compare(table, compare.read(ready))
    for path in compare_page.write(table, cells, found, compare.read(ready)):
        print(path)
    if failed:
        raise RunError(
            f"{len(failed)} runs failed, and the same command tries them again: {'; '.join(failed)}"
        )


def _recipe(cell: Cell, steps: int) -> Path:
    """Writes the recipe of a cell beside its run folder."""
    path = cell.folder.with_suffix(".toml")
    values = config.load(cell.recipe, {"run.steps": steps})
    write_atomically(path, config.to_toml(values))
    return path


def _launch(template: str, cells: Sequence[Cell]) -> None:
    """Starts each run that was not started so before."""
    for cell in cells:
        marker = cell.folder.with_suffix(".launched")
        if marker.exists():
            print(f"{cell.folder}: started before, and not finished; remove {marker} to start it again")
            continue
        path = _recipe(cell, cell.recipe.run.steps)
        command = [part.replace("{recipe}", str(path)) for part in shlex.split(template)]
        ran = subprocess.run(command, check=False)
        if ran.returncode:
            raise RunError(f"{shlex.join(command)} ended with status {ran.returncode}")
        write_atomically(marker, shlex.join(command) + "\n")


def _train(table: Matrix, cells: Sequence[Cell], jobs: int) -> list[str]:
    """Trains runs here, so many at a time, each on its share of the cores; returns a line for each that failed."""
    stopping, running = threading.Event(), set[subprocess.Popen[bytes]]()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = queue.SimpleQueue[Sequence[int]]()
    for job in range(jobs):
        shares.put(cores[job::jobs] or cores)

    def one(cell: Cell) -> str:
        share = shares.get()
        try:
            return trained(cell, share)
        finally:
            shares.put(share)

    def trained(cell: Cell, share: Sequence[int]) -> str:
        from evals import compare

        print(f"{cell.variant}, seed {cell.seed}: {cell.folder}", flush=True)
        while not stopping.is_set() and (left := compare.steps_left(cell, table)):
            done = 0
            if (cell.folder / "metrics.jsonl").exists():
                done = len(compare.read_run(cell.folder).rows)
            path = _recipe(cell, max(done + left, 1) if done else cell.recipe.run.steps)
            with cell.folder.with_suffix(".log").open("ab") as log:
                command = [sys.executable, "-m", "jaxrl.cli", "train", str(path), "--quiet"]
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
                if share:
                    os.sched_setaffinity(process.pid, share)
                running.add(process)
                status = process.wait()
                running.discard(process)
            if status:
                log_file = cell.folder.with_suffix(".log")
                return f"{cell.variant}, seed {cell.seed}: status {status}, see {log_file}"
        return ""

    with ThreadPoolExecutor(jobs) as pool:
        try:
            return [line for line in pool.map(one, cells) if line]
        except BaseException:  # Ctrl-C reaches the runs too, which save their steps
            stopping.set()
            for process in running:
                process.send_signal(signal.SIGINT)
            raise
