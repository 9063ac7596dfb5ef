"""The model stage against an endpoint of our own, which answers what the candidate asks it to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from evals import judge
from evals.judge import Candidate, Judge, label
from jaxrl.errors import InputError
from jaxrl.types import JsonObject
from json_server import JsonHandler, serving


class Endpoint(ThreadingHTTPServer):
    """Replies with what stands after REPLY, or what `replies` has for it; takes prompts of `longest` characters."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: list[JsonObject] = []
        self.longest, self.fail = 10**9, 0
        self.replies: dict[str, str] = {}
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(JsonHandler):
    server: Endpoint

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            return self.reply(404, {"error": "not here"})
        return self.reply(200, {"data": [{"id": "verifier"}]})

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        self.server.asked.append(body)
        if self.server.fail:
            self.server.fail -= 1
            self.reply(503, {"error": "busy"})
        elif len(prompt) > self.server.longest:
            self.reply(400, {"error": {"message": "This model's maximum context length is 10 tokens"}})
        else:
            said = ["C", *re.findall(r"REPLY (.*)", prompt)][-1]
            self.reply(200, {"choices": [{"message": {"content": self.server.replies.get(said, said)}}]})


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving(Endpoint()) as server:
        yield server


def asking(reply: str, question: str = "What?", truncated: bool = False) -> Candidate:
    return Candidate(question, "42", f"<think>REPLY A, or so I think.</think>\nREPLY {reply}", truncated)


def prompts(endpoint: Endpoint) -> list[str]:
    return [body["messages"][0]["content"] for body in endpoint.asked]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("A", "A"),
        (" B\n", "B"),
        ("C", "C"),
        ("", ""),
        ("hm", ""),
        (r"\boxed{A}", "A"),
        (r"\boxed{B} ... Final Judgment: \boxed{A} - CORRECT", "A"),
        ("Analysis: A or B?\nFinal Judgment: (B)", "B"),
        ("Final Judgment: C", "C"),
        ("The label is B.", "B"),
        # The authors' own parser reads these as C, C, A.
        ("CORRECT", "A"),
        ("INCORRECT", "B"),
        ("INVALID", "C"),
        ("(A) CORRECT", "A"),
        ("Final Judgment: (B) - INCORRECT", "B"),
        ("BAD", ""),
        ("B", "B"),
        (" A\n", "A"),
        ("**A**", "A"),
        ("(A)", "A"),
        ("A.", "A"),
        ("`B`", "B"),
        ('"C"', "C"),
        ("A: CORRECT", "A"),
        ("A - CORRECT", "A"),
        ("(B) Incorrect", "B"),
        ("B. INCORRECT.", "B"),
        ("Incorrect.", "B"),
        ("correct", "A"),
        ("$\\boxed{B}$", "B"),
        ("\\boxed{\\text{C}}", "C"),
        ("Both are 5, so \\boxed{A}.", "A"),
        ("Final Judgment: A", "A"),
        ("**Final Judgment:** B", "B"),
        ("Analysis: both agree. Final Judgment: \\boxed{A} - <CORRECT>", "A"),
        ("Final Judgment: (C) INVALID", "C"),
        ("The candidate says 5.\n\nB", "B"),
        ("B\n\nA good try", "B"),
        ("A\n\nBoth are 12.", "A"),
        ("Judgment: B\n\nThe candidate forgot the unit.", "B"),
        ("Reason: they agree.\nVerdict: A", "A"),
        ("Answer: C", "C"),
        ("<think>maybe B\nB</think>\nA", "A"),
        ("Final Judgement: B\nBecause A is wrong", "B"),
        ("A. The candidate's answer equals 5.", "A"),
        ("B: the values differ", "B"),
        ("**B** - the sign is wrong.", "B"),
        ("(A) Both are 12, so they agree.", "A"),
        ("A because both are 12", "A"),
        ("Final Judgment: A, since both are 12.", "A"),
        ("INCORRECT: the value is 6", "B"),
        ("The response is CORRECT", "A"),
        ("The standard answer is 5. Verdict: **INCORRECT**.", "B"),
        ("So the final label is (B).", "B"),
        ("[[A]]", "A"),
        ("Final Judgment: \\boxed{C} - REPETITIVE", "C"),
        ("I am not sure: A or B", ""),
        ("A: CORRECT, B: INCORRECT, C: INVALID", ""),
        ("A. B. C.", ""),
        ("A, B or C", ""),
        ("A: the answer is incorrect", ""),
        ("A - B = 5", ""),
        ("The answer is NOT CORRECT", ""),
        ("Is it CORRECT?", ""),
        ("CORRECT or INCORRECT", ""),
        ("A\n\nThe response is INCORRECT", ""),
        ("Answer A is incorrect", ""),
        ("A good try", ""),
        ("A\nB", ""),
        ("A - INCORRECT", ""),
        ("I think the answer is (B), and so does the candidate.", ""),
        ("CORRECT is what I would say if it were B", ""),
        ("a", ""),
        ("D", ""),
        ("AB", ""),
        ("A B", ""),
        ("A/B", ""),
        ("The candidate's answer is incorrect.", ""),
        ("\\boxed{A} or \\boxed{B}", ""),
        ("C'est bon", ""),
        ("It is (A)", ""),
        ("A candidate", ""),
        ("Label: A\nLabel: B", ""),
        ("Reply with one letter: A for correct, B for incorrect", ""),
        ("Correct answer: B", ""),
        ("Grade: A+", ""),
    ],
)
def test_a_reply_has_one_label_or_none(reply: str, expected: str) -> None:
    assert label(reply) == expected


