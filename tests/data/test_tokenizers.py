"""Every tokenizer type against the library it wraps, on real vocabularies where there are some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pytest
import sentencepiece
import tiktoken as tiktoken_library
import tiktoken.load
import tokenizers as tokenizers_library
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers import models, normalizers, pre_tokenizers

from tests.data.common import raw_bytes, tokenizer
from titan_lite.config.errors import ConfigError
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.data.tokenizers.huggingface import HuggingFace
from titan_lite.data.tokenizers.sentencepiece import SentencePiece
from titan_lite.data.tokenizers.tiktoken import Tiktoken

MISTRAL = Path(mistral_common.__file__).parent / "data"
SP_MODEL = MISTRAL / "tokenizer.model.v1"
TEKKEN = MISTRAL / "tekken_240911.json"
TEKKEN_SPECIALS = 1000
TEXT = "Hello\n\nworld  x é ☃ 漢字 \t\0 </s> <|endoftext|> it's 12345\n    def f(x):\n        return 1\n"


@pytest.fixture(scope="module")
def tekken() -> dict[str, Any]:
    return json.loads(TEKKEN.read_text())


@pytest.fixture(scope="module")
def llama3_file(tekken: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real vocabulary of exactly as many ranks as Llama 3's, in the format of its file."""
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.model"
    path.write_text("".join(f"{token['token_bytes']} {token['rank']}\n" for token in tekken["vocab"][:128000]))
    return path


