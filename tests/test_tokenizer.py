import json
import random

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llmfast.errors import InputError, UnsafeInputError, UnsupportedError
from llmfast.tokenizer import REPLACEMENT, Tokenizer, TokenStream

CORPUS = ["the cat sat on the mat", "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e", "one two  three"] * 3
TEXTS = [
    "the cat",
    " leading space",
    "two  spaces \n\n lines ",
    "caf\u00e9 na\u00efve \u00fc\u00e9\u00fc",
    "\u65e5\u672c\u8a9e and \U0001f469\u200d\U0001f680 \U0001f600\U0001f600",
]


def _byte_level():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    return backend


def _sentencepiece(strip):
    """Return a tokenizer as converted from SentencePiece: `\u2581` for spaces, `<0xNN>` for unknown bytes."""
    letters = "\u2581abcdefghijklmnopqrstuvwxyz"
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in [*letters, "\u2581t", "at", "\u2581c"]:
        vocab[piece] = len(vocab)
    merges = [("\u2581", "t"), ("a", "t"), ("\u2581", "c")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("\u2581")] if strip else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    ends = [decoders.Strip(" ", 1, 0)] if strip else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def _word_piece():
    vocab = {"[PAD]": 3, "[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "the": 4, "cat": 5, "##s": 6, "sat": 7}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    return backend


BACKENDS = {
    "byte-level": _byte_level,
    "sentencepiece": lambda: _sentencepiece(strip=True),
    "sentencepiece-no-strip": lambda: _sentencepiece(strip=False),
}


def _wrap(backend, **settings):
    return Tokenizer(backend, settings, (), None)


def _save(folder, backend, **files):
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_are_the_whole_text(name, text):
    tokenizer = _wrap(BACKENDS[name]())
    ids = tokenizer.encode(text)
    stream = TokenStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert len(ids) > 1
    assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("cut", range(1, 8))
def test_stream_goes_on_where_its_context_ends(name, cut):
    tokenizer = _wrap(BACKENDS[name]())
    ids = tokenizer.encode("the cat sat on the mat")
    stream = TokenStream(tokenizer, context=ids[:cut])
    continuation = "".join(stream.push(token) for token in ids[cut:])
    assert tokenizer.decode(ids[:cut]) + continuation == tokenizer.decode(ids)


def test_streams_of_random_text():
    rng = random.Random(0)
    alphabet = "ab \n\u00e9\u65e5\U0001f600\u200d"
    for name in BACKENDS:
        tokenizer = _wrap(BACKENDS[name]())
        for _ in range(30):
            ids = tokenizer.encode("".join(rng.choices(alphabet, k=20)))
            stream = TokenStream(tokenizer)
            assert "".join(map(stream.push, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", BACKENDS)
def test_half_a_character_is_never_shown(name):
    tokenizer = _wrap(BACKENDS[name]())
    ids = tokenizer.encode("a\U0001f600")
    stream = TokenStream(tokenizer)
    assert "".join(map(stream.push, ids[:-1])).strip() == "a"
    assert stream.push(ids[-1]) == "\U0001f600"


def test_broken_bytes_show_as_replacements_once_text_follows():
    tokenizer = _wrap(_byte_level())
    broken = tokenizer.encode("\u00fc")[:1]
    stream = TokenStream(tokenizer)
    assert [stream.push(token) for token in [*broken, *tokenizer.encode("a")]] == ["", REPLACEMENT + "a"]


def test_special_tokens_show_as_nothing():
    tokenizer = _wrap(_byte_level())
    ids = tokenizer.encode("<s>the</s> cat")
    stream = TokenStream(tokenizer)
    assert "".join(map(stream.push, ids)) == "the cat"


def test_batch_is_padded_and_cut(tmp_path):
    backend = _word_piece()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    _save(tmp_path, backend, tokenizer_config__json={"pad_token": "[PAD]"})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("the cats sat") == [1, 4, 5, 6, 7, 2]
    batch = tokenizer.encode_batch(["the cat sat the cat", "cat"], max_length=5)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 4, 5, 7, 2], [1, 5, 2, 3, 3]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
        "token_type_ids": [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
    }
    assert all(value.dtype.name == "int64" for value in batch.values())
    assert len(tokenizer.encode("the cat sat the cat")) == 7


def test_vocabulary_counts_to_the_highest_id():
    backend = _byte_level()
    highest = max(backend.get_vocab().values())
    assert _wrap(backend).vocab_size == highest + 1
    backend.add_tokens([AddedToken("<extra>", special=True)])
    assert _wrap(backend).vocab_size == highest + 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config__json": {"eos_token_id": [7, 9]}, "config__json": {"eos_token_id": 5}}, (7, 9)),
        ({"generation_config__json": {}, "config__json": {"eos_token_id": 5}}, (5,)),
        ({"config__json": {"eos_token_id": None}}, "</s>"),
        ({}, "</s>"),
    ],
)
def test_end_tokens(tmp_path, files, expected):
    backend = _byte_level()
    _save(tmp_path, backend, tokenizer_config__json={"eos_token": {"content": "</s>"}}, **files)
    if isinstance(expected, str):
        expected = (backend.token_to_id(expected),)
    assert Tokenizer.load(tmp_path).eos_ids == expected


