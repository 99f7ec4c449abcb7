"""A run's tokenizer as the files that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import singledispatch
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from titan_lite.config.errors import NOT_AVAILABLE, ConfigError
from titan_lite.data.tokenizer import Bytes, Tokenizer
from titan_lite.data.tokenizers.huggingface import HuggingFace
from titan_lite.data.tokenizers.sentencepiece import SentencePiece
from titan_lite.data.tokenizers.tiktoken import Tiktoken, ranks_of

if TYPE_CHECKING:
    import tokenizers

FILE: Final = "tokenizer.json"
CONFIG: Final = "tokenizer_config.json"
TEMPLATE: Final = "chat_template.jinja"
SAMPLES: Final = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return {'a': [x, 1.5e-3]}  # comment\n\n\n\tif not x:\r\n",
    " leading, trailing  and   many    spaces \n \n",
    "It's 12345678 o'clock, they'll say; WE'VE 3.14159",
    "naïve café, Größe, señor, Ελληνικά, русский, עברית, العربية, हिन्दी",
    "日本語の文章と中文\uff0c한국어",
    "\ufb01ne \u00bd \u2167 \uff46\uff55\uff4c\uff4c a\u0301 \u200b\u00a0x",
    "👩‍👩‍👧 🇺🇳 ✓ \u2028 \x07\x7f",
    "",
    "a",
)
"""Texts whose ids must be the same in both; they hold what splitting and normalising differ in."""


def tokenizer_files(
    tokenizer: Tokenizer, begin: int | None, context_len: int, pad: int | None = None
) -> dict[str, bytes]:
    """File name -> content. Every text gets the ids that training saw, with `begin` before it where there is one, and
    `pad` behind those that are shorter than others.

    ConfigError where that cannot be had.
    """
    found = pipeline(tokenizer)
    _compare(tokenizer, found)
    _begin_with(found, begin)
    names = {"eos_token": tokenizer.eos_id, "bos_token": tokenizer.bos_id if tokenizer.bos_id is not None else begin}
    if pad is not None:
        names |= {"pad_token": pad}
    config: dict[str, Any] = {
        **_own_config(tokenizer),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_len,
        **{role: found.id_to_token(number) for role, number in names.items() if number is not None},
    }
    template = chat_template(tokenizer)
    return {
        FILE: found.to_str(pretty=True).encode(),
        CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
        **({} if template is None else {TEMPLATE: template}),
    }


def padding_token(tokenizer: Tokenizer) -> int | None:
    """What may stand behind a text without ending it: transformers' classifiers look for the last token that is
    another one. The tokenizer's own, or the begin of text; None where both are the end of text, or none.
    """
    own = _own_config(tokenizer).get("pad_token")
    name = own.get("content") if isinstance(own, dict) else own
    number = pipeline(tokenizer).token_to_id(name) if name else None
    candidates = (number, tokenizer.bos_id)
    return next((pad for pad in candidates if pad not in (None, tokenizer.eos_id)), None)


def chat_template(tokenizer: Tokenizer) -> bytes | None:
    """The template that lies beside the tokenizer's file, or in its config: of several the one named "default"."""
    if not isinstance(tokenizer, HuggingFace):
        return None
    file = tokenizer.config.file()
    if file is not None and (beside := file.parent / TEMPLATE).is_file():
        return beside.read_bytes()
    template = _side_config(tokenizer).get("chat_template")
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return template.encode() if isinstance(template, str) else None


def _side_config(tokenizer: HuggingFace) -> dict[str, Any]:
    content = tokenizer.side_files.get(CONFIG)
    return {} if content is None else dict(json.loads(content))


def _own_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the tokenizer's own config says beyond how it is loaded."""
    if not isinstance(tokenizer, HuggingFace):
        return {}
    left_out = ("chat_template", "auto_map", "tokenizer_file", "vocab_file", "added_tokens_decoder", "backend")
    return {key: value for key, value in _side_config(tokenizer).items() if key not in left_out}


@singledispatch
def pipeline(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer as a pipeline of the `tokenizers` library, without anything that is put before a text."""
    why = "has no counterpart in the Hugging Face tokenizers library"
    raise ConfigError.at("tokenizer.type", why, type(tokenizer).__name__, code=NOT_AVAILABLE)


@pipeline.register(Bytes)
def _(tokenizer: Bytes) -> tokenizers.Tokenizer:
    """Byte level without merges: a token for each byte, and the two bytes that are in no text as specials."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names = {0xFE: "<|begin_of_text|>", 0xFF: "<|end_of_text|>"}
    shown = byte_characters()
    vocabulary = {names.get(byte, shown[byte]): byte for byte in range(256)}
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names.values()])
    return found


