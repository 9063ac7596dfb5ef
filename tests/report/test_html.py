"""The report's page: what it holds, without a browser and, where Chromium is installed, in one."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl import config
from jaxrl.data import problem_texts
from jaxrl.report.html import render, spans
from jaxrl.report.problems import around
from jaxrl.report.runs import read_run, series, smooth
from jaxrl.telemetry.rollouts import rollout_files, write_rollouts
from jaxrl.telemetry.timer import PHASES
from jaxrl.types import FinishReason, Prompt, Rollout

PNG = f"data:image/png;base64,{base64.b64encode(b'PNG').decode()}"
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
VOCABULARY = ["", "two", " plus", " é😀", HOSTILE, "\n", "\\boxed{", "4", "}", " end"]


def make_run(folder: Path, steps: int = 40, groups: int = 3, recipe: str = "[run]\nseed = 7\n") -> Path:
    folder.mkdir()
    rng = np.random.default_rng(steps)
    rows: list[dict[str, float | None]] = []
    for i in range(steps):
        entropy, norm = 1 - 0.8 * i / steps + rng.normal(0, 0.01), float(rng.lognormal())
        row: dict[str, float | None] = {"step": i, "reward/mean": i / steps, "policy/entropy": entropy}
        row |= {"response/length_mean": 100.0 + i, "update/grad_norm": norm}
        rows.append(row | {"time/sample": 1.0, "time/update": 3.0, "time/step": 4.5})
    rows[0]["time/first_step"] = 60.0
    rows[3]["policy/entropy"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.toml").write_text(recipe)
    (folder / "eval").mkdir()
    for step, accuracy in ((0, 0.2), (20, 0.5), (40, 0.8)):
        result = {"name": "step", "step": step, "accuracy": accuracy}
        result |= {"ci95": [accuracy - 0.1, accuracy + 0.05], "problems": 50, "samples": 8}
        (folder / "eval" / f"step_{step}.json").write_text(json.dumps(result))
    (folder / "eval" / "benchmarks").mkdir()
    for step in (0, 40):
        measured = {"pass@1": 0.25 + step / 100, "ci95": [0.2, 0.7]}
        aime = {"title": "AIME 2024", "length_mean": 100 + step} | measured
        amc = {"title": "AMC 2023", "pass@1": 0.5, "ci95": [0.4, 0.6]}
        result = {"step": step, "benchmarks": {"aime24": aime, "amc23": amc}, "average": measured}
        (folder / "eval" / "benchmarks" / f"step_{step}.json").write_text(json.dumps(result))
    for step in (0, 20):
        made = [[rollout(f"p{step}-{p}", g, step) for g in range(8)] for p in range(groups)]
        write_rollouts(folder, step, made, lambda ids: "".join(VOCABULARY[i] for i in ids))
    return folder


def rollout(problem: str, sample: int, step: int) -> Rollout:
    """A rollout of eight, of which the first three are right and the last is cut short."""
    tokens = np.array([1, 2, 3, 4, 5, 6, 7, 8] + [9] * sample, np.int32)
    logprobs = -np.arange(len(tokens), dtype=np.float32) / 4
    prompt = Prompt(problem, np.array([1, 4], np.int32), "<b>4</b>")
    finish: FinishReason = "length" if sample == 7 else "stop"
    score, penalty = 1.0 if sample < 3 else -1.0, -0.25 if sample == 7 else 0.0
    return Rollout(prompt, tokens, logprobs, finish, step, score, score + penalty)


class Scripts(HTMLParser):
    """The scripts of a page by id, and its attributes that name a resource."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.resources: list[str] = []
        self._script: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.resources += [v or "" for k, v in attributes if k in ("src", "href", "srcset", "data")]
        if tag == "script":
            self._script = values.get("id") or f"script {len(self.scripts)}"
            self.scripts[self._script] = ""

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[self._script] += data

    def unpacked(self, name: str) -> Any:
        return json.loads(gzip.decompress(base64.b64decode(self.scripts[f"packed-{name}"])))


def page_of(*runs: Path, megabytes: int = 30) -> tuple[Path, Scripts, str]:
    path = runs[0] / "report.html"
    text = render([read_run(run) for run in runs], megabytes, b"PNG")
    path.write_text(text, encoding="utf-8")
    return path, Scripts(text), text


