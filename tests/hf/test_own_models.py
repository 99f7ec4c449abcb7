"""Models that no published architecture is: folders with code of their own, whose generate() and cache work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf.checkpoints import save_random
from tests.hf.test_export import model_tables, same_bits
from titan_lite.generation import Request, Sampling, decode
from titan_lite.hf.export import export
from titan_lite.hf.importer import import_folder
from titan_lite.hf.loaded import load_theirs
from titan_lite.pretrained import load_pretrained

NGPT: dict[str, Any] = {"optimizer": {"weight_decay": 0.0}, "lr_scheduler": {"warmup_steps": 0}}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ngpt": ({"preset": "ngpt"}, NGPT),
    "recurrent": ({"preset": "huginn", "n_layers": 4}, {}),
    "squared scores": ({"preset": "llama3", "attention": {"score": {"type": "relu_squared"}, "kernel": "eager"}}, {}),
    "further tokens": ({"preset": "llama3", "mtp": {"type": "modules", "depth": 2}}, {}),
    "registers": ({"preset": "llama3", "attention": {"registers": {"type": "learned", "n": 2}}}, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    tables, sections = MODELS[name]
    save_random(tmp_path / "run", model_tables(**tables), **sections)
    report = export(tmp_path / "run", tmp_path / "hf")
    assert report["model_type"] == "titan_lite"
    assert report["verified"]["greedy_equal"]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_titan_lite.TitanLiteForCausalLM"
    assert len((tmp_path / "hf" / "modeling_titan_lite.py").read_text().splitlines()) < 10
    depth = 2 if name == "further tokens" else 0
    assert report["mtp_depth"] == depth
    assert ("predicts 2 further tokens" in (tmp_path / "hf" / "README.md").read_text()) == bool(depth)
    if name in ("registers", "further tokens"):
        import_folder(tmp_path / "hf", tmp_path / "back")
        export(tmp_path / "back", tmp_path / "again", verified=False)
        assert same_bits(tmp_path / "hf", tmp_path / "again")
        assert load_pretrained(tmp_path / "hf", torch.device("cpu")).model.mtp.depth == depth


def test_a_memory_that_transformers_lacks_is_named(tmp_path: Path) -> None:
    save_random(tmp_path / "run", model_tables(preset="llama3", memory={"type": "xl", "length": 16}))
    report = export(tmp_path / "run", tmp_path / "hf", verified=False)
    assert (report["model_type"], report["memory"]) == ("llama", "xl")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert 'model.memory.type = "xl"' in card
    assert 'from_pretrained("hf")' in card


@torch.no_grad()
def test_a_model_with_a_memory_reads_what_needs_none(tmp_path: Path) -> None:
    """Up to the length of a segment it is the model that decodes here; a longer text is refused."""
    memory = {"type": "long_term", "length": 16, "segment": 8, "segments": 4, "retrieve": 2}
    tables = model_tables(preset="llama3", memory=memory, head={"bias": True})
    save_random(tmp_path / "run", tables, training={"seq_len": 64})
    report = export(tmp_path / "run", tmp_path / "hf")
    assert (report["model_type"], report["memory"]) == ("titan_lite", "long_term")
    ids, here = prompts()[:1], load_pretrained(tmp_path / "run", torch.device("cpu"))
    assert here.remembers()
    engine = replace(here.engine(), ends=frozenset())
    ours = [token for _, token in decode(engine, [Request(ids[0].tolist(), 40)], Sampling(temperature=0.0))]
    theirs = load_theirs(tmp_path / "hf")
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
    assert theirs.generate(ids, max_new_tokens=40, **options)[0, 12:].tolist() == ours
    with pytest.raises(ValueError, match=r"more than 64 tokens are read in segments \(model.memory.type = 'long_term'"):
        theirs.generate(ids, max_new_tokens=60, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("own")
    save_random(folder / "run", model_tables(**MODELS["registers"][0]))
    export(folder / "run", folder / "hf", verified=False)
    return load_theirs(folder / "hf")


def prompts() -> Tensor:
    return torch.randint(250, (2, 12), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_the_cache_changes_nothing(model: Any) -> None:
    options = {"max_new_tokens": 80, "do_sample": False, "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    assert torch.equal(
        model.generate(prompts(), use_cache=True, **options), model.generate(prompts(), use_cache=False, **options)
    )
    first = model(prompts()[:, :8], use_cache=True)
    rest = model(prompts()[:, 8:], past_key_values=first.past_key_values, use_cache=True)
    whole = model(prompts()).logits
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), dim=1), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(prompts(), logits_to_keep=1).logits, whole[:, -1:], atol=1e-5, rtol=0)
    loss = torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), prompts()[:, 1:].flatten())
    torch.testing.assert_close(model(prompts(), labels=prompts()).loss, loss)


PADDED: dict[str, dict[str, Any]] = {
    "plain causal": {"head": {"bias": True}},
    "reversed": {"attention": {"position": {"type": "rope", "direction": "reversed"}}, "head": {"bias": True}},
    "slopes": {"attention": {"position": "alibi"}},
    "squared scores": {"attention": {"score": {"type": "relu_squared"}, "kernel": "eager"}},
    "windows": {"attention": {"masks": ["causal", {"type": "sliding_window", "window": 4}]}, "head": {"bias": True}},
    "recurrent": {"preset": "huginn", "n_layers": 4, "stack": {"state": "zero"}},
}
PADDED_ATOL = 2e-5
"""fp32: logits of about ten units, the same sums with zeros between."""


def left_padded() -> tuple[Tensor, Tensor]:
    ids, mask = prompts(), torch.ones(2, 12, dtype=torch.long)
    ids[1, :5], mask[1, :5] = 0, 0
    return ids, mask


@pytest.mark.parametrize("name", PADDED)
@torch.no_grad()
def test_rows_padded_on_the_left_are_as_alone(name: str, tmp_path: Path) -> None:
    save_random(tmp_path / "run", model_tables(**{"preset": "llama3"} | PADDED[name]))
    assert export(tmp_path / "run", tmp_path / "hf", verified=False)["model_type"] == "titan_lite"
    model, (ids, mask) = load_theirs(tmp_path / "hf"), left_padded()
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[0], model(ids[:1]).logits[0], rtol=0, atol=PADDED_ATOL)
    torch.testing.assert_close(logits[1, 5:], model(ids[1:, 5:]).logits[0], rtol=0, atol=PADDED_ATOL)
    options = {"max_new_tokens": 16, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[1:, 5:], attention_mask=mask[1:, 5:], **options)
    assert torch.equal(together[1, 5:], alone[0])


def test_positions_that_count_from_the_beginning_refuse_padding(model: Any) -> None:
    ids, mask = left_padded()
    with pytest.raises(ValueError, match=r"which model.attention.registers counts: give one row at a time"):
        model(ids, attention_mask=mask)


@torch.no_grad()
def test_what_these_models_do_not_do_is_refused(model: Any) -> None:
    whole = model(prompts()).logits
    picked = model(prompts(), logits_to_keep=torch.tensor([2, 7])).logits
    torch.testing.assert_close(picked, whole[:, [2, 7]], atol=1e-5, rtol=0)
    positions = torch.arange(12).expand(2, -1)
    assert torch.equal(model(prompts(), position_ids=positions).logits, whole)
    with pytest.raises(ValueError, match="count on from each token to the next"):
        model(prompts(), position_ids=positions % 6)
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=f"{name} is not supported"):
            model(prompts(), **{name: True})


@torch.no_grad()
def test_beams_find_nothing_worse_than_greedy(model: Any) -> None:
    ids = prompts()[:1]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "attention_mask": torch.ones_like(ids), "length_penalty": 0.0}

    def score(**more: Any) -> float:
        tokens = model.generate(ids, do_sample=False, **options, **more)
        logits = model(tokens).logits.log_softmax(-1)[0, 11:-1]
        return float(logits.gather(-1, tokens[0, 12:, None]).sum())

    assert score(num_beams=4) >= score() - 1e-4
