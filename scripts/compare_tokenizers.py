"""Compare the tokenizer that llmfast rebuilds from a GGUF file with llama.cpp's, text by text.

    pip install llama-cpp-python
    python scripts/compare_tokenizers.py MODEL.gguf [--hf FOLDER] [--texts 10000] [--seed 0]

Each text is made at random of words in many scripts, code, numbers, white space, emoji, combining marks, special
tokens of the model and arbitrary code points. With --hf the tokenizer.json of a folder is compared too. Prints how
many texts get other tokens, with the first of them, and exits with 1 if there are any.
"""

# ruff: noqa: RUF001

import argparse
import random
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from llmfast.export.gguf_file import GgufFile
from llmfast.export.gguf_tokenizer import GgufTokenizer

Encode = Callable[[str], list[int]]

_WORDS = """
the The THE of and quick brown fox jumps ünïcödé naïve façade Straße İstanbul don't DON'T we'll it'S I'm o'clock
Привет мир Ελληνικά עברית العربية हिन्दी বাংলা ไทย 日本語 テキスト ひらがな 中文字符 한국어 조선말 ქართული አማርኛ
0 1 12 123 1234 12345 3.14159 1,000,000 ١٢٣ ½ ² Ⅷ 2026-01-02 0x1F ▁ Ġ
😀 👍🏽 👨‍👩‍👧‍👦 🇩🇪 ❤️ . , ; : ! ? ... — – ‘’ “” « » ( ) [ ] { } < > / \\ | @ # $ € % ^ & * _ - + = ~ ` ' " ''
"""
_SNIPPETS = (
    *_WORDS.split(),
    "e\u0301",
    "a\u0308\u0323",
    *"\u200d\ufeff\u00a0\u2028\u0085\x00\x7f\ufffd",
    "def f(x):\n    return x**2  # squared\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    "\tif x:\r\n\t\tpass\r\n",
    "<html><body class='a'>&nbsp;</body></html>",
    "SELECT * FROM t WHERE x >= 10;",
    "https://example.org/a?b=c&d=%20",
    "<0x0A>",
)
_SPACES = (" ", "  ", "   ", "    ", "\n", "\n\n", "\n\n\n", "\t", "\t\t", " \n", "\n ", "\r\n", "\r", " \t ", "\u3000")


def random_text(rng: random.Random, special_tokens: Sequence[str]) -> str:
    """Return a text of up to some 60 parts."""
    parts: list[str] = []
    for _ in range(rng.randint(1, rng.choice((3, 12, 60)))):
        kind = rng.random()
        if kind < 0.55:
            parts.append(rng.choice(_SNIPPETS))
        elif kind < 0.8:
            parts.append(rng.choice(_SPACES) * rng.randint(1, 3))
        elif kind < 0.85:
            parts.append("".join(chr(rng.randint(32, 126)) for _ in range(rng.randint(1, 8))))
        elif kind < 0.9:
            parts.append("".join(_any_character(rng) for _ in range(rng.randint(1, 4))))
        elif kind < 0.95:
            parts.append(rng.choice("aé中 \n=-.0'") * rng.randint(1, 20))
        elif special_tokens:
            parts.append(rng.choice(special_tokens))
        if rng.random() < 0.4:
            parts.append(" ")
    return "".join(parts)


def differences(expected: Encode, encode: Encode, texts: Sequence[str]) -> list[str]:
    """Return the texts that are encoded otherwise."""
    return [text for text in texts if expected(text) != encode(text)]


def llama_cpp_encoder(path: Path) -> Encode:
    """Return llama.cpp's tokenization of a file's vocabulary, without BOS and EOS."""
    from llama_cpp import Llama

    model = Llama(str(path), vocab_only=True, verbose=False)
    return lambda text: model.tokenize(text.encode(), add_bos=False, special=True)


def _any_character(rng: random.Random) -> str:
    while True:
        character = chr(
            rng.choice((rng.randint(0x80, 0x2FFF), rng.randint(0x3000, 0xFFFF), rng.randint(0x10000, 0x1FFFF)))
        )
        # What a new character is, letter or symbol, depends on the version of Unicode a program was built with.
        if unicodedata.category(character) not in ("Cn", "Cs"):
            return character


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--hf", type=Path, help="a folder with the model's own tokenizer.json")
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    rebuilt = GgufTokenizer(options.gguf, GgufFile(options.gguf).metadata)
    rng = random.Random(options.seed)
    special = [token.content for token in rebuilt.backend.get_added_tokens_decoder().values()]
    texts = [random_text(rng, special) for _ in range(options.texts)]
    references = {"llama.cpp": llama_cpp_encoder(options.gguf)}
    if options.hf:
        from tokenizers import Tokenizer

        original = Tokenizer.from_file(str(options.hf / "tokenizer.json"))
        references["tokenizer.json"] = lambda text: original.encode(text, add_special_tokens=False).ids

    def encode(text: str) -> list[int]:
        return rebuilt.backend.encode(text, add_special_tokens=False).ids

    failed = False
    for name, reference in references.items():
        found = differences(reference, encode, texts)
        failed |= bool(found)
        sys.stdout.write(f"{options.gguf.name}: {len(found)} of {len(texts)} texts get other tokens from {name}\n")
        for text in sorted(found, key=len)[:3]:
            sys.stdout.write(f"  {text!r}\n    {name}: {reference(text)}\n    llmfast: {encode(text)}\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