def test_curves_and_rollouts_come_back_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    _, page, _ = page_of(run)
    (curves,), (rollouts,) = page.unpacked("curves"), page.unpacked("rollouts")
    assert curves["metrics"]["step"] == list(range(1, 41))
    assert curves["metrics"]["policy/entropy"][3] is None
    assert curves["metrics"]["reward/mean"][13] == 13 / 40
    assert [e["accuracy"] for e in curves["evaluations"]] == [0.2, 0.5, 0.8]
    assert [b["scores"]["average"]["pass@1"] for b in curves["benchmarks"]] == [0.25, 0.65]
    assert rollouts["prompts"][0] == ["p0-0", "two" + HOSTILE, "<b>4</b>"] and len(rollouts["prompts"]) == 6
    assert len(rollouts["rows"]) == 48
    *numbers, text, lengths, costs, reward = rollouts["rows"][31]
    assert reward == -1.25
    mean = numbers.pop()
    assert numbers == [21, 3, 7, -1.0, 1, 20, 15]  # step, prompt, sample, score, truncated, version, tokens
    assert [ord(c) - 32 for c in lengths] == [len(VOCABULARY[i]) for i in [1, 2, 3, 4, 5, 6, 7, 8] + [9] * 7]
    assert [ord(c) - 32 for c in costs] == [25 * i for i in range(15)] and mean == -1.75
    assert text.startswith("two plus é😀</script>")


def test_each_phase_and_the_rest_have_a_color(tmp_path: Path) -> None:
    _, _, text = page_of(make_run(tmp_path / "run"))
    (phases, colors), *_ = re.findall(r"PHASES = (\[.*?\]), PHASE_COLORS = (\[.*?\]);", text)
    assert tuple(json.loads(phases)) == PHASES
    assert len(set(json.loads(colors))) == len(PHASES) + 1


