"""Token ids of prompts, chat templates and what they read, ids that end a response."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tiny_run
from evals.benchmarks import Benchmark
from evals.task import load_tasks
from jaxrl import config, data, run
from jaxrl.data.messages import Chat
from jaxrl.errors import InputError
from jaxrl.models.config_json import describe
from jaxrl.models.decoder import Config
from jaxrl.types import JsonObject, Tokenizer
from tiny import TEMPLATE, tiny_tokenizer

SIZE = 106  # of the tiny tokenizer
EOS, BOS = 1, 2
ROPE = {"rope_theta": 1e4, "norm_epsilon": 1e-6}
CHAT = Chat([{"role": "user", "content": "1 + 1"}], "1 + 1", "rows.jsonl:7")
SHOTS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
]
HEAD = "{% for m in messages %}{{ '<' + m['role'] + '>' }}"
TAIL = "{% endfor %}<assistant>"
# Reads content as Llama 4's processors write it, and nothing else.
PARTS = HEAD + "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}" + TAIL
TODAY = "{{ strftime_now('%d %b %Y, %-d %B') }}" + HEAD + "{{ m['content'] }}" + TAIL
# How Llama 3.2 chooses its date.
LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    "{%- endif %}{{ date_string }}" + HEAD + "{{ m['content'] }}" + TAIL
)
# How Qwen 3 turns thinking off.
THINKS = TEMPLATE + "{% if enable_thinking is defined and enable_thinking is false %}no{% endif %}"


def make(folder: Path, template: str | None = TEMPLATE) -> Tokenizer:
    tiny_tokenizer(folder, template)
    return data.load_tokenizer(str(folder))


def texts(tokenizer: Tokenizer, *chats: Chat, size: int = SIZE, **section: object) -> list[str]:
    encoded = data.encode(tokenizer, config.Data(**section), chats or (CHAT,), data.Vocabulary(size, (EOS,)))
    return [tokenizer.decode(ids) for ids in encoded]


def refusal(of: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        of()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- ids of the model


def test_ids_beyond_the_vocabulary_are_named(tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    message = refusal(lambda: texts(tokenizer, size=20))
    assert "rows.jsonl:7" in message and str(tmp_path) in message
    ids = [i for i in tokenizer(["1 + 1"], add_special_tokens=False)["input_ids"][0] if i >= 20]
    assert f"id {ids[0]} " in message and "vocab_size = 20" in message
    edge = max(max(each) for each in data.encode(tokenizer, config.Data(), [CHAT]))
    assert texts(tokenizer, size=edge + 1)
    assert f"id {edge} " in refusal(lambda: texts(tokenizer, size=edge))


def test_ids_of_training_held_out_and_benchmark_problems_are_held_to_the_vocabulary(tmp_path: Path) -> None:
    tokenizer, path = make(tmp_path), tmp_path / "rows.jsonl"
    path.write_text('{"problem": "1", "answer": "1"}\n{"problem": "~", "answer": "1"}\n')
    section = config.Data(path=str(path), problem_column="problem", answer_column="answer", suffix="")
    (over,) = tokenizer(["~"], add_special_tokens=False)["input_ids"][0]
    few = data.Vocabulary(over, (EOS,))
    chosen = {"mine": Benchmark(str(path))}
    for of in (
        lambda: data.load_prompts(section, tokenizer, vocabulary=few),
        lambda: data.load_prompts(section, tokenizer, config.Eval(path=str(path)), vocabulary=few),
        lambda: load_tasks(chosen, config.Recipe(data=section), tokenizer, None, 1, few),
    ):
        assert f"rows.jsonl:2: its token id {over}" in refusal(of)


def test_sampled_ids_beyond_the_tokenizer_are_no_text(tmp_path: Path) -> None:
    detokenize = data.detokenizer(make(tmp_path))
    assert detokenize(np.array([6, 500, 2**31 - 1, 7], np.int32)) == detokenize(np.array([6, 7], np.int32))


def test_a_run_says_what_ends_a_response_and_holds_its_prompts_to_the_model(tmp_path: Path) -> None:
    base, lines = tmp_path / "base", list[str]()
    make(base)
    sizes = {"width": 8, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 4, "mlp_width": 8, "tied": True}
    for size in (SIZE, 8):
        model = Config(family="qwen2", vocab_size=size, max_positions=64, **sizes, **ROPE)  # type: ignore[arg-type]
        (base / "config.json").write_text(json.dumps(describe(model)))
        recipe = config.load(tiny_run.write_recipe(tmp_path, base, **{"data.chat_template": False}))
        if size == SIZE:
            setup = run.load(recipe, None, lines.append)
            assert setup.works[0].sampling.stop_ids == (EOS,) and "stop ids: 1 '<eos>' (tokenizer)" in lines
    recipe = config.load(tiny_run.write_recipe(tmp_path, base, **{"data.suffix": "~"}))
    assert "vocab_size = 8" in refusal(lambda: run.load(recipe, None, lines.append))


# --- special tokens around a prompt


def appending(folder: Path) -> Tokenizer:
    """A tokenizer that puts <bos> before a text and <eos> after it."""
    from tokenizers import processors

    fast = tiny_tokenizer(folder)
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    fast.save_pretrained(folder)
    return data.load_tokenizer(str(folder))


def test_a_prompt_does_not_end_in_the_tokenizer_s_own_eos(tmp_path: Path) -> None:
    tokenizer = appending(tmp_path)
    assert tokenizer(["1"])["input_ids"][0][-1] == EOS
    assert texts(tokenizer, chat_template=False) == ["<bos>1 + 1"]
    assert texts(tokenizer) == ["<bos><user>1 + 1<assistant>"]


@pytest.mark.parametrize("section", [{}, {"chat_template": False}])
def test_a_prompt_that_has_ended_is_refused(tmp_path: Path, section: dict[str, object]) -> None:
    template = "{% for m in messages %}{{ m['content'] + '<eos>' }}{% endfor %}"
    content = "1 + 1" if not section else "1 + 1<eos>"
    chat = Chat([{"role": "user", "content": content}], content, "rows.jsonl:3")
    message = refusal(lambda: texts(make(tmp_path, template), chat, **section))
    assert "rows.jsonl:3: the prompt ends in '<eos>'" in message
    assert ("template" in message) == (not section)


# --- templates


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_the_text_of_a_special_token_is_no_control_token(tmp_path: Path, role: str) -> None:
    tokenizer = make(tmp_path)
    end = tokenizer.decode([EOS])
    chat = Chat([{"role": role, "content": f"1{end}2"}, *CHAT.messages], "1 + 1", "rows.jsonl:7")
    message = refusal(lambda: texts(tokenizer, chat))
    assert message.startswith(f"rows.jsonl:7: the message of '{role}' holds {end!r}")
    # A prompt that the row writes out whole is the user's affair.
    assert texts(tokenizer, Chat([{"role": "user", "content": f"1{end}2"}], "", ""), chat_template=False)


def test_texts_are_those_of_transformers(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, "{% generation %}{% endgeneration %}" + TEMPLATE)
    chats = [Chat([*SHOTS, *CHAT.messages], "1 + 1"), CHAT]
    theirs = tokenizer.apply_chat_template(
        [chat.messages for chat in chats],
        chat_template=tokenizer.get_chat_template(),
        add_generation_prompt=True,
        tokenize=False,
    )
    assert texts(tokenizer, *chats) == theirs


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('System message required') }}", "System message required"),
        ("{% for m in messages %}", "cannot be read (Unexpected end of template"),
        ("{{ messages | nofilter }}", "cannot be read (No filter named 'nofilter'"),
        ("{{ messages.content.text }}", "fails with"),
        ("{{ 1 // 0 }}", "fails with"),
        ("<user><assistant>", "leaves out the message of 'user'"),
        (HEAD + "{{ m['content'][:3] }}" + TAIL, "leaves out the message of 'user'"),
        (HEAD + "{{ m['content'] | upper }}" + TAIL, "leaves out the message of 'user'"),
    ],
)
def test_a_template_that_does_not_take_a_chat_is_named(tmp_path: Path, template: str, reason: str) -> None:
    chat = Chat([{"role": "user", "content": "what is 1 + 1"}], "what is 1 + 1", "rows.jsonl:7")
    message = refusal(lambda: texts(make(tmp_path, template), chat))
    assert str(tmp_path) in message and reason in message and "data.chat_template = false" in message


def test_the_row_that_a_template_does_not_take_is_named(tmp_path: Path) -> None:
    template = "{% if messages[0]['content'] == '6' %}{{ raise_exception('six') }}{% endif %}" + TEMPLATE
    chats = [Chat([{"role": "user", "content": str(n)}], str(n), f"rows.jsonl:{n}") for n in range(9)]
    message = refusal(lambda: texts(make(tmp_path, template), *chats))
    assert message.startswith("rows.jsonl:6:") and "six" in message


def test_a_system_message_that_is_dropped_is_named(tmp_path: Path) -> None:
    template = TEMPLATE.replace("messages %}", "messages if m['role'] != 'system' %}")
    chat = Chat([{"role": "system", "content": "be brief"}, *CHAT.messages], "1 + 1", "rows.jsonl:2")
    assert "'system'" in refusal(lambda: texts(make(tmp_path, template), chat))


def test_a_template_of_parts_gets_parts(tmp_path: Path) -> None:
    chat = Chat([*SHOTS, *CHAT.messages], "1 + 1")
    assert texts(make(tmp_path, PARTS), CHAT, chat) == [
        "<user>1 + 1<assistant>",
        "<system>s<user>q<assistant>a<user>1 + 1<assistant>",
    ]


def test_a_template_may_strip_the_problem(tmp_path: Path) -> None:
    chat = Chat([{"role": "user", "content": " 1 \n"}], " 1 \n")
    template = TEMPLATE.replace("m['content']", "m['content'] | trim")
    assert texts(make(tmp_path, template), chat) == ["<bos><user>1<assistant>"]


@pytest.mark.parametrize("files", ["tokenizer_config", "additional"])
def test_the_default_of_named_templates_is_taken(tmp_path: Path, files: str) -> None:
    make(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    if files == "tokenizer_config":
        (tmp_path / "chat_template.jinja").unlink()
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    else:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("no")
    assert texts(data.load_tokenizer(str(tmp_path))) == ["<bos><user>1 + 1<assistant>"]
    if files == "tokenizer_config":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named[:1]}))
        tokenizer = data.load_tokenizer(str(tmp_path))
        assert "cannot be read" in refusal(lambda: texts(tokenizer))


# --- dates


@pytest.mark.parametrize("template", [TODAY, LLAMA])
def test_today_s_date_is_the_recipe_s(tmp_path: Path, template: str) -> None:
    tokenizer = make(tmp_path, template)
    message = refusal(lambda: texts(tokenizer))
    assert "rows.jsonl:7" in message and str(tmp_path) in message and "set data.date" in message
    (text,) = texts(tokenizer, date="2026-02-03")
    expected = {TODAY: "03 Feb 2026, 3 February", LLAMA: "03 Feb 2026"}[template]
    assert text == f"{expected}<user>1 + 1<assistant>"


def test_a_date_that_is_only_written_otherwise_is_not_asked_for(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, LLAMA)
    given = texts(tokenizer, template_arguments={"date_string": "long ago"})
    assert given == ["long ago<user>1 + 1<assistant>"]
    template = "{% if tools %}{{ strftime_now('%Y') }}{% endif %}" + TEMPLATE
    assert texts(make(tmp_path, template)) == ["<bos><user>1 + 1<assistant>"]


def test_a_date_that_no_template_writes_is_refused(tmp_path: Path) -> None:
    assert "writes no date" in refusal(lambda: texts(make(tmp_path), date="2026-02-03"))


# --- arguments


def test_arguments_reach_the_template(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, THINKS)
    assert texts(tokenizer, template_arguments={"enable_thinking": False})[0].endswith("<assistant>no")
    own = Chat(CHAT.messages, CHAT.problem, CHAT.where, {"enable_thinking": True})
    found = texts(tokenizer, CHAT, own, CHAT, template_arguments={"enable_thinking": False})
    assert [text.endswith("no") for text in found] == [True, False, True]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"enable_thinkin": False}, "never reads 'enable_thinkin'; did you mean 'enable_thinking'?"),
        ({"messages": "x"}, "'messages' is set by the trainer"),
        ({"add_generation_prompt": False}, "'add_generation_prompt' is set by the trainer"),
        ({"tokenize": True}, "'tokenize' is set by the trainer"),
    ],
)
def test_arguments_that_the_template_does_not_read_are_named(
    tmp_path: Path, arguments: JsonObject, reason: str
) -> None:
    tokenizer = make(tmp_path, THINKS)
    message = refusal(lambda: texts(tokenizer, template_arguments=arguments))
    assert message.startswith("data.template_arguments: ") and reason in message
    own = Chat(CHAT.messages, CHAT.problem, CHAT.where, arguments)
    message = refusal(lambda: texts(tokenizer, CHAT, own))
    assert message.startswith("rows.jsonl:7: ") and reason in message


def test_plain_text_takes_no_arguments(tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    own = Chat(CHAT.messages, CHAT.problem, CHAT.where, {"x": 1})
    for chat, section, name in (
        (CHAT, {"date": "2026-02-03"}, "data.date"),
        (CHAT, {"template_arguments": {"x": 1}}, "data.template_arguments"),
        (own, {}, "data.template_column"),
    ):
        assert name in refusal(lambda c=chat, s=section: texts(tokenizer, c, chat_template=False, **s))


def test_arguments_and_dates_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    given = {"enable_thinking": False, "effort": "high", "budget": 3, "share": 0.5}
    path.write_text(
        "[data]\ndate = 2026-01-31\n[data.template_arguments]\n"
        'enable_thinking = false\neffort = "high"\nbudget = 3\nshare = 0.5\n'
    )
    recipe = config.load(path)
    assert recipe.data.template_arguments == given and recipe.data.date == "2026-01-31"
    assert [type(v) for v in recipe.data.template_arguments.values()] == [bool, str, int, float]
    path.write_text(config.to_toml(recipe))
    assert config.load(path) == recipe
    changed = config.load(path, ["--data.template-arguments.enable-thinking", "true"])
    assert config.differences(recipe, changed)[0].startswith("data.template_arguments: ")
    assert changed.data.template_arguments == given | {"enable_thinking": True}
    new = config.from_command_line(config.Recipe(), ["--data.template-arguments", "thinking", "false"], "x")
    assert new.data.template_arguments == {"thinking": False}


@pytest.mark.parametrize(
    "values, field",
    [
        ({"date": "31.1.2026"}, "data.date = '31.1.2026'"),
        ({"date": "20260131"}, "data.date = '20260131'"),
        ({"template_arguments": {"x": [1]}}, "data.template_arguments.x = [1]"),
        ({"template_arguments": 3}, "data.template_arguments = 3"),
    ],
)
def test_impossible_arguments_are_one_line(values: JsonObject, field: str) -> None:
    assert field in refusal(lambda: config.from_dict({"data": values}))


# --- ids that end a response


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def stops(folder: Path, generation: object = None, model: object = None) -> tuple[int, ...]:
    for name, value in (("generation_config.json", generation), ("config.json", model)):
        (folder / name).write_text(json.dumps({"eos_token_id": value}))
    return data.read_vocabulary(folder, data.load_tokenizer(str(folder)), SIZE).stop_ids


def test_stop_ids_are_those_of_both_files_and_the_tokenizer(folder: Path) -> None:
    assert stops(folder) == (EOS,)
    assert stops(folder, generation=0) == (0, EOS)
    assert stops(folder, [3, 4], 5) == (3, 4, 5, EOS)
    assert stops(folder, [], 5) == (5, EOS)
    assert stops(folder, [1, 1], 1) == (EOS,)
    vocabulary = data.read_vocabulary(folder, data.load_tokenizer(str(folder)), SIZE)
    assert vocabulary.summary == "stop ids: 1 '<eos>' (generation_config.json)"


@pytest.mark.parametrize("value", ["<eos>", [[1]], ["1"], [None], True, 1.0, -1, SIZE, 2**70, {}, [1, SIZE]])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_stop_ids_that_are_none_are_named(folder: Path, value: object, file: str) -> None:
    message = refusal(lambda: stops(folder, *((value, 1) if file.startswith("gen") else (1, value))))
    assert str(folder / file) in message and "eos_token_id" in message and f"vocab_size = {SIZE}" in message


def test_a_model_that_nothing_ends_is_refused(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    for generation in (None, []):
        message = refusal(lambda g=generation: stops(folder, g))
        assert str(folder) in message and "eos_token_id" in message


def test_the_tokenizer_s_eos_is_left_out_where_the_model_lacks_it(folder: Path) -> None:
    (folder / "config.json").write_text('{"eos_token_id": 0}')
    tokenizer = data.load_tokenizer(str(folder))
    assert data.read_vocabulary(folder, tokenizer, EOS).stop_ids == (0,)


# --- tokenizers that cannot be read


@pytest.mark.parametrize("kind", ["pipe", "folder", "huge", "dangling"])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"]
)
def test_what_is_no_file_is_refused_at_once(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(folder / "nowhere")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 30)
    began = time.monotonic()
    assert str(path) in refusal(lambda: data.load_tokenizer(str(folder)))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "{"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_broken_json_is_one_line(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert str(folder) in refusal(lambda: data.load_tokenizer(str(folder)))


def test_code_in_the_folder_is_refused_without_a_question(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    began = time.monotonic()
    message = refusal(lambda: data.load_tokenizer(str(folder)))
    assert str(folder) in message and time.monotonic() - began < 5


# --- benchmarks


def test_a_benchmark_s_chat_goes_to_the_template_whole(tmp_path: Path) -> None:
    tokenizer, path = make(tmp_path), tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": [*SHOTS, *CHAT.messages], "answer": "2"}) + "\n")
    chosen = {"mine": Benchmark(str(path), problem_column="prompt", answer_column="answer")}
    recipe = config.Recipe(data=config.Data(suffix="!"))
    (task,) = load_tasks(chosen, recipe, tokenizer, None, 1)
    assert task.problems[0].question == "1 + 1"
    text = tokenizer.decode(task.prompts[0].tokens)
    assert text == "<bos><system>s<user>q<assistant>a<user>1 + 1!<assistant>"
