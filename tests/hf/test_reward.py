"""Reward heads become transformers' classifiers of whole texts, and come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.hf.checkpoints import save_random
from tests.hf.test_export import FIRST, model_tables, same_bits, tokenizer_for
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.hf.errors import ConversionError
from titan_lite.hf.export import export
from titan_lite.hf.fill import fill, opened
from titan_lite.hf.importer import import_folder
from titan_lite.pretrained import load_pretrained

ATOL = 1e-4
"""fp32, weights only moved."""
FOLDED = 1e-3
"""fp32, weights multiplied."""
LINEAR = {"head": {"reward": {"type": "linear"}}}
CPU = torch.device("cpu")
TEXTS = ("a", "def f(x):\n    return x", "Größe")


def with_reward(preset: str, flavor: str = "", **changes: Any) -> dict[str, Any]:
    head = changes.pop("head", {}) | LINEAR["head"]
    return model_tables(preset, flavor, **changes, head=head)


def our_reward(run: Path, ids: list[int]) -> float:
    """Of one text alone: the state at its last token times the head's vector."""
    model = load_pretrained(run, CPU).model
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, args, result: seen.append(result))
    with torch.no_grad():
        model(torch.tensor([ids]))
        (states,), bias = seen, model.head.reward.bias
        return float(states[0, -1] @ model.head.reward.weight[0]) + (0.0 if bias is None else float(bias))


def their_rewards(folder: Path, **options: Any) -> Tensor:
    """Of all texts in one batch, as a user gets them: tokenizer, padding, end of text, classifier."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([text + tokenizer.eos_token for text in TEXTS], padding=True, return_tensors="pt", **options)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        rewards: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert rewards.shape == (len(TEXTS), 1)
    return rewards[:, 0]


def wanted(run: Path) -> Tensor:
    return torch.tensor([our_reward(run, [0xFE, *text.encode(), 0xFF]) for text in TEXTS])


@pytest.mark.parametrize(
    "model_type", ["llama", "gemma3_text", "gpt2", "gpt_neox", "opt", "olmo2", "mixtral", "gpt_oss"]
)
def test_there_and_back(model_type: str, tmp_path: Path) -> None:
    preset, flavor, changes = FIRST[model_type]
    tables = with_reward(preset, flavor, **changes)
    save_random(tmp_path / "run", tables, tokenizer=tokenizer_for(model_type, tmp_path / "tokenizer"))
    report = export(tmp_path / "run", tmp_path / "hf")
    assert (report["model_type"], report["reward_class"][-25:]) == (model_type, "ForSequenceClassification")
    assert report["verified"]["max_reward_difference"] < ATOL
    torch.testing.assert_close(their_rewards(tmp_path / "hf"), wanted(tmp_path / "run"), rtol=0, atol=ATOL)
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    job = import_folder(tmp_path / "hf", tmp_path / "back")
    assert job.model.head.reward.scores
    export(tmp_path / "back", tmp_path / "again", verified=False)
    assert same_bits(tmp_path / "hf", tmp_path / "again")


FOLDS: dict[str, tuple[str, dict[str, Any]]] = {
    "admin": ("opt", {"residual": {"type": "admin", "start": "closed_form"}}),
    "factor of the logits, tied": (
        "llama3",
        {"head": {"tied": True, "logit_scale": {"type": "constant", "value": 0.25}}},
    ),
    "rezero": ("llama3", {"residual": {"scale": {"type": "rezero"}}}),
    "narrow rows, tied": ("llama3", {"embedding": {"type": "low_rank", "width": 24}, "head": {"tied": True}}),
}


@pytest.mark.parametrize("name", FOLDS)
def test_what_is_folded_for_the_logits_leaves_rewards_as_they_are(name: str, tmp_path: Path) -> None:
    preset, changes = FOLDS[name]
    save_random(tmp_path / "run", with_reward(preset, **changes))
    report = export(tmp_path / "run", tmp_path / "hf")
    assert report["model_type"] != "titan_lite"
    assert len(report["folds"]) == 1
    assert report["verified"]["max_reward_difference"] < FOLDED
    torch.testing.assert_close(their_rewards(tmp_path / "hf"), wanted(tmp_path / "run"), rtol=0, atol=FOLDED)


OWN: dict[str, dict[str, Any]] = {
    "a bias": {"preset": "llama3", "head": {"reward": {"type": "linear", "bias": True}}},
    "registers": {"preset": "llama3", "attention": {"registers": {"type": "learned", "n": 2}}, **LINEAR},
}


@pytest.mark.parametrize("name", OWN)
def test_other_models_are_classifiers_by_code_of_their_own(name: str, tmp_path: Path) -> None:
    save_random(tmp_path / "run", model_tables(**OWN[name]))
    report = export(tmp_path / "run", tmp_path / "hf")
    assert (report["model_type"], report["reward_class"]) == ("titan_lite", "TitanLiteForSequenceClassification")
    assert report["verified"]["max_reward_difference"] < ATOL
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    code = "modeling_titan_lite.TitanLiteForSequenceClassification"
    assert config["auto_map"]["AutoModelForSequenceClassification"] == code
    for side in ("right", "left") if name == "a bias" else ("right",):  # registers see where a text begins
        rewards = their_rewards(tmp_path / "hf", padding_side=side)
        torch.testing.assert_close(rewards, wanted(tmp_path / "run"), rtol=0, atol=ATOL)
    import_folder(tmp_path / "hf", tmp_path / "back")
    export(tmp_path / "back", tmp_path / "again", verified=False)
    assert same_bits(tmp_path / "hf", tmp_path / "again")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run` and `hf`, of a llama with a reward head."""
    folder = tmp_path_factory.mktemp("reward")
    save_random(folder / "run", with_reward("llama3"))
    export(folder / "run", folder / "hf", verified=False)
    return folder


