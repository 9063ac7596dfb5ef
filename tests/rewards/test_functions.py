"""Reward functions by path: what they get, what they may be, how they fail, and that they run beside each other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxrl import config
from jaxrl.errors import InputError, RunError
from jaxrl.marking import Pending, finished, make_marker
from jaxrl.rewards.functions import Functions, columns_of, describe, digest_of
from jaxrl.types import Prompt, Rollout

TEXTS = ["zero", "one", "two", "three \\boxed{3}"]


def detokenize(tokens: np.ndarray) -> str:
    return " ".join(TEXTS[i] for i in tokens)


def rollout(token: int = 3, **more: Any) -> Rollout:
    prompt = Prompt("p7", np.array([1, 2], np.int32), "3", **more)
    return Rollout(prompt, np.array([token], np.int32), np.zeros(1, np.float32), "stop", 0)


def write(folder: Path, source: str) -> str:
    (folder / "mine.py").write_text(source)
    return f"{folder / 'mine.py'}:score"


def recipe_of(path: str, **keys: Any) -> config.Recipe:
    own = {"function": path, "workers": 2} if path else {"workers": 2}
    return config.from_dict({"reward": own | keys})


@contextmanager
def opened(recipe: config.Recipe, log: Path | None = None) -> Iterator[Functions]:
    functions = Functions(recipe.reward, log)
    try:
        yield functions
    finally:
        functions.close()


def marked(recipe: config.Recipe, rollouts: list[Rollout]) -> list[Rollout]:
    with opened(recipe) as functions:
        mark = make_marker(recipe, detokenize, functions)
        (found,) = finished([[mark(each) for each in rollouts]])
    return found


def test_a_function_gets_what_it_names_and_no_more(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "def score(response, answer, prompt, tokens, finish_reason, level, tests=None, absent=7, **rest):\n"
        "    got = [response, answer, prompt, tokens, finish_reason, level, tests, absent, rest]\n"
        "    return got == ['three \\\\boxed{3}', '3', 'one two', 1, 'stop', 5, {'a': [1]}, 7, {}]\n",
    )
    columns = {"level": 5, "tests": {"a": [1]}}
    (found,) = marked(recipe_of(path), [rollout(columns=columns)])
    assert found.rewards == {"score": 1.0}
    assert columns_of(recipe_of(path).reward).keys() == {"level", "tests", "absent"}


def test_the_reward_is_the_weighted_sum_beside_the_verifier(tmp_path: Path) -> None:
    write(
        tmp_path,
        "import numpy as np\n"
        "def short(tokens): return np.float32(0.25)\n"
        "async def parts(response): return {'a': 1, 'b': True}\n",
    )
    functions = [
        {"path": f"{tmp_path / 'mine.py'}:short", "weight": 2.0},
        {"path": f"{tmp_path / 'mine.py'}:parts", "weight": -0.5, "name": "style"},
    ]
    recipe = recipe_of("", functions=functions, verifier_weight=3.0, wrong=0.0)
    right, wrong = marked(recipe, [rollout(3), rollout(2)])
    parts = {"short": 0.25, "style": 2.0, "style/a": 1.0, "style/b": 1.0}
    assert right.rewards == wrong.rewards == parts
    assert (right.score, wrong.score) == (1.0, -1.0)
    assert right.reward == 3.0 + 0.5 - 1.0 and wrong.reward == 0.0 + 0.5 - 1.0
    assert not isinstance(right, Pending)


def test_without_a_verifier_the_threshold_says_what_is_right(tmp_path: Path) -> None:
    path = write(tmp_path, "def score(response): return len(response) / 4\n")
    found = marked(recipe_of(path, verifier="none", threshold=0.9), [rollout(0), rollout(1)])
    assert [(each.score, each.reward) for each in found] == [(1.0, 1.0), (-1.0, 0.75)]


def test_a_batch_function_gets_lists_and_is_called_less_often(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "import time\n"
        "def score(responses, answers, tokens, level, missing=4):\n"
        "    time.sleep(0.05)\n"
        "    assert len(answers) == len(tokens) == len(level) == len(missing) == len(responses)\n"
        "    return [{'size': len(responses), 'level': n} for n in level]\n",
    )
    rollouts = [rollout(columns={"level": n}) for n in range(40)]
    found = marked(recipe_of(path, in_flight=16), rollouts)
    assert [each.rewards["score/level"] for each in found if each.rewards] == list(range(40))
    sizes = [each.rewards["score/size"] for each in found if each.rewards]
    assert max(sizes) == 16 and len(sizes) == 40


@pytest.mark.parametrize(
    ("source", "calls", "most"),
    [
        ("import asyncio\nasync def score(response):\n    await asyncio.sleep(0.2)\n    return 1\n", 64, 3.0),
        ("import time\ndef score(response):\n    time.sleep(0.2)\n    return 1\n", 8, 2.5),
    ],
    ids=["async", "plain"],
)
def test_slow_functions_run_beside_each_other_and_marking_does_not_wait(
    tmp_path: Path, source: str, calls: int, most: float
) -> None:
    recipe = recipe_of(write(tmp_path, source), in_flight=32)
    with opened(recipe) as functions:
        mark = make_marker(recipe, detokenize, functions)
        finished([[mark(rollout()) for _ in range(2)]])  # processes are there
        began = time.monotonic()
        under_way = [mark(rollout()) for _ in range(calls)]
        assert time.monotonic() - began < 0.2
        assert all(isinstance(each, Pending) for each in under_way)
        finished([under_way])
        assert 0.2 <= time.monotonic() - began < most


@pytest.fixture(autouse=True)
def little_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxrl.rewards.functions.GRACE", 0.5)


FAILING = {
    "raises": ("raise KeyError('x')", "raised KeyError: 'x' (mine.py, line 3)", "correct it"),
    "no number": ("return 'good'", "returned 'good' (str); a reward is a finite number", "correct it"),
    "nothing": ("return None", "returned None (NoneType)", "correct it"),
    "not finite": ("return float('nan')", "returned nan (float)", "correct it"),
    "no names": ("return {}", "returned {} (dict)", "correct it"),
    "late": ("import time; time.sleep(60)", "took longer than 0.5 s", "raise reward.seconds"),
    "exits": ("raise SystemExit(3)", "raised SystemExit: 3", "correct it"),
    "dies": ("import os; os.kill(os.getpid(), 11)", "ended its process (SIGSEGV)", "correct it"),
    "memory": ("return len(bytearray(1 << 33))", "raised MemoryError", "raise reward.memory_mib = 1024"),
}


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize("case", FAILING)
def test_a_failure_names_function_prompt_and_cause(tmp_path: Path, case: str, kind: str) -> None:
    body, cause, remedy = FAILING[case]
    path = write(
        tmp_path, f"{kind} score(response):\n    if 'three' in response:\n        {body}\n    return 0.5\n"
    )
    recipe = recipe_of(path, seconds=0.5, memory_mib=1024)
    with pytest.raises(InputError) as caught:
        marked(recipe, [rollout(0), rollout(3)])
    message = str(caught.value)
    assert message.startswith(f'reward.function = "{path}" {cause}') and "\n" not in message
    assert f"for an answer to prompt p7; {remedy}" in message and 'reward.on_failure = "value"' in message


@pytest.mark.parametrize("kind", ["plain", "async", "batch"])
@pytest.mark.parametrize("case", FAILING)
def test_failures_count_as_a_value_and_the_others_are_kept(tmp_path: Path, case: str, kind: str) -> None:
    body, _, _ = FAILING[case]
    whole = f"if 'three' in response:\n        {body}\n    return 0.5"
    source = {
        "plain": f"def score(response):\n    {whole}\n",
        "async": f"import asyncio\nasync def score(response):\n    await asyncio.sleep(0.01)\n    {whole}\n",
        "batch": f"def score(responses):\n    return list(map(one, responses))\ndef one(response):\n    {whole}\n",
    }[kind]
    more = {"seconds": 0.5, "memory_mib": 1024, "on_failure": "value", "failure_value": -2.0}
    recipe = recipe_of(write(tmp_path, source), **more)
    found = marked(recipe, [rollout(n % 4) for n in range(12)])
    values = [each.rewards["score"] for each in found if each.rewards]
    assert [v for v in values if v == v] == [0.5] * 9 and len(values) == 12
    assert all(np.isnan(values[3::4]))
    assert [each.reward for each in found][3::4] == [-1.0] * 3  # 1 for the verifier, and the value


def test_what_may_pass_is_tried_again_by_the_same_command(tmp_path: Path) -> None:
    path = write(tmp_path, "def score(response): raise ConnectionRefusedError('the judge is away')\n")
    with pytest.raises(RunError, match=r"the judge is away .*; the same command tries again, or set"):
        marked(recipe_of(path), [rollout()])


def test_after_a_failure_nothing_more_is_marked(tmp_path: Path) -> None:
    recipe = recipe_of(write(tmp_path, "def score(response): return 1 / 0\n"))
    with opened(recipe) as functions:
        mark = make_marker(recipe, detokenize, functions)
        with pytest.raises(InputError, match="ZeroDivisionError"):
            finished([[mark(rollout())]])
        with pytest.raises(InputError, match="ZeroDivisionError"):
            mark(rollout())


def test_a_file_that_changes_under_a_run_ends_it(tmp_path: Path) -> None:
    recipe = recipe_of(write(tmp_path, "def score(response): return 1\n"))
    with opened(recipe) as functions:
        mark = make_marker(recipe, detokenize, functions)
        functions.try_out(rollout().prompt, detokenize, print)
        write(tmp_path, "def score(response): return 2\n")
        with pytest.raises(InputError, match="its file has changed since the run began; put it back"):
            finished([[mark(rollout())]])


def test_what_it_prints_and_raises_is_in_the_log(tmp_path: Path) -> None:
    path = write(tmp_path, "def score(response):\n    print('looking')\n    return 1 / 0\n")
    recipe = recipe_of(path, on_failure="value")
    with opened(recipe, tmp_path / "rewards.log") as functions:
        finished([[make_marker(recipe, detokenize, functions)(rollout())]])
    log = (tmp_path / "rewards.log").read_text()
    assert log.startswith("looking\n") and "ZeroDivisionError" in log and "line 3, in score" in log


def test_closing_ends_the_processes_and_what_they_started(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "import os, subprocess, time\n"
        "def score(response):\n"
        "    child = subprocess.Popen(['sleep', '300'])\n"
        f"    open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "    time.sleep(300)\n",
    )
    recipe, pids = recipe_of(path), tmp_path / "pids"
    with opened(recipe) as functions:
        pending = make_marker(recipe, detokenize, functions)(rollout())
        while not pids.exists() or len(pids.read_text().split()) < 2:
            time.sleep(0.02)
    assert isinstance(pending, Pending) and pending.complete
    with pytest.raises(RunError, match="the run ended"):
        pending.complete()
    deadline = time.monotonic() + 10
    while any(alive(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_run_leaves_no_process_behind(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    busy = (
        f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(300)"
    )
    path = write(tmp_path, f"def score(response):\n    exec({busy!r})\n")
    program = (
        "from jaxrl import config\nfrom jaxrl.rewards.functions import Functions\nimport numpy as np, time\n"
        "from jaxrl.types import Prompt, Rollout\n"
        f"functions = Functions(config.Reward(function={path!r}))\n"
        "empty = np.zeros(0, np.int32)\n"
        "functions.start(Rollout(Prompt('', empty, ''), empty, empty, 'stop', 0), '', str)\n"
        "time.sleep(300)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        run.kill()
        run.wait()
    while alive(int(pid.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.py:score", "there is no file nowhere.py; give its path from the recipe's folder"),
        ("{mine}:other", "has no function other; its functions are: score"),
        ("json:other", "json has no function other"),
        ("no_such_module:score", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("no-such-entry", 'no installed package has it as an entry point of "jaxrl.rewards"'),
        ("{broken}:score", "its module cannot be imported: ValueError: not today (broken.py, line 1)"),
        ("{position}:score", "it takes 'response' by position alone"),
    ],
)
def test_what_cannot_be_called_is_one_clear_line(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "mine.py").write_text("from json import loads\ndef score(response): return 1\n")
    (tmp_path / "broken.py").write_text("raise ValueError('not today')\n")
    (tmp_path / "position.py").write_text("def score(response, /): return 1\n")
    path = path.format(**{name: tmp_path / f"{name}.py" for name in ("mine", "broken", "position")})
    with pytest.raises(InputError) as caught:
        describe(path)
    assert str(caught.value).startswith(f'reward.function = "{path}": ')
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_installed_entry_points_and_modules_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "judges-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: judges\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[jaxrl.rewards]\nour-judge = judges:Judge\n")
    (tmp_path / "judges.py").write_text("def Judge(answer): return float(answer)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    for path, title in (("our-judge", "our-judge"), ("judges:Judge", "Judge")):
        (found,) = marked(recipe_of(path), [rollout()])
        assert found.rewards == {title: 3.0}


def test_the_digest_follows_source_weight_and_name(tmp_path: Path) -> None:
    def digest(source: str, **keys: Any) -> str:
        path = write(tmp_path, source)
        return digest_of(recipe_of("", functions=[{"path": path} | keys]).reward)

    source = "def score(response): return 1\n"
    others = [digest(source + "#"), digest(source, weight=0.5), digest(source, name="x")]
    assert digest(source) == digest(source) and len({digest(source), *others}) == 4
    assert digest_of(config.Reward()) == ""
