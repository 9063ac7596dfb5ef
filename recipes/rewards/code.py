"""A verifier of Python: runs the answer's code before each of the row's tests, in a process with limits.

The limits are for accidents. Code that may be malicious belongs in a container without network.
"""

import json
import re
import resource
import secrets
import subprocess
import sys
import tempfile

SECONDS, MEMORY, FILE = 5, 1 << 30, 1 << 20  # of a test; bytes

BLOCK = re.compile(r"```(?:python|py)?\n(.*?)```", re.DOTALL)


def limits() -> None:
    for which, most in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(which, (most, most))


def passes(code: str, test: str) -> bool:
    """True if the code and then the test run to their end without an error."""
    word = secrets.token_hex()  # code that exits, whatever it prints before, does not get there
    with tempfile.TemporaryDirectory() as folder:
        try:
            ran = subprocess.run(
                [sys.executable, "-I", "-c", f"{code}\n{test}\nprint({word!r})"],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=2 * SECONDS,
                preexec_fn=limits,
            )
        except (subprocess.TimeoutExpired, ValueError, OSError):  # NUL in the code, or too long a command
            return False
    return ran.returncode == 0 and ran.stdout.decode(errors="replace").endswith(f"{word}\n")


def share_passed(response: str, tests: list[str] | str) -> float:
    """The share of tests that the last block of code passes; `tests` is a column, a list of statements or its JSON."""
    blocks = BLOCK.findall(response)
    found = json.loads(tests) if isinstance(tests, str) else tests
    return sum(passes(blocks[-1], test) for test in found) / len(found) if blocks and found else 0.0