@pipeline.register(HuggingFace)
def _(tokenizer: HuggingFace) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer.content().decode())


@pipeline.register(Tiktoken)
def _(tokenizer: Tiktoken) -> tokenizers.Tokenizer:
    """Byte level, with the merges that the ranks stand for."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    ranks = ranks_of(tokenizer.backend)
    shown = byte_characters()

    def text(token: bytes) -> str:
        return "".join(shown[byte] for byte in token)

    vocabulary = {text(token): rank for token, rank in ranks.items()} | tokenizer.specials
    merges = [(text(left), text(right)) for left, right in merges_of(ranks)]
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(tokenizer.backend._pat_str), behavior="isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in tokenizer.specials])
    return found


@pipeline.register(SentencePiece)
def _(tokenizer: SentencePiece) -> tokenizers.Tokenizer:
    """Spaces as U+2581 and one word that is the whole text, as SentencePiece sees it."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)  # type: ignore[attr-defined]
    found = Tokenizer(_sentencepiece_model(model))
    spec = model.normalizer_spec
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend("▁")] * spec.add_dummy_prefix + [normalizers.Replace(" ", "▁")]
    found.normalizer = normalizers.Sequence(steps)
    after = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    found.decoder = decoders.Sequence(after + [decoders.Strip(" ", 1, 0)] * spec.add_dummy_prefix)
    pieces = model.pieces
    found.add_special_tokens([AddedToken(p.piece, normalized=False, special=True) for p in pieces if p.type in (2, 3)])
    found.add_tokens([AddedToken(p.piece, normalized=False, special=False) for p in pieces if p.type == 4])
    return found


def _sentencepiece_model(model: Any) -> Any:
    """Its pieces as a unigram model or as merges. Types of pieces: 2 unknown, 3 control, 4 user's, 6 byte."""
    from tokenizers import models

    spec, pieces = model.trainer_spec, model.pieces
    if spec.model_type == 1:
        scored = [(piece.piece, piece.score) for piece in pieces]
        return models.Unigram(scored, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    if spec.model_type == 2:
        vocabulary = {piece.piece: number for number, piece in enumerate(pieces)}
        scores = {piece.piece: piece.score for piece in pieces if piece.type == 1}
        merges = [
            (scores[whole], vocabulary[whole[:i]], vocabulary[whole[i:]], (whole[:i], whole[i:]))
            for whole in scores
            for i in range(1, len(whole))
            if whole[:i] in vocabulary and whole[i:] in vocabulary
        ]
        merges.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
        return models.BPE(
            vocab=vocabulary,
            merges=[merge[3] for merge in merges],
            unk_token=pieces[spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    why = "is a SentencePiece model of words or characters, which has no counterpart in the tokenizers library"
    raise ConfigError.at("tokenizer.path", why, code=NOT_AVAILABLE)


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """For each token the two that are merged to it: those that are left of its bytes after all merges of lower rank."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            best = min(range(len(joined)), key=joined.__getitem__)
            if joined[best] >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies: itself, or from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _compare(tokenizer: Tokenizer, found: tokenizers.Tokenizer) -> None:
    """ConfigError with the first text that gets other ids."""
    for text in SAMPLES:
        ours = [int(i) for i in tokenizer.encode(text)]
        theirs = found.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            first = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if len(set(pair)) > 1), -1)
            why = (
                "cannot be written as a tokenizer.json that gives the same ids: the tokenizers library lacks something "
                f"that this vocabulary needs. {text!r} becomes {ours[:12]} in training and {theirs[:12]} there"
                f" (first difference at token {first if first >= 0 else min(len(ours), len(theirs))})"
            )
            raise ConfigError.at("tokenizer", why, allowed="a tokenizer of type huggingface or bytes")


def _begin_with(found: tokenizers.Tokenizer, begin: int | None) -> None:
    """Makes the pipeline put `begin` before each text, or nothing."""
    from tokenizers.processors import ByteLevel, TemplateProcessing

    bare = found.encode("a", add_special_tokens=False).ids
    if found.encode("a").ids == ([] if begin is None else [begin]) + bare:
        return
    if begin is None:
        found.post_processor = ByteLevel(trim_offsets=False)
        return
    name = found.id_to_token(begin)
    found.post_processor = TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A $B:1", special_tokens=[(name, begin)]
    )