def test_block_by_block(exported: Path, tmp_path: Path) -> None:
    report = export(exported / "run", tmp_path / "hf", method="by_block")
    assert report["verified"]["max_reward_difference"] < ATOL


def test_the_card_says_how_to_load_it(exported: Path) -> None:
    card = (exported / "hf" / "README.md").read_text()
    assert "from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer" in card
    assert "of texts that end with token 255" in card


def changed(folder: Path, copy: Path, score: Tensor | None) -> Path:
    """The folder with another `score.weight`, or none."""
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("score.weight")
    save_file(
        tensors | ({} if score is None else {"score.weight": score}), copy / "model.safetensors", {"format": "pt"}
    )
    return copy


def test_a_score_that_is_not_what_was_trained_is_found(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import titan_lite.hf.export as module

    def spoiled(folder: Path, *args: Any) -> Any:
        written = write_shards(folder, *args)
        tensors = load_file(folder / "model.safetensors")
        tensors["score.weight"][0, 3] += 1e-3
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return written

    write_shards = module.write_shards
    monkeypatch.setattr(module, "write_shards", spoiled)
    with pytest.raises(ConversionError, match=r"1 tensors are not what the checkpoint makes, such as score.weight"):
        export(exported / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_classifier_of_several_classes_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = changed(exported / "hf", tmp_path / "hf", torch.zeros(3, 128))
    with pytest.raises(ConfigError, match=r"score.weight\n    has 3 rows: it tells 3 classes apart"):
        import_folder(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_run_adds_a_reward_head_to_a_published_model(exported: Path, tmp_path: Path) -> None:
    """Its vector starts anew where the config says so; that of a folder that has one is taken, and never left out."""
    plain = changed(exported / "hf", tmp_path / "plain", None)
    job = job_from_dict({"model": with_reward("llama3"), "training": {"seq_len": 128}}, files=False)
    model = job.model.build(vocab_size=256)
    tensors = {f"model.{name}": p for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=r'exclude_from_loading = \["model.head.reward"\]'):
        fill(opened(plain, job.model), tensors)
    rest = {name: tensor for name, tensor in tensors.items() if "head.reward" not in name}
    fill(opened(plain, job.model), rest)
    there = load_pretrained(exported / "run", CPU).model
    assert torch.equal(model.head.output.weight, there.head.output.weight)
    assert not torch.equal(model.head.reward.weight, there.head.reward.weight)
    fill(opened(exported / "hf", job.model), tensors)
    assert torch.equal(model.head.reward.weight, there.head.reward.weight)
    without = job_from_dict({"model": model_tables("llama3"), "training": {"seq_len": 128}}, files=False)
    with pytest.raises(ConfigError, match="would leave out the reward head"):
        opened(exported / "hf", without.model)


def test_a_model_without_rewards_is_no_classifier(tmp_path: Path) -> None:
    save_random(tmp_path / "run", model_tables("llama3", attention={"registers": {"type": "learned", "n": 2}}))
    assert export(tmp_path / "run", tmp_path / "hf", verified=False)["reward_class"] == ""
    with pytest.raises(ValueError, match="has no reward head"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
