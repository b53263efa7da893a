"""Translation, summarization and text to text: languages, prefixes, tokenizers, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from typer.testing import CliRunner

from llmfast.bench.metrics import decode, divergence, prefill, translation
from llmfast.bench.options import BenchOptions
from llmfast.bench.subject import Subject, Trial
from llmfast.bundle import ModelBundle
from llmfast.cli import app
from llmfast.errors import InputError, OptionError
from llmfast.export import seq2seq_parity
from llmfast.export.sentencepiece_tokenizer import write_m2m_tokenizer, write_marian_tokenizers
from llmfast.export.seq2seq_settings import read_languages
from llmfast.infer.many import answer_file
from llmfast.infer.stage import answer
from llmfast.tasks._languages import Languages, resolve, resolve_pair
from llmfast.tokenizer import Tokenizer
from tests.tiny_seq2seq import export_seq2seq

TEXTS = ["the cat sat", "  the  dog   runs ", "hello, Ünïcode ①!", "zebra quilt", "über uns", "a\tb"]
CORPUS = [
    "the cat sat on the mat",
    "a dog runs over the green hill",
    "hello world, how are you today?",
    "die katze sitzt auf der matte",
    "ein hund rennt über den hügel",
    "Ünïcode tests, and punctuation: yes!",
]
T5_TASKS = {
    "summarization": {"prefix": "summarize: ", "num_beams": 2, "min_length": 4, "max_length": 12},
    "translation_en_to_de": {"prefix": "translate English to German: ", "num_beams": 3, "max_length": 9},
    "translation_en_to_fr": {"prefix": "translate English to French: ", "max_length": 9},
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives a bundle: `m2m_100`, or t5 for one of its tasks."""
    made: dict[str, Path] = {}

    def get(task: str) -> Path:
        if task not in made:
            folder = tmp_path_factory.mktemp(task)
            name = "m2m_100" if task == "m2m_100" else "t5"
            settings = {} if name == "m2m_100" else {"task_specific_params": T5_TASKS}
            made[task] = export_seq2seq(folder, name, None if task == "m2m_100" else task, **settings).path
        return made[task]

    return get


def generate(bundle: Path, ids: list[int], **settings: Any) -> list[int]:
    """Return what transformers generates for one source."""
    model = seq2seq_parity.load_reference(bundle.parent / "checkpoint")
    with torch.no_grad():
        return model.generate(torch.tensor([ids]), do_sample=False, **settings)[0, 1:].tolist()


def test_languages_are_told_by_tokens(bundles: Callable[[str], Path]) -> None:
    bundle = bundles("m2m_100")
    manifest = ModelBundle.open(bundle).manifest
    assert manifest.task == "translation"
    assert manifest.architecture["languages"] == {
        "tokens": {"de": "__de__", "en": "__en__", "fr": "__fr__"},
        "source": "prefix",
        "target": "forced_bos_token_id",
    }
    tokenizer = Tokenizer.load(bundle)
    texts = ["the cat sat", "a dog", "hello there, you two"]
    options = {"source_lang": "en", "target_lang": "fr", "max_tokens": 12, "num_beams": 2}
    for text, found in zip(texts, answer(bundle, texts, threads=1, **options), strict=True):
        source = [4, *tokenizer.encode(text, add_special_tokens=False), 2]
        expected = generate(bundle, source, forced_bos_token_id=6, max_new_tokens=12, num_beams=2)
        assert expected[0] == 6
        assert found["answer"] == tokenizer.decode(expected).strip()
        assert found["text"] == text