@pytest.fixture(scope="module")
def llama3(llama3_file: Path) -> Tokenizer:
    return tokenizer(type="tiktoken", path=str(llama3_file))


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer.json."""
    library = tokenizers_library
    backend = library.Tokenizer(library.models.BPE())
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|odd|>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT, "def f(x): return x " * 20], trainer=trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    backend.save(str(path))
    return path


def check_round_trip(subject: Tokenizer, text: str, extra_bytes: int = 0) -> None:
    ids = subject.encode(text)
    assert ids.dtype == np.int64
    assert subject.decode(ids) == text
    assert subject.token_bytes.shape == (subject.vocab_size,)
    assert subject.token_bytes[ids].sum() == len(text.encode()) + extra_bytes
    assert subject.eos_id not in ids
    assert subject.token_bytes[subject.eos_id] == 0
    assert 0 <= subject.eos_id < subject.vocab_size


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_bytes_give_back_any_text(text: str) -> None:
    check_round_trip(raw_bytes(), text)


def test_bytes_are_utf8_and_two_bytes_that_never_occur_in_it() -> None:
    subject = raw_bytes()
    assert subject.encode("hé").tolist() == [104, 0xC3, 0xA9]
    assert (subject.vocab_size, subject.bos_id, subject.eos_id) == (256, 0xFE, 0xFF)
    assert subject.decode([0xFE, 104, 105, 0xFF]) == "hi"
    assert subject.decode([0xC3]) == "�"
    assert subject.files() == {}


def test_sentencepiece_equals_its_library() -> None:
    subject = tokenizer(type="sentencepiece", path=str(SP_MODEL))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(SP_MODEL))
    assert subject.encode(TEXT).tolist() == reference.encode(TEXT)
    assert (subject.bos_id, subject.eos_id, subject.vocab_size) == (1, 2, 32000)
    check_round_trip(subject, TEXT, extra_bytes=1)  # this model puts a space before the text
    assert subject.files() == {"tokenizer.model": SP_MODEL.read_bytes()}


def test_sentencepiece_continues_a_document_without_a_space_between() -> None:
    subject = tokenizer(type="sentencepiece", path=str(SP_MODEL))
    cut = TEXT.index("world")
    both = [*subject.encode(TEXT[:cut]), *subject.encode(TEXT[cut:], continued=True)]
    assert both == subject.encode(TEXT).tolist()
    assert both != [*subject.encode(TEXT[:cut]), *subject.encode(TEXT[cut:])]


PREFIXED: dict[str, dict[str, Any]] = {
    "a normalizer": {
        "normalizer": normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    },
    "metaspaces": {"pre_tokenizer": pre_tokenizers.Metaspace()},
    "metaspaces in a sequence": {
        "pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first")])
    },
}


@pytest.mark.parametrize("name", PREFIXED)
def test_hugging_face_files_continue_a_text_without_a_space_between(name: str, tmp_path: Path) -> None:
    """An answer behind its prompt: vocabulary in which "▁a" is another token than "a"."""
    vocabulary = {"</s>": 0, "\u2581": 1, "a": 2, "b": 3, "\u2581a": 4, "\u2581b": 5}
    backend = tokenizers_library.Tokenizer(models.BPE(vocabulary, [("\u2581", "a"), ("\u2581", "b")]))
    for part, steps in PREFIXED[name].items():
        setattr(backend, part, steps)
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    subject = tokenizer(type="huggingface", path=str(tmp_path / "tokenizer.json"))
    assert subject.encode("ab a").tolist() == [4, 3, 4]
    assert [*subject.encode("a"), *subject.encode("b a", continued=True)] == [4, 3, 4]
    assert subject.encode("b").tolist() == [5]


def test_tiktoken_file_equals_mistrals_own_tokenizer(tekken: dict[str, Any], tmp_path: Path) -> None:
    ranks = tekken["config"]["default_vocab_size"] - TEKKEN_SPECIALS
    path = tmp_path / "tekken.tiktoken"
    path.write_text("".join(f"{token['token_bytes']} {token['rank']}\n" for token in tekken["vocab"][:ranks]))
    subject = tokenizer(type="tiktoken", path=str(path), pattern=tekken["config"]["pattern"])
    reference = Tekkenizer.from_file(TEKKEN).encode(TEXT, bos=False, eos=False)
    assert subject.encode(TEXT).tolist() == [i - TEKKEN_SPECIALS for i in reference]
    assert (subject.eos_id, subject.bos_id, subject.vocab_size) == (ranks, None, ranks + 1)
    check_round_trip(subject, TEXT)


def test_llama3_file_is_known_by_its_size_and_equals_the_tiktoken_library(llama3: Tokenizer, llama3_file: Path) -> None:
    ranks = tiktoken_library.load.load_tiktoken_bpe(str(llama3_file))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    reference = tiktoken_library.Encoding("reference", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert llama3.encode(TEXT).tolist() == reference.encode_ordinary(TEXT)
    assert (llama3.bos_id, llama3.eos_id, llama3.vocab_size) == (128000, 128001, 128256)
    assert isinstance(llama3, Tiktoken)
    # Ids that Meta documents for Llama 3.
    known = {"<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eot_id|>": 128009}
    assert {name: llama3.specials[name] for name in known} == known
    assert llama3.specials["<|reserved_special_token_250|>"] == 128255
    check_round_trip(llama3, TEXT)
    assert llama3.decode([llama3.bos_id, *llama3.encode("hi"), llama3.eos_id]) == "hi"


def test_tiktoken_export_reads_back_as_the_same_tokenizer(llama3: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(llama3.files()["tokenizer.model"])
    again = tokenizer(type="tiktoken", path=str(tmp_path / "tokenizer.model"))
    assert again.fingerprint() == llama3.fingerprint()


def test_huggingface_equals_its_library(bpe_file: Path) -> None:
    subject = tokenizer(type="huggingface", path=str(bpe_file))
    reference = tokenizers_library.Tokenizer.from_file(str(bpe_file))
    plain = TEXT.replace("<|endoftext|>", "")
    assert subject.encode(plain).tolist() == reference.encode(plain).ids
    assert (subject.eos_id, subject.bos_id, subject.vocab_size) == (0, None, 300)
    check_round_trip(subject, TEXT)  # with the special's name inside the text as ordinary text
    folder = tokenizer(type="huggingface", path=str(bpe_file.parent))
    assert folder.fingerprint() == subject.fingerprint()


def test_huggingface_export_reads_back_as_the_same_tokenizer(bpe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(bpe_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|odd|>"}}))
    subject = tokenizer(type="huggingface", path=str(tmp_path))
    assert subject.eos_id == 1  # tokenizer_config.json wins over the habitual name
    files = subject.files()
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert tokenizer(type="huggingface", path=str(tmp_path)).fingerprint() == subject.fingerprint()
    # Other libraries read the file as usual: the name of a special is that special.
    assert 0 in tokenizers_library.Tokenizer.from_str(files["tokenizer.json"].decode()).encode("a<|endoftext|>b").ids


def test_huggingface_counts_bytes_of_a_sentencepiece_style_vocabulary(tmp_path: Path) -> None:
    library = tokenizers_library
    vocabulary = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        **{f"<0x{b:02X}>": 3 + b for b in range(256)},
        "▁": 259,
        "a": 260,
        "▁a": 261,
    }
    backend = library.Tokenizer(library.models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = library.normalizers.Replace(" ", "▁")
    stages = [library.decoders.Replace("▁", " "), library.decoders.ByteFallback(), library.decoders.Fuse()]
    backend.decoder = library.decoders.Sequence(stages)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    subject = tokenizer(type="huggingface", path=str(tmp_path))
    assert (subject.bos_id, subject.eos_id) == (1, 2)
    check_round_trip(subject, "a a é☃")


def test_fingerprint_tells_vocabularies_and_specials_apart(bpe_file: Path, llama3: Tokenizer) -> None:
    by_hand = tokenizer(type="huggingface", path=str(bpe_file), eos="<|odd|>")
    usual = tokenizer(type="huggingface", path=str(bpe_file))
    prints = {one.fingerprint() for one in (by_hand, usual, llama3, raw_bytes())}
    assert len(prints) == 4
    assert raw_bytes().fingerprint() == raw_bytes().fingerprint()


def test_eos_must_be_there(bpe_file: Path, tmp_path: Path) -> None:
    content = bpe_file.read_text().replace("<|endoftext|>", "<|stop-here|>")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.eos") as caught:
        tokenizer(type="huggingface", path=str(tmp_path))
    assert "end-of-text" in str(caught.value)
    assert tokenizer(type="huggingface", path=str(tmp_path), eos="<|stop-here|>").eos_id == 0
    with pytest.raises(ConfigError, match=r'tokenizer\.eos = "<nope>"'):
        tokenizer(type="huggingface", path=str(tmp_path), eos="<nope>")


@pytest.mark.parametrize(
    ("table", "key"),
    [
        (HuggingFace.Config(path="/nowhere/tokenizer.json"), ".path"),
        (HuggingFace.Config(), ".path"),
        (SentencePiece.Config(path="/nowhere/x.model"), ".path"),
        (SentencePiece.Config(), ".path"),
        (Tiktoken.Config(path="/nowhere/x.tiktoken"), ".path"),
        (Tiktoken.Config(), ".path"),
        (Tiktoken.Config(path="/etc/hostname", encoding="gpt2"), ".path"),
        (Tiktoken.Config(encoding="gpt2", pattern="gpt2"), ".pattern"),
    ],
)
def test_problems_are_found_before_anything_is_built(table: Any, key: str) -> None:
    assert [problem.key for problem in table.problems(None, None)] == [key]


def test_problems_leave_hub_names_alone() -> None:
    assert list(HuggingFace.Config(path="org/name").problems(None, None)) == []  # type: ignore[arg-type]
    assert list(HuggingFace.Config(path="gpt2").problems(None, None)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "content", "why"),
    [
        ("huggingface", b"{not json", "tokenizer.json"),
        ("huggingface", b"\xff\xfe", "tokenizer.json"),
        ("sentencepiece", b"garbage", "SentencePiece"),
        ("tiktoken", b"aGk= 0\nbroken\n", "line 2"),
        ("tiktoken", b"aGk= 0\nYQ== 0\n", "same rank"),
        ("tiktoken", b"aGk= 0\nYQ== 1\n", "single bytes"),
    ],
)
def test_damaged_vocabularies_are_named(kind: str, content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / ("tokenizer.json" if kind == "huggingface" else "tokenizer.model")
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.path") as caught:
        tokenizer(type=kind, path=str(path))
    assert why in str(caught.value)
    assert str(path) in str(caught.value)


def test_tiktoken_asks_for_the_pattern_of_an_unknown_file(tekken: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "small.tiktoken"
    path.write_text("".join(f"{token['token_bytes']} {token['rank']}\n" for token in tekken["vocab"][:1000]))
    with pytest.raises(ConfigError, match=r"tokenizer\.pattern"):
        tokenizer(type="tiktoken", path=str(path))
    with pytest.raises(ConfigError, match="regular expression"):
        tokenizer(type="tiktoken", path=str(path), pattern="(")
    subject = tokenizer(type="tiktoken", path=str(path), pattern="gpt2", eos="<|endoftext|>")
    assert subject.eos_id == 50256
    assert tokenizer(type="tiktoken", path=str(path), pattern=r"\S+|\s+", eos="<end>").eos_id == 1000


def test_tiktoken_refuses_an_unknown_encoding() -> None:
    with pytest.raises(ConfigError, match="cl100k_base"):
        tokenizer(type="tiktoken", encoding="cl100k_bas")
