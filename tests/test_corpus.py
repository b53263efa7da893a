"""Calibration texts: plain, JSON lines, conversations, the set that llmfast ships."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from llmfast.bundle import ModelBundle
from llmfast.errors import InputError, OptionError, UnsupportedError
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.corpus import SHIPPED, SHIPPED_HELD_OUT, Corpus, pick
from llmfast.tokenizer import Tokenizer


def _json_lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


def test_windows_follow_one_another(fp32_bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 20, encoding="utf-8")
    ids = Tokenizer.load(fp32_bundle).encode("abcdefgh" * 20)
    samples = Corpus(text).samples(ModelBundle.open(fp32_bundle), 32)
    assert np.concatenate(samples).tolist() == ids[: len(ids) // 32 * 32]


def test_json_lines_give_the_text_of_their_field(fp32_bundle: Path, tmp_path: Path) -> None:
    path = _json_lines(tmp_path / "data.jsonl", {"text": "no", "body": "x" * 40}, {"body": "y" * 40})
    bundle = ModelBundle.open(fp32_bundle)
    ids = np.concatenate(Corpus(path, "body").samples(bundle, 8)).tolist()
    assert Tokenizer.load(fp32_bundle).decode(ids) == "x" * 40 + "\n\n" + "y" * 38  # 80 of 84 tokens fill windows
    with pytest.raises(InputError, match=r"no text in field `text`: `.*data.jsonl`: line 2"):
        Corpus(path).samples(bundle, 8)


def test_conversations_go_through_the_chat_template(fp32_bundle: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]
    path = _json_lines(tmp_path / "chat.jsonl", {"messages": turns})
    bundle = ModelBundle.open(fp32_bundle)
    with pytest.raises(UnsupportedError, match="no chat template"):
        Corpus(path).samples(bundle, 4)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((fp32_bundle / "tokenizer.json").read_bytes())
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    chatty = ModelBundle(folder, bundle.manifest, bundle.model)
    ids = np.concatenate(Corpus(path).samples(chatty, 4)).tolist()
    assert "user: hi;assistant: hello there;".startswith(Tokenizer.load(folder).decode(ids))
    assert len(ids) >= 28


def test_a_rendered_conversation_gets_no_second_bos(fp32_bundle: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(fp32_bundle / "tokenizer.json"))
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    backend.save(str(tmp_path / "tokenizer.json"))
    template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    plain = ModelBundle.open(fp32_bundle)
    bundle = ModelBundle(tmp_path, plain.manifest, plain.model)
    turn = {"messages": [{"role": "user", "content": "hi there"}]}
    for records, count in (([turn, turn], 2), ([{"text": "hi there"}, turn], 2), ([turn, {"text": "hi there"}], 1)):
        ids = np.concatenate(Corpus(_json_lines(tmp_path / "data.JSONL", *records)).samples(bundle, 1)).tolist()
        assert ids[0] == bos
        assert ids.count(bos) == count


@pytest.mark.parametrize("line", ["[1]", "not json", '{"text": 3}', '{"messages": []}', '{"messages": ["hi"]}', "{}"])
def test_malformed_json_lines_are_named(line: str, fp32_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 3"):
        Corpus(path).samples(ModelBundle.open(fp32_bundle), 4)


@pytest.mark.parametrize("path", [SHIPPED, SHIPPED_HELD_OUT])
def test_shipped_texts_are_there_and_apart(path: Path, fp32_bundle: Path) -> None:
    samples = Corpus(path).samples(ModelBundle.open(fp32_bundle), 256)
    assert len(samples) >= 16
    assert "shipped" in Corpus(path).describe()["name"]
    assert not set(SHIPPED.read_text().splitlines()) & set(SHIPPED_HELD_OUT.read_text().splitlines())


def test_more_context_than_the_text_holds_is_said(fp32_bundle: Path) -> None:
    bundle = ModelBundle.open(fp32_bundle)
    wide = ModelBundle(bundle.path, bundle.manifest.__class__("text-generation"), bundle.model)
    with pytest.raises(
        InputError, match=r"text too short: `.*calibration.txt` has \d+ tokens, one window needs 1000000"
    ):
        Calibration(seq_len=1_000_000).split(wide)


def test_a_seed_picks_other_samples_and_leaves_the_rest() -> None:
    samples = [np.array([index]) for index in range(20)]
    first, rest = pick(samples, 5, None)
    assert [int(one[0]) for one in first] == [0, 1, 2, 3, 4]
    assert len(rest) == 15
    seeded, others = pick(samples, 5, 1)
    numbers = [int(one[0]) for one in seeded]
    assert numbers == sorted(numbers) != [0, 1, 2, 3, 4]
    assert sorted(numbers + [int(one[0]) for one in others]) == list(range(20))
    assert numbers == [int(one[0]) for one in pick(samples, 5, 1)[0]]


@pytest.mark.parametrize("settings", [{"num_samples": 0}, {"seq_len": 0}, {"seed": -1}])
def test_impossible_counts_are_refused(settings: dict) -> None:
    with pytest.raises(OptionError, match="must be at least"):
        Calibration(**settings)