def test_prefixes_and_searches_come_from_the_config(bundles: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.load(bundles("translation"))
    for task, options in (
        ("summarization", {}),
        ("translation", {"source_lang": "en", "target_lang": "de"}),
        ("translation", {"target_lang": "fr"}),
    ):
        settings = dict(T5_TASKS[f"translation_en_to_{options['target_lang']}" if options else task])
        source = tokenizer.encode(settings.pop("prefix") + "the cat sat")
        (found,) = answer(bundles(task), ["the cat sat"], threads=1, **options)
        assert found["answer"] == tokenizer.decode(generate(bundles(task), source, **settings)).strip()
    (found,) = answer(bundles("summarization"), ["the cat sat"], threads=1, num_beams=1, max_tokens=3, min_tokens=3)
    assert found["generated_tokens"] == 3
    (found,) = answer(bundles("text2text-generation"), ["the cat sat"], threads=1, max_tokens=5)
    expected = generate(bundles("translation"), tokenizer.encode("the cat sat"), max_new_tokens=5)
    assert found["answer"] == tokenizer.decode(expected).strip()


@pytest.mark.parametrize(
    ("task", "arguments", "code", "message"),
    [
        (
            "m2m_100",
            ["--source-lang", "en", "--target-lang", "dee"],
            2,
            "unknown language `dee`\n\nhint: did you mean `de`?",
        ),
        ("m2m_100", ["--source-lang", "xx", "--target-lang", "de"], 2, "hint: choose from: de, en, fr"),
        ("m2m_100", ["--source-lang", "en"], 2, "--target-lang is missing"),
        ("m2m_100", ["--source-lang", "en", "--target-lang", "de", "--num-beams", "0"], 2, "--num-beams 0"),
        ("m2m_100", ["--temperature", "1"], 2, "--temperature is for text-generation"),
        ("translation", ["--source-lang", "de", "--target-lang", "fr"], 2, "unknown language `de`"),
        ("translation", ["--source-lang", "en"], 2, "which pair?"),
        ("summarization", ["--target-lang", "de"], 2, "--target-lang is for translation"),
        ("summarization", ["--max-tokens", "0"], 2, "--max-tokens 0"),
    ],
)
def test_wrong_options_are_answered(
    bundles: Callable[[str], Path], task: str, arguments: list[str], code: int, message: str
) -> None:
    result = CliRunner().invoke(app, ["infer", str(bundles(task)), "--prompt", "the cat", *arguments])
    assert result.exit_code == code
    assert message in result.stderr


@pytest.mark.parametrize(
    ("task", "told", "missing"),
    [
        ("m2m_100", {"source_lang": "en", "target_lang": "fr"}, "source_lang"),
        ("m2m_100", {"source_lang": "en", "target_lang": "fr"}, "target_lang"),
        ("translation", {"target_lang": "fr"}, "target_lang"),
    ],
)
def test_a_line_without_its_language_fails_alone(
    bundles: Callable[[str], Path], task: str, told: dict[str, str], missing: str, tmp_path: Path
) -> None:
    silent = {name: value for name, value in told.items() if name != missing}
    lines = [{"prompt": "the cat", **given} for given in (told, silent, told)]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    summary = answer_file(bundles(task), source, output, threads=1, max_tokens=3)
    assert [error["line"] for error in summary.errors] == [2]
    assert f"`{missing}` is missing" in summary.errors[0]["error"]
    first, last = (json.loads(line) for line in output.open())
    assert first["answer"] == last["answer"] == answer(bundles(task), ["the cat"], max_tokens=3, **told)[0]["answer"]
    given_for_all = answer_file(bundles(task), source, tmp_path / "all.jsonl", threads=1, max_tokens=3, **told)
    assert given_for_all.failed == 0


def test_texts_that_do_not_fit_are_refused(bundles: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="text 2 of 2 is empty"):
        answer(bundles("m2m_100"), ["cat", " \n"], source_lang="en", target_lang="de")
    with pytest.raises(InputError, match="source too long: 103 tokens, the model has 64 positions"):
        answer(bundles("m2m_100"), ["a " * 100], source_lang="en", target_lang="de")


def test_decoders_do_not_translate(fp32_bundle: Path) -> None:
    arguments = ["infer", str(fp32_bundle), "--prompt", "hi", "--source-lang", "en"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "--source-lang is for automatic-speech-recognition, translation;" in result.stderr


def test_a_decoder_graph_alone_is_refused(bundles: Callable[[str], Path]) -> None:
    result = CliRunner().invoke(app, ["infer", str(bundles("m2m_100") / "decoder.onnx"), "--prompt", "hi"])
    assert result.exit_code == 5
    assert "is no decoder on its own: it wants the input `encoder_attention_mask`" in result.stderr


def test_translate_on_the_command_line(bundles: Callable[[str], Path]) -> None:
    arguments = ["infer", str(bundles("m2m_100")), "--prompt", "the cat", "--source-lang", "en", "--target-lang", "de"]
    result = CliRunner().invoke(app, [*arguments, "--format", "json", "--max-tokens", "6"])
    assert result.exit_code == 0
    assert set(json.loads(result.stdout)) == {"text", "answer", "generated_tokens", "finish_reason"}


def test_codes_may_be_shortened() -> None:
    known = ["de_DE", "en_XX", "zho_Hans", "zho_Hant"]
    assert resolve("--target-lang", "de", known) == "de_DE"
    with pytest.raises(OptionError) as caught:
        resolve("--target-lang", "zho", known)
    assert caught.value.hint == "did you mean `zho_Hans` or `zho_Hant`?"
    assert resolve_pair([("en", "de")], None, None) == ("en", "de")
    with pytest.raises(OptionError, match="no such pair"):
        resolve_pair([("en", "de"), ("fr", "en")], "fr", "de")


@pytest.mark.parametrize("name", ["NllbTokenizer", "MBart50Tokenizer", "MBartTokenizer", "legacy NllbTokenizer"])
def test_sources_are_spelled_as_transformers_does(tmp_path: Path, name: str) -> None:
    from tests.tiny_seq2seq import LETTERS

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS)]
    legacy = {"legacy_behaviour": True} if name.startswith("legacy") else {}
    source, target = ("eng_Latn", "deu_Latn") if "Nllb" in name else ("en_XX", "de_DE")
    maker = getattr(transformers, name.removeprefix("legacy "))
    if "Nllb" in name:
        vocabulary: Any = {piece: index for index, piece in enumerate(pieces)}
        hf = maker(vocab=vocabulary, merges=[("▁", letter) for letter in LETTERS], src_lang=source, **legacy)
    else:
        hf = maker(vocab=[(piece, -float(index)) for index, piece in enumerate(pieces)], src_lang=source)
    hf.save_pretrained(tmp_path)
    described = read_languages(tmp_path)
    assert described is not None
    languages = Languages(described, Tokenizer.load(tmp_path))
    for text in ("the cat", "a dog, two"):
        assert languages.encode(text, source, target) == hf(text).input_ids
        assert languages.encode(text, source.partition("_")[0], target) == hf(text).input_ids
    place = "decoder_start_token_id" if name == "MBartTokenizer" else "forced_bos_token_id"
    assert languages.settings(target) == {place: hf.convert_tokens_to_ids(target)}


