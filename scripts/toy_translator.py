"""Train a tiny BART that translates English numbers to German, and save it as a Hugging Face folder.

    python scripts/toy_translator.py FOLDER

A model to try `llmfast` on where no model hub can be reached: seconds of training, 0.2 million parameters.
Every eleventh number is left out of the training; the share of those that are translated right is printed.
"""

import argparse
import json
from pathlib import Path

import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors
from transformers import BartConfig, BartForConditionalGeneration

from llmfast import report

_ENGLISH = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_ENGLISH += " seventeen eighteen nineteen"
_GERMAN = "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn"
_GERMAN += " siebzehn achtzehn neunzehn"
_ENGLISH_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_GERMAN_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig"
_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
_HELD_OUT = 11
_STEPS = 400
_BATCH = 64


def english(number: int) -> str:
    """Spell a number below 1000."""
    if number >= 100:
        rest = f" {english(number % 100)}" if number % 100 else ""
        return f"{english(number // 100)} hundred{rest}"
    if number < 20:
        return _ENGLISH.split()[number]
    rest = f" {english(number % 10)}" if number % 10 else ""
    return _ENGLISH_TENS.split()[number // 10 - 2] + rest


def german(number: int) -> str:
    """Spell a number below 1000, the parts of a word apart."""
    if number >= 100:
        rest = f" {german(number % 100)}" if number % 100 else ""
        return f"{german(number // 100)} hundert{rest}"
    if number < 20:
        return _GERMAN.split()[number]
    rest = f"{german(number % 10)} und " if number % 10 else ""
    return rest + _GERMAN_TENS.split()[number // 10 - 2]


def main() -> None:
    """Train, test and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a model this small only waits for other threads
    tokenizer = _make_tokenizer()
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=tokenizer.get_vocab_size(),
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            max_position_embeddings=32,
            dropout=0.0,
            pad_token_id=1,
        )
    )
    numbers = torch.tensor([number for number in range(1000) if number % _HELD_OUT])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=_STEPS)
    for _ in range(_STEPS):
        chosen = numbers[torch.randint(len(numbers), (_BATCH,))].tolist()
        source = _encode(tokenizer, [english(number) for number in chosen])
        target = _encode(tokenizer, [german(number) for number in chosen])
        labels = target.masked_fill(target == 1, -100)
        loss = model(input_ids=source, attention_mask=(source != 1).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    unseen = list(range(0, 1000, _HELD_OUT))
    source = _encode(tokenizer, [english(number) for number in unseen])
    found = model.generate(input_ids=source, attention_mask=(source != 1).long(), max_new_tokens=12, num_beams=1)
    answers = [tokenizer.decode(row) for row in found.tolist()]
    right = sum(answer == german(number) for answer, number in zip(answers, unseen, strict=True))
    model.generation_config.num_beams = 4
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"pad_token": "<pad>", "eos_token": "</s>", "source_lang": "en", "target_lang": "de"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    report.out(f"{folder}: {right} of {len(unseen)} numbers that it never saw are translated right")


def _make_tokenizer() -> tokenizers.Tokenizer:
    words = f"{_ENGLISH} {_ENGLISH_TENS} hundred {_GERMAN} {_GERMAN_TENS} hundert und".split()
    vocabulary = {word: index for index, word in enumerate([*_SPECIAL, *words])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tokenizer


def _encode(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> torch.Tensor:
    rows = [tokenizer.encode(text).ids for text in texts]
    longest = max(map(len, rows))
    return torch.tensor([row + [1] * (longest - len(row)) for row in rows])


if __name__ == "__main__":
    main()