def test_nothing_in_a_run_is_markup_and_nothing_is_fetched(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    run = make_run(tmp_path / evil, recipe=f"[data]\nsuffix = {json.dumps(HOSTILE)}\n")
    _, page, text = page_of(run)
    assert len(page.scripts) == 5
    assert page.resources == ["#", PNG, "#checks"]  # the view, the image and a warning's rule, and no source
    assert HOSTILE not in text and evil not in text
    assert html.escape(evil) in text and "owned" in text  # shown, as text
    without_data = re.sub(r'<script type="text/plain".*?</script>', "", text, flags=re.S)
    assert "http" not in re.sub("http-equiv", "", without_data)
    assert "default-src 'none'" in text


def test_the_recipe_is_compared_with_justrl(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", recipe="[rollout]\nsamples = 4\n")
    _, _, text = page_of(one, two)
    table = text[text.index('<table id="differences">') :].split("</table>")[0]
    rows = [re.sub(r"<.*?>|\s", " ", row).split() for row in table.split("<tr>")[2:]]
    assert rows == [["run.seed", "1", "7", "same"], ["rollout.samples", "8", "same", "4"]]
    assert config.to_toml(config.load(two / "recipe.toml")).splitlines()[1] in html.unescape(text)


def cells(table: str) -> list[list[str]]:
    """The rows of a table's HTML but for its head, as words."""
    return [re.sub(r"<.*?>|\s+", " ", row).split() for row in table.split("</table>")[0].split("<tr>")[2:]]


def test_prompts_have_a_section_where_a_run_has_their_history(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    assert "<h2>Prompts</h2>" not in page_of(one, two)[2]
    rows = [{"step": step, "prompts": {HOSTILE: [1 - step, 16], "b": [0, 8]}} for step in (0, 1)]
    (two / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, page, text = page_of(one, two)
    assert len(page.scripts) == 5 and HOSTILE not in text
    counts, never, hard = map(
        cells, re.split(r'<table id="prompts">|<table data-never>|<table data-hardest>', text)[1:]
    )
    assert [[*line[-2:]] for line in counts] == [["-", "2"], ["-", "1"], ["-", "1"]]
    assert never == [["b", "16", "0", "2"]]
    assert len(hard) == 1 and hard[0][-3:] == ["32", "1", "2"]


def test_listed_problems_have_their_text(tmp_path: Path) -> None:
    """From a rollout in the page, with a link to it; from one that is not; from the data; else the id."""
    run = make_run(
        tmp_path / "run", recipe="[data]\npath = 'x.jsonl'\nproblem_column = 'q'\nanswer_column = 'a'\n"
    )
    data = tmp_path / "x.jsonl"
    data.write_text(json.dumps({"q": "What is 5 + 5?", "a": "10", "id": "in data"}) + "\n")
    moved = config.load(run / "recipe.toml")
    (run / "recipe.toml").write_text(config.to_toml(moved).replace("x.jsonl", str(data)))
    (in_data,) = problem_texts(config.load(run / "recipe.toml").data)
    texts = ["<user>1 + 1?</user>", "<user>2 | 2?</user>", "<user>3 + 3?</user>"]
    one, logprobs = np.zeros(1, np.int32), np.zeros(1, np.float32)
    groups = [[Rollout(Prompt(str(n), one + n, "2"), one, logprobs, "stop", 0, -1.0, -1.0)] for n in range(3)]
    for step, some in ((0, groups[:2]), (20, groups[2:])):
        write_rollouts(run, step, some, lambda ids: texts[ids[0]])
    counts = {"0 0123456789abcdef": [0, 19], "1": [0, 18], in_data: [0, 17], "lost": [0, 16], "2": [1, 16]}
    (run / "prompts.jsonl").write_text(json.dumps({"step": 0, "prompts": counts}) + "\n")
    _, _, text = page_of(run, megabytes=0)  # the first rollout of each step
    never, hard = (
        re.findall(r'class="clamp">(.*?)</span>', part) for part in text.split("<table data-")[1:3]
    )
    assert never == ['<a href="#of=0&amp;problem=0">1 + 1?</a>', "2 | 2?", "What is 5 + 5?", "lost"]
    assert hard == ['<a href="#of=0&amp;problem=2">3 + 3?</a>']


def test_the_text_of_a_problem_is_without_what_all_prompts_have() -> None:
    prompts = ["<s>Be brief.\nuser: 12+1?\n\nThink.</s>", "<s>Be brief.\nuser: 15+1?\n\nThink.</s>"]
    assert around(prompts) == ("<s>Be brief.\n", "\n\nThink.</s>")
    assert around(["<user>12+1=?<end>", "<user>13+1=?<end>"]) == ("<user>", "<end>")
    assert around(prompts[:1]) == around([]) == around(["1", "21"]) == ("", "")


def test_warnings_stand_beside_their_curve_and_name_their_run(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    rows = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    rows = [
        row | {"policy/entropy": 1.0, "groups/all_correct_fraction": 0.5, "groups/all_wrong_fraction": 0.4}
        for row in rows
    ]
    (one / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = html.unescape(page_of(one, two)[2])
    assert "under half of the first tenth" in text
    beside = {part.split('"')[0]: part.split("<div>")[0] for part in text.split('data-metric="')[1:]}
    warned = {
        key: re.findall(r"</span>(\w+):\s+<a[^>]*>⚠ ([\w ]+)</a>", part) for key, part in beside.items()
    }
    dead = "groups/all_correct_fraction + groups/all_wrong_fraction"
    assert warned == {
        "policy/entropy": [("two", "entropy collapse")],
        "reward/mean": [],
        "response/length_mean": [],
        dead: [("one", "dead groups")],
    }
    assert "⚠" not in text[: text.index("<h2>Training dynamics")]


def test_the_budget_has_no_row_twice(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    for run, devices in ((one, 1), (two, 4)):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        (run / "metrics.jsonl").write_text(
            "".join(json.dumps(row | {"perf/devices": devices}) + "\n" for row in rows)
        )
    table = page_of(one, two)[2].split('<table id="budget">')[1]
    names = re.findall(r"<tr><td>(.*?)</td>", table.split("</table>")[0])
    assert len({*names}) == len(names) and not any("device seconds" in name for name in names)
    assert cells(table)[names.index("seconds update")][2:] == ["120", "120", "(480", "device", "seconds)"]


def test_a_comparison_begins_with_what_differs(tmp_path: Path) -> None:
    recipe = "[run]\nseed = {}\ndirectory = '{}'\n[rollout]\nsamples = 4\n[optimizer]\nlearning_rate = {}\n"
    one = make_run(tmp_path / "one", recipe=recipe.format(1, "here", 1e-6))
    two = make_run(tmp_path / "two", recipe=recipe.format(2, "there", 2e-6))
    text = page_of(one, two)[2]
    before = text[: text.index("<h2>Training dynamics")]
    assert cells(before.split('<table id="compared">')[1]) == [
        ["optimizer.learning_rate", "1e-06", "same", "2e-06"],  # what steps depend on goes first
        ["run.seed", "1", "same", "2"],
    ]
    assert '<table id="compared">' not in page_of(one)[2]
    assert "The recipes are the same." in page_of(one, one)[2]


def test_the_page_begins_with_the_result_and_has_it_as_an_image(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "eval" / "benchmarks")
    _, page, text = page_of(run)
    result = re.sub(r"<.*?>|\s+", " ", text[text.index('<section id="headline"') :].split("</section>")[0])
    words = " ".join(result.split())
    assert words.startswith(
        "20.0% → 80.0% held-out accuracy 40 steps · 0.05 hours · model DeepSeek-R1-Distill-Qwen-1.5B"
    )
    assert "95% intervals 10.0% to 25.0% and 70.0% to 85.0%, bootstrap over problems" in words
    assert "JustRL's recipe." in words  # a seed is no difference
    assert '<meta property="og:image" content="summary.png">' in text and PNG in page.resources
    (description,) = re.findall(r'og:description"\s+content="(.*?)"', text)
    assert description.startswith("run: 20.0% → 80.0% held-out accuracy, 40 steps, 0.05 hours")


@pytest.mark.parametrize("form", [".jsonl", ".parquet"])  # of older runs, and of newer ones
@pytest.mark.parametrize("limit, steps, shown", [(1, 70, 64), (10, 70, 70)])
def test_what_is_left_out_is_said(form: str, limit: int, steps: int, shown: int, tmp_path: Path) -> None:
    run, rng = make_run(tmp_path / "run", groups=1), np.random.default_rng(0)
    files = rollout_files(run)
    rows = pq.read_table(files[0]).to_pylist()
    for file in files:
        file.unlink()
    for step in range(steps):
        for row in rows:
            # bytes that take as many in a compressed file
            noise = base64.b64encode(rng.bytes(9_500 if form == ".parquet" else 6_750)).decode()
            row |= {"step": step, "completion": noise}
        path = run / "rollouts" / f"step_{step:06d}{form}"
        if form == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
    _, page, text = page_of(run, megabytes=limit)
    (rollouts,) = page.unpacked("rollouts")
    found = {r[0] for r in rollouts["rows"]}
    assert len(found) == shown and {1, steps} <= found
    (note,) = re.findall(r"data-note>(.*?)</p>", text, re.S)
    cut = f"of {steps} steps stored" in note
    assert cut == (limit == 1) and ("--rollouts 6 takes in all" in note) == cut
    assert len(rollouts["rows"]) == (shown * 2 if cut else shown * 8)  # 15.6 kB a step: two of some 10 kB


def test_damaged_rollouts_are_left_out_and_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first, second = rollout_files(run)
    second.write_bytes(second.read_bytes()[:-20])
    _, page, text = page_of(run)
    (rollouts,) = page.unpacked("rollouts")
    assert {row[0] for row in rollouts["rows"]} == {1} and len(rollouts["rows"]) == 24
    (note,) = re.findall(r"data-note>(.*?)</p>", text, re.S)
    assert "24 rollouts of 2 steps; 1 damaged lines or files are left out" in note
    first.write_bytes(b"")
    assert "0 rollouts of 2 steps; 2 damaged" in page_of(run)[2]


def test_a_run_without_vocabulary_or_rollouts_has_a_page(tmp_path: Path) -> None:
    old, bare = make_run(tmp_path / "old"), make_run(tmp_path / "bare")
    (old / "rollouts" / "vocabulary.json").unlink()
    shutil.rmtree(bare / "rollouts")
    _, page, text = page_of(old, bare)
    first, second = page.unpacked("rollouts")
    assert first["rows"][0][9] == "" and second["rows"] == []
    assert "tokens are not shaded" in text and "bare: no stored rollouts" in text


def test_a_run_without_a_recipe_is_not_called_justrl(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "recipe.toml").write_text("")
    assert "JustRL's in every key" in page_of(run)[2]
    (run / "recipe.toml").unlink()
    text = page_of(run)[2]
    assert "in every key" not in text and "run has no recipe.toml that this version takes" in text


@given(st.lists(st.sampled_from(["a", "ab", " a", "\ufffd", "", "é"])), st.sampled_from(["", "é", "😀", "x"]))
def test_spans_cover_the_completion(pieces: list[str], extra: str) -> None:
    text = extra.join(pieces).replace("\ufffd", "")
    lengths = spans(text, pieces)
    assert sum(lengths) == (len(text) if pieces else 0) and min(lengths, default=0) >= 0


def test_spans_of_tokens_that_decode_otherwise_alone() -> None:
    assert spans("a 😀 b", ["a", " ", "\ufffd", "\ufffd", " b"]) == [1, 1, 0, 0, 3]
    assert spans("two words", ["two", "words"]) == [3, 6]  # a decoder that drops the space of a first token


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(programs):
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e '.[test]'")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(programs[1])) as driver:
        yield Page(driver)


class Page:
    """A browser's page, by CSS selectors."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path) -> None:
        self.driver.get_log("performance")
        self.driver.get(path.resolve().as_uri())
        self.until("return document.documentElement.dataset.ready === 'yes'")

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 60, 0.05).until(lambda driver: driver.execute_script(script))

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.find(selector).get_attribute("textContent")

    def choose(self, selector: str, value: str) -> None:
        self.find(f'{selector} option[value="{value}"]').click()

    def traces(self, selector: str) -> list[dict[str, Any]]:
        """Data of the lines as the library was given them; none that it did not draw."""
        drawn = self.js("return document.querySelectorAll(arguments[0] + ' .trace').length", selector)
        data = self.js("return document.querySelector(arguments[0]).data", selector)
        assert drawn == len(data)
        return data

    def count(self, expected: int) -> None:
        """Waits until the list counts that many rollouts."""
        self.until(f"return document.getElementById('page').textContent.endsWith('· {expected} rollouts')")

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def choose_rollout(self, problem: int, answer: int = 0) -> dict[str, str]:
        self.all("#list button")[problem].click()
        self.all("#answers button")[answer].click()
        return self.shown()

    def shown(self) -> dict[str, str]:
        return {key: self.text(f"#{key}") for key in ("facts", "prompt", "answer", "completion")}


@pytest.mark.browser
def test_every_control_in_a_browser(browser: Page, tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one", groups=60), make_run(tmp_path / "two", steps=30, groups=1)
    browser.open(page_of(one, two)[0])

    rows = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    expected = smooth(series(rows, "policy/entropy"))
    raw, smoothed, *others = browser.traces('[data-metric="policy/entropy"]')
    np.testing.assert_allclose(smoothed["y"], expected, rtol=1e-4)  # the page's average is the figures'
    assert raw["y"][3] is None and len(others) == 2
    type_into = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    browser.js(type_into, browser.find("#smoothing"), 0)
    assert len(browser.traces('[data-metric="reward/mean"]')) == 2  # a line a run, as measured
    browser.find('#runs [value="1"]').click()
    assert [t["name"] for t in browser.traces('[data-metric="reward/mean"]')] == ["one"]
    assert [p.is_displayed() for p in browser.all("[data-warning]")] == [True, False]
    browser.find('#runs [value="1"]').click()

    browser.choose("#metric", "time/update")
    assert browser.traces("#any")[0]["y"] == [3.0] * 40
    browser.find("#log").click()
    assert browser.js("return document.getElementById('any')._fullLayout.yaxis.type") == "log"
    held_out = browser.traces("#held-out")[0]
    assert held_out["x"] == [0, 20, 40] and held_out["y"] == [0.2, 0.5, 0.8]
    np.testing.assert_allclose(held_out["error_y"]["arrayminus"], 0.1)
    phases = {t["name"]: t["y"] for t in browser.traces("#time")}
    assert phases["update"] == [3.0] * 39 and phases["other"] == [0.5] * 39  # the first step is left out
    scores = browser.traces("#scores")
    assert [t["name"] for t in scores] == ["one", "two"] and scores[0]["y"] == [0.25, 0.65]
    np.testing.assert_allclose(scores[0]["error_y"]["array"], [0.45, 0.05])
    browser.choose("#benchmark", "amc23")
    assert browser.traces("#scores")[1]["y"] == [0.5, 0.5]
    browser.choose("#benchmark", "aime24")
    browser.choose("#measure", "length_mean")
    assert browser.traces("#scores")[0]["y"] == [100, 140]
    browser.choose("#timed", "1")
    assert len(browser.traces("#time")[0]["y"]) == 29

    browser.count(960)
    browser.choose("#order", "step")
    assert "score -1, reward -1.25, 15 tokens" in browser.choose_rollout(0, 7)["facts"]
    first = browser.choose_rollout(0)
    assert "step 1, problem p0-0, sample 1: score 1, 8 tokens" in first["facts"]
    assert first["prompt"] == "two" + HOSTILE and first["answer"] == "<b>4</b>"
    assert first["completion"] == f"two plus é😀{HOSTILE}\n\\boxed{{4}}"
    tokens = browser.all("#completion span")
    assert [t.get_attribute("textContent") for t in tokens] == VOCABULARY[1:9]
    assert [t.get_attribute("title")[:14] for t in tokens[:2]] == ["log-prob 0.00,", "log-prob -0.25"]
    styles = " ".join(token.get_attribute("style") for token in tokens)
    strengths = [float(strength) for strength in re.findall(r"[\d.]+(?=\))", styles)]
    assert len(strengths) == 7 and strengths == sorted(strengths) and strengths[0] > 0
    browser.find("#shade").click()
    assert not browser.all("#completion span")
    assert browser.text("#completion") == first["completion"]
    browser.find("#shade").click()

    browser.find("#on").click()
    assert browser.find("#page").text.startswith("page 2 of 3") and browser.find("#back").is_enabled()
    browser.find("#on").click()
    assert not browser.find("#on").is_enabled()
    assert len(browser.all("#list button")) == 20
    browser.find("#back").click()
    for outcome, count in (("right", 360), ("wrong", 600), ("truncated", 120), ("", 960)):
        browser.choose("#outcome", outcome)
        browser.count(count)
    browser.find("#from").send_keys("2")
    browser.count(480)
    assert browser.choose_rollout(0)["facts"].strip("✓ ").startswith("step 21")
    browser.find("#to").send_keys("20")
    browser.count(0)
    assert "No rollout passes" in browser.find("#detail").text
    for box in ("#from", "#to"):
        browser.js(type_into, browser.find(box), "")
    browser.count(960)
    browser.find("#search").send_keys("END END END end end end end")
    browser.count(120)  # the longest of each group, whatever the case
    browser.find("#search").clear()
    browser.find("#search").send_keys("\\boxed{4}")  # a text, not a pattern
    browser.count(960)
    browser.choose("#of", "1")
    browser.count(16)

    before = browser.js("return getComputedStyle(document.body).backgroundColor")
    theme = browser.js("return document.documentElement.dataset.theme")
    browser.find("#theme").click()
    assert browser.js("return document.documentElement.dataset.theme") != theme
    assert browser.js("return getComputedStyle(document.body).backgroundColor") != before

    assert "owned" not in browser.driver.title
    assert browser.driver.get_log("browser") == []  # no error, nothing blocked
    events = [json.loads(e["message"])["message"] for e in browser.driver.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url.split(":")[0] for url in asked} == {"file"} and len(asked) == 1


def learning(folder: Path) -> Path:
    """A run with one problem that was learned, one that was lost and one that was never solved, and what they count."""
    run = make_run(folder)
    right = {"lost": (7, 2), "learned": (1, 6), "same": (4, 5), "never": (0, 0)}
    texts = [f"<user>The problem that is {name}<assistant>" for name in right]
    for at, step in enumerate((0, 20)):
        groups = []
        for i, (name, counts) in enumerate(right.items()):
            prompt, logprobs = Prompt(name, np.array([i], np.int32), "4"), np.zeros(1, np.float32)
            scores = [1.0 if sample < counts[at] else -1.0 for sample in range(8)]
            tokens = [np.array([4 + sample], np.int32) for sample in range(8)]
            pairs = zip(tokens, scores, strict=True)
            groups.append([Rollout(prompt, t, logprobs, "stop", step, score, score) for t, score in pairs])
        write_rollouts(run, step, groups, lambda ids: (texts + [f"answer {n}" for n in range(8)])[ids[0]])
    return run


@pytest.mark.browser
def test_the_browser_opens_on_the_most_improved_problem_with_its_answers_side_by_side(
    browser: Page, tmp_path: Path
) -> None:
    size = {"width": 1400, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    run = learning(tmp_path / "run")
    browser.open(page_of(run)[0])
    entries = [entry.text.split("\n") for entry in browser.all("#list button")]
    assert [text for text, _ in entries] == [
        f"The problem that is {name}" for name in ("learned", "same", "never", "lost")
    ]
    assert entries[0][1] == "1 of 8 right at step 1, 6 of 8 right at step 21"
    assert browser.text("#prompt") == "<user>The problem that is learned<assistant>"
    assert [a.text for a in browser.all("#answers pre")] == [f"answer {n}" for n in range(8)]
    places = [(a.location["y"], a.location["x"]) for a in browser.all("#answers > div")]
    assert len({x for _, x in places}) > 2 and len(set(places)) == 8  # side by side
    assert [b.text[0] for b in browser.all("#answers button")] == list("✓✓✓✓✓✓✗✗")
    assert [b.text for b in browser.all("#steps button")] == ["step 1: 1/8", "step 21: 6/8"]
    browser.find("#steps button").click()  # the same problem, before
    assert [b.text[0] for b in browser.all("#answers button")] == list("✓✗✗✗✗✗✗✗")
    assert browser.text("#facts").endswith(
        "step 1, problem learned, sample 1: score 1, 1 tokens, mean log-prob 0, weights after 0 steps"
    )
    assert (
        browser.js("return document.activeElement.textContent") == "step 1: 1/8"
    )  # the keyboard goes on from there
    browser.choose("#order", "hardest")
    assert [e.text.split("\n")[0][20:] for e in browser.all("#list button")] == [
        "never",
        "learned",
        "lost",
        "same",
    ]
    browser.choose("#order", "never")
    assert [e.text.split("\n")[0][20:] for e in browser.all("#list button")] == ["never"]
    browser.count(16)

    counts = [{"lost": [7, 8], "learned": [0, 8]}, {"learned": [1, 8]}, {"lost": [8, 8], "learned": [0, 8]}]
    rows = [{"step": 10 * n, "prompts": each} for n, each in enumerate(counts)]
    (run / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    browser.open(page_of(run)[0])  # the run's history has steps of which no answer is stored
    assert [b.text for b in browser.all("#list button small")][:2] == [
        "4 of 8 right at step 1, 5 of 8 right at step 21",
        "7 of 8 right at step 1, 8 of 8 right at step 21",
    ]
    browser.find("#search").send_keys("is learned")
    browser.count(16)
    steps = [(b.text, b.is_enabled()) for b in browser.all("#steps button")]
    assert steps == [("step 1: 0/8", True), ("step 11: 1/8", False), ("step 21: 0/8", True)]


@pytest.mark.browser
def test_the_address_reopens_the_view(browser: Page, tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), learning(tmp_path / "two")
    path = page_of(one, two)[0]
    browser.open(path)
    assert "#" not in browser.driver.current_url  # until something is chosen
    browser.find('#runs [value="0"]').click()
    browser.choose("#metric", "time/update")
    browser.find("#log").click()
    browser.choose("#of", "1")
    browser.choose("#outcome", "right")
    browser.find("#search").send_keys("problem that is l")
    browser.count(16)
    browser.all("#list button")[1].click()
    browser.find("#steps button").click()
    browser.all("#answers button")[2].click()
    browser.find("#shade").click()
    browser.until("return /shade=false.*answer=3/.test(location.hash)")
    seen = browser.shown()
    assert "step 1, problem lost, sample 3" in seen["facts"]
    address = browser.driver.current_url
    assert browser.find("#link").get_attribute("href") == address

    for url in (address, browser.driver.current_url.split("#")[0] + "#checks", address):
        browser.driver.get("about:blank")
        browser.driver.get(url)
        browser.until("return document.documentElement.dataset.ready === 'yes'")
    assert browser.shown() == seen
    assert browser.driver.current_url == address and not browser.find("#shade").is_selected()
    assert [t["name"] for t in browser.traces("#any")] == ["two", "two"]
    assert browser.js("return document.getElementById('any')._fullLayout.yaxis.type") == "log"
    assert (
        browser.find("#outcome").get_attribute("value") == "right"
        and browser.find("#search").get_attribute("value") == "problem that is l"
    )
    assert [e.get_attribute("aria-current") for e in browser.all("#list button")][:2] == ["false", "true"]
    browser.find("#link").click()
    assert browser.driver.current_url == address
    browser.choose("#outcome", "wrong")
    link = "of=1&outcome=right&problem=never&step=21&answer=8"  # which the filter leaves out
    for url in (link, "checks"):
        browser.driver.get("about:blank")
        browser.driver.get(f"{path.resolve().as_uri()}#{url}")
        browser.until("return document.documentElement.dataset.ready === 'yes'")
        if url == link:
            assert "step 21, problem never, sample 8" in browser.shown()["facts"]
    assert browser.all("#list button") and browser.driver.current_url.endswith("#checks")
    browser.js("location.hash = 'of=1&problem=never&step=999&answer=x'")  # of another page
    browser.until("return document.getElementById('facts').textContent.includes('problem never, sample 1')")
    assert browser.find('#runs [value="0"]').is_selected() and not browser.find("#log").is_selected()


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """WCAG 2's ratio of two colors in sRGB, each from 0 to 255."""
    linear = [
        [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        for color in (one, other)
    ]
    light, dark = sorted((np.dot((0.2126, 0.7152, 0.0722), color) for color in linear), reverse=True)
    return float((light + 0.05) / (dark + 0.05))


@pytest.mark.browser
def test_every_runs_thin_line_is_readable_on_dark_paper(browser: Page, tmp_path: Path) -> None:
    feature = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    browser.open(page_of(*(make_run(tmp_path / f"{i}") for i in range(7)))[0])
    paper = [
        int(c)
        for c in re.findall(r"\d+", browser.js("return getComputedStyle(document.body).backgroundColor"))
    ]
    swatches = browser.js(
        "return [...document.querySelectorAll('#runs .swatch')].map(s => getComputedStyle(s).backgroundColor)"
    )
    thin, thick = (browser.traces('[data-metric="reward/mean"]')[i::2] for i in (0, 1))
    for raw, smoothed, swatch in zip(thin, thick, swatches, strict=True):
        color = [int(raw["line"]["color"][i : i + 2], 16) for i in (1, 3, 5)]
        mixed = [raw["opacity"] * c + (1 - raw["opacity"]) * p for c, p in zip(color, paper, strict=True)]
        assert contrast(mixed, paper) > 3 and smoothed["line"]["width"] > raw["line"]["width"]
        assert [int(c) for c in re.findall(r"\d+", swatch)] == color


@pytest.mark.browser
@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_takes_the_systems_scheme_and_fits_the_window(
    scheme: str, width: int, browser: Page, tmp_path: Path
) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    browser.open(page_of(make_run(tmp_path / "run"))[0])
    assert browser.js("return document.documentElement.dataset.theme") == scheme
    light = browser.js("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    assert browser.js("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.js("return document.querySelector('.chart svg').getBoundingClientRect().width") > 250


@pytest.mark.browser
def test_a_hostile_text_would_not_run_even_as_markup(browser: Page, tmp_path: Path) -> None:
    browser.open(page_of(make_run(tmp_path / "run"))[0])
    browser.js("document.getElementById('detail').innerHTML = arguments[0]", HOSTILE)
    script = "const s = document.createElement('script'); s.textContent = \"document.title = 'owned'\"; "
    browser.js(script + "document.body.append(s)")
    assert "owned" not in browser.driver.title
    browser.driver.get_log("browser")  # what the policy refused is not the next test's error


@pytest.mark.slow
@pytest.mark.browser
def test_a_run_of_4000_steps_and_20000_rollouts(browser: Page, tmp_path: Path) -> None:
    from benchmarks import report as benchmark

    run = tmp_path / "long"
    benchmark.make_run(run)
    path, _, _ = page_of(run)
    assert path.stat().st_size < 20e6
    browser.open(path)
    browser.until("return document.getElementById('page').textContent.endsWith('20,480 rollouts')")
    assert len(browser.traces('[data-metric="reward/mean"]')[0]["y"]) == 4000
    search = "document.getElementById('search').value = arguments[0]; list();"
    timed = f"const began = performance.now(); {search} return performance.now() - began"
    milliseconds = browser.js(timed, "therefore we have")
    assert milliseconds < 2000
    assert 0 < browser.js("return found.length") < 20_480
    assert browser.js("return document.querySelectorAll('#list button').length") == 50
    print(f"search: {milliseconds:.0f} ms")