@pytest.fixture(scope="module")
def sentencepieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the SentencePiece files of a Marian and an M2M-100 tokenizer."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 20), encoding="utf-8")
    for kind, name in (("unigram", "source.spm"), ("bpe", "sentencepiece.bpe.model")):
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "corpus.txt"),
            model_prefix=str(folder / kind),
            vocab_size=60,
            hard_vocab_limit=False,
            model_type=kind,
            character_coverage=1.0,
            minloglevel=2,
        )
        (folder / f"{kind}.model").rename(folder / name)
    return folder


def _pieces(path: Path) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [processor.id_to_piece(index) for index in range(3, processor.get_piece_size())]


def _write_vocabulary(path: Path, pieces: list[str]) -> None:
    path.write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))


def _compare(mine: Tokenizer, theirs: Any, strip: slice) -> None:
    for text in TEXTS:
        expected = theirs(text).input_ids[strip]
        found = mine.encode(text, add_special_tokens=strip == slice(None))
        assert found == expected
        assert mine.decode(found).strip() == theirs.decode(expected, skip_special_tokens=True).strip()


def test_marian_tokenizers_are_converted(sentencepieces: Path, tmp_path: Path) -> None:
    spm = sentencepieces / "source.spm"
    # The vocabulary has its own order, and pieces of the target that the source's model lacks.
    _write_vocabulary(tmp_path / "vocab.json", ["</s>", "<unk>", *_pieces(spm)[::-1], "▁katzen", ">>deu<<", "<pad>"])
    for name in ("source.spm", "target.spm"):
        (tmp_path / name).write_bytes(spm.read_bytes())
    write_marian_tokenizers(tmp_path, tmp_path)
    files = [str(tmp_path / name) for name in ("source.spm", "target.spm", "vocab.json")]
    theirs = transformers.MarianTokenizer(*files)
    _compare(Tokenizer.load(tmp_path), theirs, slice(None))
    described = read_languages(tmp_path)
    assert described == {"tokens": {"deu": ">>deu<<"}, "source": "none", "target": "prefix"}
    languages = Languages(described, Tokenizer.load(tmp_path))
    assert languages.encode("the cat", None, "deu") == theirs(">>deu<<the cat").input_ids
    with pytest.raises(OptionError, match="the model finds out itself"):
        languages.encode("the cat", "eng", "deu")


