"""Files of prompts: what a line may say, the order of the answers, and what goes wrong on the way."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import InputError
from llmfast.export.stage import ExportOptions, export
from llmfast.infer import many_texts, memory
from llmfast.infer.jsonl import Line, read_lines
from llmfast.infer.stage import answer
from tests.tiny_decoder import CONTEXT, write_bundle
from tests.tiny_encoder import save_encoder
from tests.tiny_prompts import greedy, infer_file, read_answers, write_lines


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("tiny"))


def test_answers_have_the_order_and_ids_of_the_prompts(tiny: Path, tmp_path: Path) -> None:
    prompts = [{"id": f"q{i}", "prompt": "ab c" * (i % 5 + 1), "max_new_tokens": 1 + 7 * i % 29} for i in range(20)]
    source = write_lines(tmp_path / "prompts.jsonl", *prompts[:9], "", *prompts[9:])
    result = infer_file(tiny, source, tmp_path / "answers.jsonl", "--batch-size", 4, "--format", "json")
    assert result.exit_code == 0, result.output
    answers = read_answers(tmp_path / "answers.jsonl")
    assert [one["id"] for one in answers] == [one["id"] for one in prompts]
    for prompt, one in zip(prompts, answers, strict=True):
        expected = greedy(tiny, prompt["prompt"], prompt["max_new_tokens"])
        assert one["answer"] == expected.text
        assert (one["prompt_tokens"], one["generated_tokens"]) == (
            expected.prompt_tokens,
            expected.generated_tokens,
        )
        assert one["finish_reason"] == expected.finish_reason
    document = json.loads(result.stdout)
    assert (document["lines"], document["answered"], document["failed"]) == (20, 20, 0)
    assert document["generated_tokens"] == sum(one["generated_tokens"] for one in answers)
    assert document["prompt_tokens"] == sum(one["prompt_tokens"] for one in answers)
    assert document["memory"]["rows"] == 4
    assert document["exact"] is True
    assert "20 prompts; 4 rows of 49 positions: KV cache" in result.stderr


def test_lines_have_options_of_their_own(tiny: Path, tmp_path: Path) -> None:
    whole = greedy(tiny, "ab c", 30).text
    lines = [
        {"prompt": "ab c", "stop": whole[5:8]},
        {"prompt": "ab", "temperature": 0.7, "seed": 5, "max_new_tokens": 12},
        {"prompt": "ab c"},
    ]
    source = write_lines(tmp_path / "prompts.jsonl", *lines)
    assert infer_file(tiny, source, tmp_path / "a.jsonl", "--max-tokens", 30).exit_code == 0
    stopped, sampled, plain = read_answers(tmp_path / "a.jsonl")
    assert (stopped["answer"], stopped["finish_reason"]) == (whole[: whole.index(whole[5:8])], "stop")
    assert sampled["answer"] == greedy(tiny, "ab", 12, temperature=0.7, seed=5).text
    assert (plain["answer"], plain["id"]) == (whole, 3)


def test_equal_prompts_are_sampled_each_with_random_numbers_of_their_own(tiny: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "ab"}] * 3 + [{"prompt": "ab", "seed": 7}, "", {"prompt": "ab"}]
    source = write_lines(tmp_path / "prompts.jsonl", *lines)
    options = "--temperature", 2.0, "--seed", 7, "--max-tokens", 12
    assert infer_file(tiny, source, tmp_path / "a.jsonl", *options, "--batch-size", 2).exit_code == 0
    seeds = [7, 7 + 2**64, 7 + 2 * 2**64, 7, 7 + 5 * 2**64]
    expected = [greedy(tiny, "ab", 12, temperature=2.0, seed=seed).text for seed in seeds]
    assert [one["answer"] for one in read_answers(tmp_path / "a.jsonl")] == expected
    assert len(set(expected)) == 4
    several = answer(tiny, ["ab"] * 3, threads=1, max_tokens=12, temperature=2.0, seed=7)
    assert [one["answer"] for one in several] == expected[:3]


def test_messages_go_through_the_chat_template(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "chat"
    model.mkdir()
    write_bundle(model)
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
    (model / "chat_template.jinja").write_text(template)
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    lines = [{"messages": conversation}, {"messages": [{"role": "system", "content": "s"}, *conversation]}]
    source = write_lines(tmp_path / "prompts.jsonl", *lines, {"prompt": "hi"})
    assert infer_file(model, source, tmp_path / "a.jsonl", "--max-tokens", 5, "--system", "be").exit_code == 0
    prompts = ["s:be;u:hi;a:yo;a:", "s:s;u:hi;a:yo;a:", "s:be;u:hi;a:"]
    assert [one["answer"] for one in read_answers(tmp_path / "a.jsonl")] == [
        greedy(tiny, text, 5).text for text in prompts
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("[1]", "not a JSON object"),
        ('{"prompt": NaN}', "not JSON: NaN"),
        ("{}", "needs `prompt` or `messages`"),
        ({"prompt": "a", "messages": []}, "not both"),
        ({"prompt": 5}, "`prompt` is not a text"),
        ({"prompt": ""}, "it has no token"),
        ({"prompt": "a" * 100}, f"100 tokens, the context holds {CONTEXT} with the answer; 5 too many"),
        ({"messages": [{"role": "user"}]}, "`messages` is not a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no chat template"),
        ({"prompt": "a", "max_new_tokens": 0}, "must be at least 1"),
        ({"prompt": "a", "max_new_tokens": "5"}, "`max_new_tokens` is not a whole number"),
        ({"prompt": "a", "temperature": True}, "`temperature` is not a number"),
        ({"prompt": "a", "temperature": 10**400}, "`temperature` is not a finite number"),
        ({"prompt": "a", "repetition_penalty": 10**400}, "`repetition_penalty` is not a finite number"),
        ({"prompt": "a", "top_p": 7}, "--top-p 7"),
        ({"prompt": "a", "stop": [""]}, "the empty string"),
        ({"prompt": "a", "stop": 1}, "`stop` is neither"),
        ('{"prompt": "a", "id": "\\ud800"}', "`id` is neither"),
        ('{"prompt": "\\ud800"}', "not UTF-8 text"),
        ({"prompt": "a", "id": {}}, "`id` is neither"),
        ('{"prompt": "a", "id": 1e999}', "`id` is neither"),
    ],
)
def test_a_bad_line_is_named_and_the_others_go_on(line: Any, reason: str, tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "prompts.jsonl", {"prompt": "ab"}, "", line, {"prompt": "c"})
    result = infer_file(tiny, source, tmp_path / "a.jsonl", "--max-tokens", 2)
    assert result.exit_code == 3
    assert [one["id"] for one in read_answers(tmp_path / "a.jsonl")] == [1, 4]
    (told,) = [text for text in result.stderr.splitlines() if text.startswith("no answer: ")]
    assert "prompts.jsonl`: line 3: " in told
    assert reason in told
    assert "error: no answer to 1 of the 3 lines" in result.stderr
    assert "2 of 3 lines answered" in result.stdout
    # Mended where it is, the same command answers it alone.
    write_lines(source, {"prompt": "ab"}, "", {"prompt": "b"}, {"prompt": "c"})
    result = infer_file(tiny, source, tmp_path / "a.jsonl", "--max-tokens", 2, "--format", "json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert (document["answered"], document["answered_before"]) == (1, 2)
    assert [one["id"] for one in read_answers(tmp_path / "a.jsonl")] == [1, 3, 4]


def test_bytes_that_are_no_text_are_a_bad_line(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\xff\n')
    result = infer_file(tiny, source, tmp_path / "a.jsonl", "--max-tokens", 2)
    assert result.exit_code == 3
    assert "line 2: not UTF-8 text: byte 0" in result.stderr
    assert len(read_answers(tmp_path / "a.jsonl")) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{tmp}/none.jsonl", "-o", "{tmp}/a.jsonl"], 3, ["cannot read", "none.jsonl"]),
        (["{tmp}", "-o", "{tmp}/a.jsonl"], 3, ["not a regular file"]),
        (["{blank}", "-o", "{tmp}/a.jsonl"], 3, ["no text in"]),
        (["{good}"], 2, ["--output FILE.jsonl"]),
        (["{good}", "-o", "{tmp}/a.npy"], 2, ["--output FILE.jsonl"]),
        (["{good}", "-o", "{tmp}/none/a.jsonl"], 6, ["cannot write"]),
        (["{good}", "-o", "{tmp}/dir.jsonl"], 8, ["is a directory"]),
        (["{good}", "-o", "{tmp}/a.jsonl", "--batch-size", "0"], 2, ["--batch-size 0"]),
        (["{good}", "-o", "{tmp}/a.jsonl", "--max-tokens", "0"], 2, ["--max-tokens 0"]),
        (["{good}", "-o", "{tmp}/a.jsonl", "--temperature", "-1"], 2, ["--temperature -1"]),
        (["{good}", "-o", "{tmp}/a.jsonl", "--system", "be brief"], 2, ["--system needs", "the model has none"]),
        (["{good}", "-o", "{tmp}/a.jsonl", "--system", "be brief", "--raw"], 2, ["--system needs", "--raw leaves"]),
        (["{good}", "-o", "{tmp}/a.jsonl", "--question", "x"], 2, ["--question is for"]),
        (["{good}", "-o", "{tmp}/a.jsonl", "--prompt", "x"], 2, ["exclude each other"]),
    ],
)
def test_mistakes_are_explained(arguments: list[str], code: int, words: list[str], tiny: Path, tmp_path: Path) -> None:
    good = write_lines(tmp_path / "good.jsonl", *[{"prompt": "ab", "max_new_tokens": 2}] * 3)
    (tmp_path / "dir.jsonl").mkdir()
    blank = write_lines(tmp_path / "blank.jsonl", "", " ")
    filled = [argument.format(tmp=tmp_path, good=good, blank=blank) for argument in arguments]
    result = CliRunner().invoke(app, ["infer", str(tiny), "--input", *filled])
    assert result.exit_code == code, result.output
    assert all(word in result.stderr for word in words), result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "a.jsonl").exists()


def test_a_cache_that_does_not_fit_is_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "p.jsonl", *[{"prompt": "ab"}] * 5)
    monkeypatch.setattr(memory, "available_memory", lambda: 30_000)  # one row of 96 positions takes 12,288
    result = infer_file(tiny, source, tmp_path / "a.jsonl", "--max-tokens", 99, "--batch-size", 5)
    assert result.exit_code == 6
    assert "not enough memory: 5 rows of 96 positions" in result.stderr
    assert "hint: --batch-size 2" in result.stderr
    assert os.listdir(tmp_path) == ["p.jsonl"]
    result = infer_file(tiny, source, tmp_path / "a.jsonl", "--max-tokens", 99, "--format", "json")
    assert json.loads(result.stdout)["memory"]["rows"] == 1


def test_batch_size_is_for_files(tiny: Path) -> None:
    result = CliRunner().invoke(app, ["infer", str(tiny), "--prompt", "x", "--batch-size", "2"])
    assert result.exit_code == 2
    assert "--batch-size is for a file of prompts" in result.stderr


def test_plain_text_has_a_prompt_a_line(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "prompts.txt"
    source.write_text("ab c\n\nb\n")
    assert infer_file(tiny, source, tmp_path / "a.jsonl", "--max-tokens", 6).exit_code == 0
    answers = read_answers(tmp_path / "a.jsonl")
    assert [one["id"] for one in answers] == [1, 3]
    assert answers[0]["answer"] == greedy(tiny, "ab c", 6).text


def test_fields_that_say_nothing_are_told(tiny: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "p.jsonl", {"prompt": "a", "max_token": 3, "category": "x"})
    result = infer_file(tiny, source, tmp_path / "a.jsonl", "--max-tokens", 2)
    assert "note: fields that say nothing to this model: category, max_token" in result.stderr


def test_reading_holds_one_line_at_a_time(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "p.jsonl", *({"prompt": str(i)} for i in range(1000)))
    lines = read_lines(source, "prompt", "settings")
    assert next(lines).fields == {"prompt": "0"}
    keys = {line.key for line in read_lines(source, "prompt", "settings")}
    assert len(keys) == 1000
    assert not keys & {line.key for line in read_lines(source, "prompt", "others")}


def test_texts_of_other_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmfast.tokenizer.MAX_INPUT_CHARS", 40)
    save_encoder(tmp_path / "checkpoint", auto_model="AutoModelForSequenceClassification", num_labels=3)
    model = tmp_path / "bundle"
    export(str(tmp_path / "checkpoint"), model, ExportOptions(task="text-classification"))
    texts = ["the cat sat", "two dogs run by the mat on a mat", "a mat", "dogs"] * 4
    lines = [{"id": f"t{i}", "prompt": text} for i, text in enumerate(texts)]
    source = write_lines(
        tmp_path / "t.jsonl", *lines[:3], {"prompt": 5}, *lines[3:], {"text": "a"}, {"prompt": "a" * 41}
    )
    result = infer_file(model, source, tmp_path / "labels.jsonl")
    assert result.exit_code == 3
    assert "line 4: `prompt` is not a text" in result.stderr
    assert "line 18: `prompt` is missing" in result.stderr
    assert "line 19: a text of 41 characters is too much" in result.stderr
    found = read_answers(tmp_path / "labels.jsonl")
    assert [one["id"] for one in found] == [line["id"] for line in lines]
    for one, expected in zip(found, answer(model, texts, threads=1), strict=True):
        assert one["label"] == expected["label"]
        assert one["scores"] == pytest.approx(expected["scores"], abs=1e-6)
        assert set(one) == {"id", "label", "score", "scores", "key"}


class Task:
    """A task whose answers tell how they were asked for."""

    INFER_OPTIONS = ("question",)
    TEXT_OPTION = "context"

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], str]] = []

    def needed_options(self, bundle: Any) -> tuple[str, ...]:
        return ("question",)

    def answer(self, bundle: Any, texts: list[str], provider: str, threads: Any, question: str) -> list[dict[str, Any]]:
        self.calls.append((texts, question))
        if "bad" in texts:
            raise InputError("a bad text")
        # In an order of its own, as a ranking.
        order = sorted(range(len(texts)), key=lambda index: texts[index])
        return [{"text": texts[i], "index": i, "answer": f"{question}: {texts[i]}"} for i in order]


def test_a_line_says_what_does_not_hold_for_all(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_texts.registry, "load", lambda *names: Task())
    bundle, line = ModelBundle.open(tiny), Line(1, 1, {"context": "a"})
    many_texts.Texts(bundle, "cpu", None, question="what").check(line)
    with pytest.raises(InputError, match="`question` is missing, and so is --question"):
        many_texts.Texts(bundle, "cpu", None).check(line)


def test_lines_with_the_same_options_go_together_and_a_bad_one_fails_alone(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task()
    monkeypatch.setattr(many_texts.registry, "load", lambda *names: task)
    monkeypatch.setattr(many_texts, "_WINDOW", 6)
    texts = ["c", "b", "bad", "a", "e", "d", "g", "f"]
    fields = [{"context": text} | ({"question": "who"} if i in (1, 3) else {}) for i, text in enumerate(texts)]
    lines = [Line(number, number, one) for number, one in enumerate(fields, start=1)]
    work = many_texts.Texts(ModelBundle.open(tiny), "cpu", None, question="what")
    answers: dict[int, Any] = {}
    failed: dict[int, str] = {}
    work.run(
        iter(lines),
        len(lines),
        lambda line, found: answers.update({line.number: found}),
        lambda line, error: failed.update({line.number: error.message}),
    )
    assert failed == {3: "a bad text"}
    expected = {number: f"{'who' if number in (2, 4) else 'what'}: {texts[number - 1]}" for number in range(1, 9)}
    assert {number: found["answer"] for number, found in answers.items()} == {
        number: text for number, text in expected.items() if number != 3
    }
    assert task.calls[0] == (["c", "bad", "e", "d"], "what")
    assert (["b", "a"], "who") in task.calls
    assert task.calls[-1] == (["g", "f"], "what")
