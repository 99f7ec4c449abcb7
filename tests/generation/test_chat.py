"""Conversations against transformers' apply_chat_template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from scripts.train_tokenizer import train_bpe
from tests.hf.checkpoints import save_random
from tests.hf.test_export import model_tables
from titan_lite.config.errors import ConfigError
from titan_lite.data.tokenizer import Bytes, Tokenizer
from titan_lite.generation import Sampling, generate
from titan_lite.generation.chat import Chat
from titan_lite.generation.ends import ends_of
from titan_lite.hf.export import export
from titan_lite.hf.importer import import_folder
from titan_lite.hf.loaded import load_theirs
from titan_lite.pretrained import load_pretrained

CPU = torch.device("cpu")
TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'system' %}{{ raise_exception('no system messages') }}{% endif -%}
<|turn|>{{ message.role }}
{{ message.content | trim }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|turn|>assistant
{% endif %}"""
MESSAGES = [
    {"role": "user", "content": " Hi <|turn|> there "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "What is 2 + 2?"},
]


def write_tokenizer(out: Path) -> Path:
    """A tokenizer as it is published, with a template beside it."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Pipeline

    made = train_bpe(iter(["user assistant Hello, what is 2 + 2? It is 4."] * 3), 280, None)
    pipeline = Pipeline.from_str(made["tokenizer.json"].decode())
    names = ["<|begin|>", "<|turn|>", "<|end|>"]
    pipeline.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    pipeline.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|endoftext|>"}
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("chat"))


def built(path: Path) -> Tokenizer:
    tokenizer: Tokenizer = Tokenizer.Config.choose({"type": "huggingface", "path": str(path)}).build()
    return tokenizer


def test_against_transformers(folder: Path) -> None:
    tokenizer, theirs = built(folder), AutoTokenizer.from_pretrained(folder)
    chat = Chat(tokenizer)
    for n in (1, 3):
        expected = theirs.apply_chat_template(MESSAGES[:n], add_generation_prompt=True, return_dict=False)
        assert chat.ids(MESSAGES[:n]) == expected
    going_on = theirs.apply_chat_template(MESSAGES[:2], continue_final_message=True, tokenize=False)
    assert chat.text(MESSAGES[:2], continued=True) == going_on
    # Elsewhere the names of specials stay ordinary text.
    assert theirs.convert_tokens_to_ids("<|turn|>") not in tokenizer.encode(MESSAGES[0]["content"])


def test_of_several_templates_the_default_one_is_taken(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    named = [{"name": "tool_use", "template": "?"}, {"name": "default", "template": TEMPLATE}]
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Chat(built(tmp_path)).ids(MESSAGES) == Chat(built(folder)).ids(MESSAGES)


def test_an_answer_ends_with_what_the_template_puts_behind_one(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    assert Chat(built(folder)).ends() == {theirs.convert_tokens_to_ids("<|end|>")}


def test_without_a_special_behind_an_answer_the_model_s_end_is_all_there_is(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert Chat(built(tmp_path)).ends() == frozenset()
    assert ends_of(built(tmp_path)) == (built(tmp_path).eos_id,)


def test_without_transformers_nobody_reads_the_template(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_lite.generation.ends.has_transformers", lambda: False)
    assert ends_of(built(folder)) == (built(folder).eos_id,)


def test_ends_are_the_same_there_and_back_again(folder: Path, tmp_path: Path) -> None:
    run = save_random(
        tmp_path / "run", model_tables("llama3"), std=0.2, tokenizer={"type": "huggingface", "path": str(folder)}
    )
    tokenizer = built(folder)
    report = export(run, tmp_path / "hf")
    assert report["verified"]["greedy_equal"]
    config = tmp_path / "hf" / "generation_config.json"
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|end|>")
    assert json.loads(config.read_text())["eos_token_id"] == [tokenizer.eos_id, end]
    assert load_pretrained(run, CPU).ends() == {tokenizer.eos_id, end}

    # As a publisher may list more of them, such as one that the model likes.
    model, prompt, greedy = load_pretrained(run, CPU).model, [1, 2, 3], Sampling(temperature=0)
    said = list(generate(model, prompt, 12, greedy, 0, CPU, tokenizer.vocab_size))
    listed = [end, said[6], tokenizer.eos_id]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": listed}))
    made = load_theirs(tmp_path / "hf").generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0].tolist()
    import_folder(tmp_path / "hf", tmp_path / "back")
    for path in (tmp_path / "hf", tmp_path / "back"):
        loaded = load_pretrained(path, CPU)
        ours = list(generate(loaded.model, prompt, 12, greedy, 0, CPU, tokenizer.vocab_size, loaded.ends()))
        assert [*prompt, *ours, said[6]] == made
    export(tmp_path / "back", tmp_path / "again", verified=False)
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == listed


def test_a_tokenizer_without_a_template_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for tokenizer in (Bytes.Config().build(), built(tmp_path)):
        with pytest.raises(ConfigError, match=r"--chat\n.*needs a chat template, and the tokenizer has none"):
            Chat(tokenizer)


def test_what_the_template_refuses_is_told(folder: Path) -> None:
    with pytest.raises(ConfigError, match="refuses this conversation: no system messages"):
        Chat(built(folder)).ids([{"role": "system", "content": "Be brief."}])