def test_end_token_that_is_no_number_is_refused(tmp_path):
    _save(tmp_path, _byte_level(), config__json={"eos_token_id": "2"})
    with pytest.raises(InputError, match="eos_token_id"):
        Tokenizer.load(tmp_path)


TEMPLATE = """
{%- for message in messages %}
    {%- if message.role != "user" %}{{ raise_exception("no " + message.role + " here") }}{% endif %}
    {%- generation %}{{ bos_token }}{{ message.content | tojson }}{% endgeneration %}
{%- endfor %}
{% if add_generation_prompt %}
{{ eos_token }}
{% endif %}
"""
MESSAGES = [{"role": "user", "content": "caf\u00e9 <b>"}]


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template__jinja": TEMPLATE},
        {"chat_template": TEMPLATE},
        {"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]},
    ],
)
def test_chat_template_is_rendered_as_transformers_does(tmp_path, files):
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    template = files.pop("chat_template", None)
    settings |= {"chat_template": template} if template else {}
    _save(tmp_path, _byte_level(), tokenizer_config__json=settings, **files)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.apply_chat_template(MESSAGES) == '<s>"caf\u00e9 <b>"</s>\n'
    assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False) == '<s>"caf\u00e9 <b>"'
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = peer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(MESSAGES) == expected


def test_template_knows_the_date(tmp_path):
    _save(tmp_path, _byte_level(), chat_template__jinja="{{ strftime_now('%Y') }}{{ tools is none }}")
    rendered = Tokenizer.load(tmp_path).apply_chat_template([])
    assert rendered[:2] == "20"
    assert rendered.endswith("True")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "chat template"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ 1 / 0 }}", "division"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "too big|Range"),
    ],
)
def test_template_that_fails_is_bad_input(tmp_path, template, message):
    _save(tmp_path, _byte_level(), chat_template__jinja=template)
    with pytest.raises(InputError, match=message):
        Tokenizer.load(tmp_path).apply_chat_template(MESSAGES)


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_template_that_leaves_its_sandbox_is_refused(tmp_path, template):
    _save(tmp_path, _byte_level(), chat_template__jinja=template)
    with pytest.raises(UnsafeInputError, match=r"unsafe|not safely callable"):
        Tokenizer.load(tmp_path).apply_chat_template(MESSAGES)


def test_no_template(tmp_path):
    tokenizer = Tokenizer.load(_save(tmp_path, _byte_level()))
    with pytest.raises(UnsupportedError, match="no chat template"):
        tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize("template", [[{"name": "tool_use", "template": "x"}], [1], 7])
def test_malformed_template_setting_is_bad_input(tmp_path, template):
    _save(tmp_path, _byte_level(), tokenizer_config__json={"chat_template": template})
    with pytest.raises(InputError, match="chat template"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{", '{"version": "1.0"}', "[]"])
def test_unusable_tokenizer_is_bad_input(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_unusable_settings_are_bad_input(tmp_path, content):
    _save(tmp_path, _byte_level(), tokenizer_config__json=content)
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_text_that_is_not_unicode_is_bad_input():
    tokenizer = _wrap(_byte_level())
    with pytest.raises(InputError, match="not UTF-8"):
        tokenizer.encode("a\udcff")
    with pytest.raises(InputError, match="not UTF-8"):
        tokenizer.encode_batch(["a\udcff"], max_length=8)
