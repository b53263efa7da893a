"""SentencePiece tokenizers that transformers runs in Python only, Marian's and M2M-100's, as tokenizer.json.

Their vocabulary is a file apart from the SentencePiece model: ids come from the one, scores from the other.
Source: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from llmfast.bundle import read_json
from llmfast.errors import InputError, UnsupportedError

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
# Pieces that the SentencePiece model lacks lose against any that it has.
_LAST_RESORT = -1e9


def write_marian_tokenizers(source: Path, folder: Path) -> None:
    """Convert source.spm and vocab.json; a target with its own vocabulary becomes target_tokenizer.json."""
    vocabulary = _read_vocabulary(source / "vocab.json")
    special: list[str] = [token for token in ("</s>", "<unk>", "<pad>") if token in vocabulary]
    special += [token for token in vocabulary if token.startswith(">>") and token.endswith("<<")]
    backend = _convert(source / "source.spm", vocabulary, special)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    backend.save(str(folder / "tokenizer.json"))
    if (source / "target_vocab.json").is_file():
        target = _read_vocabulary(source / "target_vocab.json")
        _convert(source / "target.spm", target, special[:3]).save(str(folder / "target_tokenizer.json"))


def write_m2m_tokenizer(source: Path, folder: Path) -> None:
    """Convert sentencepiece.bpe.model and vocab.json; the tokens of the languages follow the vocabulary."""
    from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES

    vocabulary = _read_vocabulary(source / "vocab.json")
    settings = source / "tokenizer_config.json"
    name = (read_json(settings) if settings.is_file() else {}).get("language_codes", "m2m100")
    codes = FAIRSEQ_LANGUAGE_CODES.get(name)
    if codes is None:
        raise InputError(f"`{settings}` names unknown language_codes `{name}`")
    languages = [f"__{code}__" for code in codes]
    vocabulary |= {token: len(vocabulary) + index for index, token in enumerate(languages)}
    special: list[str] = [token for token in ("<s>", "<pad>", "</s>", "<unk>") if token in vocabulary] + languages
    _convert(source / "sentencepiece.bpe.model", vocabulary, special).save(str(folder / "tokenizer.json"))


def _convert(path: Path, vocabulary: Mapping[str, int], special: Sequence[str]) -> tokenizers.Tokenizer:
    """Return a tokenizer with the pieces and the normalization of a SentencePiece model, and the vocabulary's ids."""
    proto = _read_model(path)
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    known = {piece: score for piece, score in scores.items() if piece in vocabulary}
    if "<unk>" not in vocabulary:
        raise InputError(f"the vocabulary beside `{path}` has no <unk>")
    if proto.trainer_spec.model_type == _UNIGRAM:
        by_id = sorted(vocabulary, key=lambda piece: vocabulary[piece])
        if [vocabulary[piece] for piece in by_id] != list(range(len(by_id))):
            raise InputError(f"the ids of the vocabulary beside `{path}` have gaps")
        pieces = [(piece, known.get(piece, _LAST_RESORT)) for piece in by_id]
        backend = tokenizers.Tokenizer(models.Unigram(pieces, vocabulary["<unk>"], byte_fallback=False))
    elif proto.trainer_spec.model_type == _BPE:
        from transformers.convert_slow_tokenizer import generate_merges

        merges = generate_merges(dict(vocabulary), known)
        backend = tokenizers.Tokenizer(models.BPE(dict(vocabulary), merges, unk_token="<unk>", fuse_unk=True))
    else:
        raise UnsupportedError(f"`{path}` is neither a unigram nor a BPE model of SentencePiece")
    charsmap = proto.normalizer_spec.precompiled_charsmap
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    backend.normalizer = normalizers.Sequence(steps)
    scheme = "always" if proto.normalizer_spec.add_dummy_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in special])
    return backend


def _read_model(path: Path) -> Any:
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}", "download the folder again") from error
    except DecodeError as error:
        raise InputError(f"not a SentencePiece model: `{path}`", "download the folder again") from error
    return proto


def _read_vocabulary(path: Path) -> dict[str, int]:
    vocabulary = read_json(path)
    if not isinstance(vocabulary, dict) or not all(type(index) is int for index in vocabulary.values()):
        raise InputError(f"malformed vocabulary: `{path}`: not token -> id")
    return vocabulary
