"""Starts `jaxrl` again and again by forking a process that has imported it, because imports take most of a short run.

Run as a program with faults.so preloaded: each line of its input is a JSON list of what the child calls in faults.so
(lists of a name and arguments), the file of its output, and jaxrl's arguments. It answers with the child's process id,
and, once it has ended, with its exit status as `os.waitpid` gives it.
"""

import ctypes
import json
import os
import signal
import sys
import traceback

FAULTS = ctypes.CDLL(None)


def child(faults: list[list], output: str, arguments: list[str]) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name, *values in faults:
        getattr(FAULTS, name)(*(v.encode() if isinstance(v, str) else ctypes.c_long(v) for v in values))
    from jaxrl.cli import main

    status = 0
    try:
        sys.argv = ["jaxrl", *arguments]
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(status)


def main() -> None:
    import evals.in_training  # noqa: F401

    signal.signal(
        signal.SIGHUP, signal.SIG_DFL
    )  # nohup, under which a run goes on, may have started the tests
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            child(*json.loads(line))  # ends as a process ends that was started for it
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
