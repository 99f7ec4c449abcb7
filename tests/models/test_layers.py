"""[[model.layers]]: which layers an entry means, what its tables become, and models whose layers differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny import VOCAB, tiny_config, tiny_model
from tests.runs import build_tiny
from titan_lite.config import presets
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict, load_job, to_toml
from titan_lite.generation import KVCache
from titan_lite.models.head.lm import all_logits
from titan_lite.models.layers import selected

ATOL = 1e-5
"""fp32, up to eight layers of width 32."""
WINDOW = [{"type": "causal"}, {"type": "sliding_window", "window": 5}]
HEADS = {"n_heads": 4, "n_kv_heads": 2}


@pytest.mark.parametrize(
    ("at", "numbers"),
    [
        ("3", [3]),
        (3, [3]),
        ("-1", [6]),
        (-7, [0]),
        ("0,5", [0, 5]),
        ("0, 4:6 ,-1", [0, 4, 5, 6]),
        ("5,5,1:3,2", [1, 2, 5]),
        (":", [0, 1, 2, 3, 4, 5, 6]),
        ("1::2", [1, 3, 5]),
        ("5::6", [5]),
        (":100", [0, 1, 2, 3, 4, 5, 6]),
        ("-2:", [5, 6]),
        ("::-3", [0, 3, 6]),
    ],
)
def test_at_is_a_python_slice_or_a_list(at: int | str, numbers: list[int]) -> None:
    assert sorted(selected(at, 7)) == numbers


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("7", "there is no layer 7: the model has 7 layers"),
        ("-8", "there is no layer -8"),
        ("0,9", "there is no layer 9"),
        ("7:", "'7:' selects none of the model's 7 layers"),
        ("3:3", "selects none"),
        ("0,9:12", "'9:12' selects none"),
        ("", "'' is neither"),
        ("1,", "'' is neither"),
        ("one", "'one' is neither the number of a layer nor a slice"),
        ("1:2:3:4", "'1:2:3:4' is neither"),
        ("::0", "'::0' is neither"),
        ("1.5", "'1.5' is neither"),
    ],
)
def test_an_at_without_layers_is_refused(at: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selected(at, 7)


def test_tables_merge_arrays_replace_and_types_replace() -> None:
    wide = HEADS | {"masks": WINDOW, "position": {"type": "rope", "theta": 500.0}}
    layers = [
        {"at": "0", "attention": {"position": {"theta": 7.0}}},
        {"at": "1", "attention": {"masks": ["causal"], "position": "none"}},
        {"at": "2", "ffn": {"type": "mlp"}},
        {"at": "3", "attention": {"position": {"type": "rope"}}, "ffn": {"type": "glu", "activation": "relu"}},
    ]
    found = tiny_config(n_layers=5, attention=wide, layers=layers).each_layer()
    assert [getattr(layer.attention.position, "theta", None) for layer in found] == [7.0, None, 500.0, 500.0, 500.0]
    assert [len(layer.attention.masks) for layer in found] == [2, 1, 2, 2, 2]
    assert [(layer.ffn.type, layer.ffn.hidden) for layer in found if layer.ffn.type == "glu"] == [("glu", 48)] * 4
    assert found[2].ffn == type(found[2].ffn)()  # another type takes nothing over
    assert (found[3].ffn.activation, found[4].ffn.activation) == ("relu", "silu")
    assert {layer.attention.n_kv_heads for layer in found} == {2}


def test_later_entries_win_and_leave_alone_what_they_do_not_name() -> None:
    layers = [
        {"at": ":", "ffn": {"hidden": 8}, "norm": {"eps": 1e-3}},
        {"at": "::2", "ffn": {"activation": "gelu"}},
        {"at": "2", "ffn": {"hidden": 16}},
    ]
    found = [layer.ffn for layer in tiny_config(n_layers=3, layers=layers).each_layer()]
    assert [(ffn.hidden, ffn.activation) for ffn in found] == [(8, "gelu"), (8, "silu"), (16, "gelu")]


FILE = """
[model]
dim = 32
n_layers = 4
attention = { n_heads = 4 }

