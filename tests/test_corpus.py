"""Calibration texts: plain, JSON lines, conversations, the set that llmfast ships."""

import json
from dataclasses import replace
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


def _with_bos(bundle: ModelBundle, folder: Path) -> tuple[ModelBundle, int]:
    """Return the bundle with a tokenizer in `folder` that puts BOS before a text, and that token."""
    backend = tokenizers.Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    backend.save(str(folder / "tokenizer.json"))
    return ModelBundle(folder, bundle.manifest, bundle.model), bos


def test_every_window_begins_with_bos(fp32_bundle: Path, tmp_path: Path) -> None:
    bundle, bos = _with_bos(ModelBundle.open(fp32_bundle), tmp_path)
    (tmp_path / "text.txt").write_text("abcdefgh" * 20, encoding="utf-8")
    plain = Tokenizer.load(fp32_bundle).encode("abcdefgh" * 20)
    samples = np.array(Corpus(tmp_path / "text.txt").samples(bundle, 32))
    assert (samples[:, 0] == bos).all()
    assert samples[:, 1:].ravel().tolist() == plain[: len(plain) // 31 * 31]
    with pytest.raises(InputError, match="window of 1 tokens has no room for text"):
        Corpus(tmp_path / "text.txt").samples(bundle, 1)


def test_a_rendered_conversation_gets_no_second_bos(fp32_bundle: Path, tmp_path: Path) -> None:
    bundle, bos = _with_bos(ModelBundle.open(fp32_bundle), tmp_path)
    template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    turn = {"messages": [{"role": "user", "content": "hi there"}]}
    for records, count in (([turn, turn], 2), ([{"text": "hi there"}, turn], 2), ([turn, {"text": "hi there"}], 1)):
        path = _json_lines(tmp_path / "data.JSONL", *records)
        (ids,) = Corpus(path).samples(bundle, 17)
        assert ids[0] == bos
        assert ids.tolist().count(bos) == count
        assert {int(window[0]) for window in Corpus(path).samples(bundle, 5)} == {bos}


def test_an_encoders_line_is_cut_before_its_last_token(fp32_bundle: Path, tmp_path: Path) -> None:
    plain, _ = _with_bos(ModelBundle.open(fp32_bundle), tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    backend.save(str(tmp_path / "tokenizer.json"))
    encoder = ModelBundle(tmp_path, replace(plain.manifest, task="fill-mask"), plain.model)
    (tmp_path / "lines.txt").write_text("abcdefgh\nab\n", encoding="utf-8")
    long, short = Corpus(tmp_path / "lines.txt").samples(encoder, 6)
    assert long.tolist() == [ends[0][1], *backend.encode("abcde", add_special_tokens=False).ids, ends[1][1]]
    assert short.tolist() == backend.encode("ab").ids


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