def test_a_target_with_its_own_vocabulary(sentencepieces: Path, tmp_path: Path) -> None:
    spm = sentencepieces / "source.spm"
    _write_vocabulary(tmp_path / "vocab.json", ["</s>", "<unk>", *_pieces(spm), "<pad>"])
    _write_vocabulary(tmp_path / "target_vocab.json", ["<pad>", "</s>", "<unk>", *_pieces(spm)[::-1]])
    for name in ("source.spm", "target.spm"):
        (tmp_path / name).write_bytes(spm.read_bytes())
    write_marian_tokenizers(tmp_path, tmp_path)
    target = Tokenizer.load_target(tmp_path)
    ids = target.encode("hello world")
    assert target.decode(ids) == "hello world"
    assert ids != Tokenizer.load(tmp_path).encode("hello world", add_special_tokens=False)


def test_m2m_tokenizers_are_converted(sentencepieces: Path, tmp_path: Path) -> None:
    spm = tmp_path / "sentencepiece.bpe.model"
    spm.write_bytes((sentencepieces / spm.name).read_bytes())
    _write_vocabulary(tmp_path / "vocab.json", ["<s>", "<pad>", "</s>", "<unk>", *_pieces(spm)])
    write_m2m_tokenizer(tmp_path, tmp_path)
    theirs = transformers.M2M100Tokenizer(str(tmp_path / "vocab.json"), str(spm), src_lang="en")
    mine = Tokenizer.load(tmp_path)
    _compare(mine, theirs, slice(1, -1))
    assert mine.token_id("__zu__") == theirs.get_lang_id("zu")
    described = read_languages(tmp_path)
    assert described is not None
    assert len(described["tokens"]) == 100
    assert Languages(described, mine).encode("the cat", "en", "de") == theirs("the cat").input_ids


def test_damaged_sentencepieces_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"</s>": 0, "<unk>": 1}')
    with pytest.raises(InputError, match=r"cannot read .*source\.spm"):
        write_marian_tokenizers(tmp_path, tmp_path)
    (tmp_path / "source.spm").write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match="not a SentencePiece model"):
        write_marian_tokenizers(tmp_path, tmp_path)
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(InputError, match="malformed vocabulary"):
        write_marian_tokenizers(tmp_path, tmp_path)


def test_encoder_decoders_are_measured(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    data = tmp_path / "pairs.tsv"
    data.write_text("the cat\tdie katze\na dog\tein hund, zwei\n", encoding="utf-8")
    subject = Subject(bundles("m2m_100"), threads=1, max_length=8)
    assert subject.facts()["vocab_size"] == 120
    trial = Trial((0, 1), 120, {"1x10": (1, 10)}, 8)
    assert len(subject.generate(trial, "1x10").tokens_s) == 8
    assert prefill.measure(subject, trial)["ttft_s"] > 0
    assert decode.measure(subject, trial)["tpot_s"] > 0
    windows = divergence.prepare(subject.bundle, data, BenchOptions())
    assert [len(window.ids) for window in windows] == [1 + 8 + 1, 1 + 12 + 1]
    logits = divergence.answer(subject, windows[0])
    figures = divergence.figures(divergence.compare(windows[0], logits, logits))
    assert figures["kld"] == pytest.approx(0, abs=1e-6)
    assert figures["top1_agreement"] == 1.0
    expected = -np.log(np.exp(logits[0] - logits[0].max()) / np.exp(logits[0] - logits[0].max()).sum())
    first = divergence.compare(divergence.Window(windows[0].ids[:2], source=windows[0].source), logits[:2], logits[:2])
    assert first[0, 3] == pytest.approx(expected[windows[0].ids[1]], rel=1e-4)
    translated = translation.answer(subject, ("the cat", "die katze"))
    figures = translation.figures(translation.compare(("the cat", str(translated[0]) or "x"), translated, translated))
    assert figures["chrf"] == pytest.approx(100 if translated[0] else 0)
    data.write_text("no target\n")
    with pytest.raises(InputError, match="line 1"):
        divergence.prepare(subject.bundle, data, BenchOptions())