[[model.layers]]
at = "1::2"
[model.layers.attention]
n_heads = 7
n_kv_hedas = 2
[[model.layers]]
at = "4:"
[[model.layers]]
at = "0"
ffn = { type = "glu", hiden = 3 }
norm = "layernrm"
[model.layers.residual]
type = "pre"
dropout = 2.0
[[model.layers]]
at = "2"
attention = { head_dim = 7 }
"""


def test_errors_name_key_line_and_nearest(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(FILE)
    with pytest.raises(ConfigError) as caught:
        load_job(file)
    found = [(p.code, p.line, p.key, p.nearest) for p in caught.value.problems]
    assert found == [
        ("E005", 10, "model.layers[0].attention.n_heads", ""),
        ("E001", 11, "model.layers[0].attention.n_kv_hedas", "n_kv_heads"),
        ("E003", 13, "model.layers[1].at", ""),
        ("E001", 16, "model.layers[2].ffn.hiden", "hidden"),
        ("E004", 17, "model.layers[2].norm.type", "layernorm"),
        ("E003", 20, "model.layers[2].residual.dropout", ""),
        ("E005", 23, "model.layers[3].attention.head_dim", ""),
    ]
    assert "the model's 4 layers (model.n_layers)" in str(caught.value)
    assert "numbers from 0 to 3" in str(caught.value)


def test_a_key_is_judged_by_the_type_below_it() -> None:
    tables = {"n_layers": 2, "attention": {"position": "none"}, "layers": [{"at": 0, "attention": {"position": {}}}]}
    assert job_from_dict({"model": tables})
    tables["layers"] = [{"at": 0, "attention": {"position": {"theta": 3.0}}}]
    with pytest.raises(ConfigError, match=r'theta = 3\.0\n.*it belongs to type "rope"') as caught:
        job_from_dict({"model": tables})
    (problem,) = caught.value.problems
    assert (problem.key, problem.allowed) == ("model.layers[0].attention.position.theta", "type")


def test_what_is_wrong_everywhere_is_said_once() -> None:
    model = {"n_layers": 2, "attention": {"n_heads": 7}, "layers": [{"at": 0, "attention": {"n_kv_heads": 1}}]}
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"model": model})
    assert [p.key for p in caught.value.problems] == ["model.attention.n_heads"]


def test_an_override_that_is_wrong_only_with_an_earlier_one_is_blamed() -> None:
    layers = [{"at": ":", "attention": {"n_heads": 6}}, {"at": "1", "attention": {"n_kv_heads": 4}}]
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"model": {"dim": 48, "n_layers": 2, "layers": layers}})
    assert [p.key for p in caught.value.problems] == ["model.layers[1].attention.n_kv_heads"]


def test_what_is_wrong_is_said_of_the_entry_that_says_it() -> None:
    layers = [{"at": ":", "ffn": {"hidden": -1}}, {"at": "1", "ffn": {"activation": "relu"}}, {"at": 0, "norm": "l2"}]
    with pytest.raises(ConfigError) as caught:
        job_from_dict({"model": {"n_layers": 2, "layers": layers}})
    assert [p.key for p in caught.value.problems] == ["model.layers[0].ffn.hidden"]


LAYERS = [{"at": "::2", "attention": {"masks": WINDOW}}, {"at": "3", "ffn": {"hidden": 8}, "norm": "layernorm"}]


def test_a_resolved_config_is_an_equal_job_with_whole_tables(tmp_path: Path) -> None:
    job = job_from_dict({"model": {"n_layers": 4, "attention": {"n_heads": 4}, "layers": LAYERS}})
    file = tmp_path / "config.toml"
    file.write_text(to_toml(job))
    again = load_job(file)
    assert again == job
    assert again.model.each_layer() == job.model.each_layer()
    assert again.model.layers[0].at == "0,2"
    assert set(again.model.layers[1].ffn) == set(type(job.model.ffn).model_fields)
    assert job != job_from_dict({"model": {"n_layers": 4, "attention": {"n_heads": 4}, "layers": LAYERS[:1]}})


def test_identity_is_what_layers_are_and_not_how_it_was_said() -> None:
    def identity(layers: list[dict[str, Any]]) -> dict[str, Any]:
        return tiny_config(n_layers=4, layers=layers).identity()

    said = identity(LAYERS)
    assert said == identity([{**LAYERS[0], "at": 0}, LAYERS[1], {**LAYERS[0], "at": "-2"}])
    assert said != identity(LAYERS[:1])
    assert said != identity([{**LAYERS[0], "at": "1::2"}, LAYERS[1]])
    assert identity([{"at": "1", "attention": {"kernel": "eager"}}]) == identity([])
    assert identity([{"at": "1", "ffn": {"hidden": 48}}]) == identity([])


PRESET = """
[model]
attention = { n_heads = 4 }
[[model.layers]]
at = "5::6"
attention = { position = { theta = 1e6 } }
[flavors.small]
dim = 32
n_layers = 6
[flavors.plain]
dim = 32
n_layers = 6
layers = []
"""


def test_a_file_replaces_the_layers_of_its_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "local.toml").write_text(PRESET)
    monkeypatch.setattr(presets, "FOLDER", tmp_path)

    def thetas(flavor: str, *overrides: str, text: str = "") -> list[float]:
        file = tmp_path / "config.toml"
        file.write_text(f'[model]\nname = "local"\nflavor = "{flavor}"\n{text}')
        return [layer.attention.position.theta for layer in load_job(file, overrides).model.each_layer()]

    assert thetas("small") == [1e4] * 5 + [1e6]
    assert thetas("plain") == [1e4] * 6
    text = '[[model.layers]]\nat = "0"\n[model.layers.attention.position]\ntheta = 2.0'
    assert thetas("small", text=text) == [2.0] + [1e4] * 5
    given = '--model.layers=[{ at = "1,2", attention = { position = { theta = 3.0 } } }]'
    assert thetas("small", given, text=text) == [1e4, 3.0, 3.0, 1e4, 1e4, 1e4]
    assert thetas("small", "--model.layers=[]") == [1e4] * 6
    wrong = ["--model.layers=[{ at = 9 }]"]
    with pytest.raises(ConfigError, match=r"command line  model\.layers\[0\]\.at = 9"):
        thetas("small", *wrong)


LLAMA_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "head.output.weight": "lm_head.weight",
    "attention_residual.norm": "input_layernorm",
    "ffn_residual.norm": "post_attention_layernorm",
    "attention.": "self_attn.",
    "ffn.": "mlp.",
    "stack.blocks": "model.layers",
}


def copied_to(reference: torch.nn.Module, model: torch.nn.Module) -> torch.nn.Module:
    """The Hugging Face model with our weights, after drawing new ones."""
    state = {}
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        for ours, theirs in LLAMA_NAMES.items():
            name = name.replace(ours, theirs)
        if ".self_attn." in name:
            name = name.replace(".weight", "_proj.weight").replace(".bias", "_proj.bias")
        elif ".mlp." in name:
            name = name.replace(".weight", "_proj.weight")
        state["model.norm.weight" if name == "norm.weight" else name] = parameter
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([], [])
    return reference.eval()


def test_five_local_layers_to_one_global_as_in_transformers() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = tiny_model(
        n_layers=7,
        attention=HEADS | {"masks": WINDOW, "bias": ["q", "k", "v"]},
        layers=[{"at": "5::6", "attention": {"masks": ["causal"]}}],
    )
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention" if i == 5 else "sliding_attention" for i in range(7)],
        tie_word_embeddings=False,
    )
    reference = copied_to(Qwen2ForCausalLM(config), model)
    tokens = torch.randint(VOCAB, (2, 23))
    torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=ATOL, rtol=0)


def test_no_positions_in_every_fourth_layer_as_in_transformers() -> None:
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    model = tiny_model(n_layers=8, attention=HEADS, layers=[{"at": "3::4", "attention": {"position": "none"}}])
    config = SmolLM3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        no_rope_layer_interval=4,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    assert config.no_rope_layers == [1, 1, 1, 0, 1, 1, 1, 0]
    reference = copied_to(SmolLM3ForCausalLM(config), model)
    tokens = torch.randint(VOCAB, (2, 23))
    torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=ATOL, rtol=0)


MIXED: dict[str, Any] = {
    "n_layers": 4,
    "attention": HEADS | {"masks": WINDOW},
    "layers": [
        {"at": "1", "attention": {"masks": ["causal"], "position": {"theta": 500.0}}},
        {"at": "2", "attention": {"position": "none", "n_heads": 2, "n_kv_heads": 1}, "ffn": {"hidden": 16}},
        {"at": "3", "attention": {"masks": ["causal", "document"]}, "norm": "layernorm", "residual": "post"},
    ],
}


def test_each_layer_is_the_one_of_a_model_that_has_it_everywhere() -> None:
    mixed = tiny_model(**MIXED)
    tokens = torch.randint(VOCAB, (2, 16))
    documents = (torch.arange(16) // 9).expand(2, -1)
    context = mixed.context(tokens, documents)
    x = mixed.embedding(tokens, context)
    for number in range(4):
        entry = {} if number == 0 else {k: v for k, v in MIXED["layers"][number - 1].items() if k != "at"}
        everywhere = tiny_model(n_layers=4, attention=MIXED["attention"], layers=[{"at": ":", **entry}])
        block = everywhere.stack.blocks[str(number)]
        block.load_state_dict(mixed.stack.blocks[str(number)].state_dict())
        only = everywhere.context(tokens, documents)
        x = block(x, only.layer(number, {}))[0]
    logits = mixed.head(mixed.norm(x), mixed.embedding, all_logits)
    torch.testing.assert_close(mixed(tokens, documents), logits, atol=ATOL, rtol=0)


def test_the_cache_decodes_layers_that_differ() -> None:
    model = tiny_model(**MIXED)
    tokens = torch.randint(VOCAB, (2, 16))
    cache, out = KVCache(16), []
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 12), (12, 16)):
        out.append(model(tokens[:, start:stop], memory=cache))
        cache.advance(stop - start)
    torch.testing.assert_close(torch.cat(out, 1), model(tokens), atol=ATOL, rtol=0)


def test_more_kinds_of_layers_than_graphs_that_torch_allows_a_function():
    """Ten layers, each of its own kind, in ten compiled graphs."""
    masks = [["causal", {"type": "sliding_window", "window": 2 + i}] for i in range(10)]
    layers = [{"at": str(i), "attention": {"masks": masks[i]}} for i in range(10)]
    tables = {"model": {"dim": 16, "n_layers": 10, "attention": {"n_heads": 2}, "layers": layers}}
    _, eager = build_tiny(tables)
    _, compiled = build_tiny(tables | {"compile": {"enable": True, "backend": "aot_eager"}})
    tokens = torch.arange(24).view(2, 12)
    torch.testing.assert_close(compiled.model(tokens), eager.model(tokens), rtol=0, atol=1e-6)