def test_it_sends_question_answer_and_the_end_of_the_response(endpoint: Endpoint, tmp_path: Path) -> None:
    ask = Judge(endpoint.url, tmp_path / "judge.jsonl", tail=30)
    long = Candidate("What?", "42", "y" * 99 + " REPLY A", False)
    found = ask.labels([asking("A"), asking("B"), asking("(C)"), long, asking("hm")])
    assert found == ["A", "B", "C", "A", ""]
    assert any("y" * 22 in text for text in prompts(endpoint))
    assert not any("y" * 23 in text for text in prompts(endpoint))
    assert all("What?" in text and "42" in text and "think" not in text for text in prompts(endpoint))
    settings = {(b["model"], b["temperature"], b["max_tokens"]) for b in endpoint.asked}
    assert settings == {("verifier", 0.0, 2048)}
    # These leave nothing for a judge to read.
    before = len(endpoint.asked)
    empty = Candidate("What?", "42", "<think>A</think>\n", False)
    assert ask.labels([asking("A", truncated=True), empty]) == ["C", "C"]
    assert len(endpoint.asked) == before


def test_each_thing_is_asked_once(endpoint: Endpoint, tmp_path: Path) -> None:
    cache = tmp_path / "judge.jsonl"
    few = [asking("A"), asking("B")]
    assert Judge(endpoint.url, cache).labels(few * 8) == ["A", "B"] * 8
    with cache.open("a") as file:
        file.write('{"key": "torn')
    assert Judge(endpoint.url + "/v1/", cache).labels(few) == ["A", "B"]
    assert len(endpoint.asked) == 2
    Judge(endpoint.url, cache).labels([asking("A", question="Another?")])
    Judge(endpoint.url, cache, model="other").labels([asking("A")])
    assert len(endpoint.asked) == 4


def test_what_is_too_long_is_cut_from_its_beginning(endpoint: Endpoint, tmp_path: Path) -> None:
    long = Candidate("What?", "42", "x" * 3000 + "\nREPLY A", False)
    endpoint.longest = len(judge.PROMPT) + 1000
    assert Judge(endpoint.url, tmp_path / "judge.jsonl").labels([long]) == ["A"]
    assert [len(text) > endpoint.longest for text in prompts(endpoint)] == [True, True, False]
    assert Judge(endpoint.url, tmp_path / "judge.jsonl").labels([long]) == ["A"] and len(endpoint.asked) == 3
    endpoint.longest = 10
    # There is no room even for the question.
    assert Judge(endpoint.url, tmp_path / "other.jsonl").labels([long]) == [""]


def test_the_released_protocol_asks_as_justrl_does(endpoint: Endpoint, tmp_path: Path) -> None:
    """No question, the whole response, truncated ones too, and nothing but "A" counts."""
    ask = Judge(endpoint.url, tmp_path / "judge.jsonl", released=True)
    found = ask.labels([asking("A "), asking(r"\boxed{A}"), asking("CORRECT"), asking("A", truncated=True)])
    assert found == ["A", "", "", "A"]
    assert all("What?" not in text and "or so I think" in text for text in prompts(endpoint))
    endpoint.longest = 10
    assert Judge(endpoint.url, tmp_path / "other.jsonl", released=True).labels([asking("A")]) == [""]


def test_a_judge_that_is_down_is_asked_no_more_and_later_again(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge.time, "sleep", lambda _: None)
    cache = tmp_path / "judge.jsonl"
    endpoint.fail = 2
    few = Judge(endpoint.url, cache, workers=1)
    assert few.labels([asking("A")]) == ["A"] and not few.down  # the third attempt
    endpoint.fail = 10**9
    ask = Judge(endpoint.url, cache, workers=1)
    assert ask.labels([asking("A"), asking("B"), asking("C")]) == ["A", None, None]
    assert "HTTP 503" in ask.down and len(endpoint.asked) == 6  # three attempts in all, not for each
    endpoint.fail = 0
    assert Judge(endpoint.url, cache).labels([asking("A"), asking("B"), asking("C")]) == ["A", "B", "C"]


def test_an_endpoint_of_another_kind_gives_no_label(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "judge.jsonl"
    monkeypatch.setattr(judge, "_content", lambda completion: completion["answers"])
    ask = Judge(endpoint.url, cache)
    assert ask.labels([asking("A")]) == [None] and "something else" in ask.down
    monkeypatch.undo()
    ask = Judge(endpoint.url + "/elsewhere", cache)
    assert ask.labels([asking("A")]) == [None] and "HTTP 404" in ask.down and not cache.exists()


def test_without_an_endpoint_there_is_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge.time, "sleep", lambda _: None)
    with Endpoint() as closed:
        url = closed.url
    ask = Judge(url, tmp_path / "judge.jsonl")
    assert ask.labels([asking("A")]) == [None] and "no answer" in ask.down


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    good = "Q {question} A {gold_answer} R {llm_response} \\boxed{{}}"
    path.write_text(good)
    assert judge.read_prompt(path) == good
    for text, said in (
        (good.replace("{{}}", "{}"), "written twice"),
        (good.replace("Q {question}", ""), "{question}"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=re.escape(said)):
            judge.read_prompt(path)
