"""Layers of a config: what wins over what, and what a resolved config is."""

from __future__ import annotations

import sys

import pytest

from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict, load_job, to_toml
from titan_lite.config.presets import flavors, preset_names
from titan_lite.config.toml import toml_text
from titan_lite.job import Job

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_an_empty_file_is_all_defaults(write) -> None:
    job = load_job(write(""))
    assert job == Job()
    assert job.warnings == ()
    assert job.tokenizer.type == "bytes"
    assert job.data.source.type == "python_stdlib"
    assert job.job.dump_folder == "./outputs"
    assert not job.checkpoint.last_save_model_only


def test_precedence_command_line_file_base_preset_default(write) -> None:
    write('[model]\nname = "llama3"\nflavor = "8B"\ndim = 1024\nn_layers = 3\nvocab_size = 100', "base.toml")
    file = write('base = "base.toml"\n[model]\nn_layers = 5\nvocab_size = 200')
    job = load_job(file, ["--model.vocab_size=300"])
    assert job.model.vocab_size == 300  # command line over file, base, preset
    assert job.model.n_layers == 5  # file over base, preset
    assert job.model.dim == 1024  # base over preset
    assert job.model.ffn.hidden == 14336  # preset over default
    assert job.model.linear.type == "default"
    origins = {key: job.origin(f"model.{key}") for key in ("vocab_size", "n_layers", "dim")}
    assert {key: (origin.file.split("/")[-1], origin.line) for key, origin in origins.items()} == {
        "vocab_size": ("command line", 0),
        "n_layers": ("config.toml", 3),
        "dim": ("base.toml", 4),
    }
    assert job.origin("model.ffn.hidden").file.endswith("presets/llama3.toml")
    assert job.origin("training.steps") is None


def test_bases_chain_and_are_relative_to_their_file(tmp_path, write) -> None:
    (tmp_path / "sub").mkdir()
    write("[training]\nsteps = 1\nseq_len = 1\nlocal_batch_size = 1", "root.toml")
    write('base = "../root.toml"\n[training]\nsteps = 2\nseq_len = 2', "sub/middle.toml")
    training = load_job(write('base = "sub/middle.toml"\n[training]\nsteps = 3')).training
    assert (training.steps, training.seq_len, training.local_batch_size) == (3, 2, 1)


def test_a_circle_of_bases_is_refused(write) -> None:
    write('base = "b.toml"', "a.toml")
    file = write('base = "a.toml"', "b.toml")
    with pytest.raises(ConfigError, match=r"circle: b\.toml -> a\.toml -> b\.toml"):
        load_job(file)


def test_arrays_replace(write) -> None:
    write('[generation]\nprompts = ["a", "b"]', "base.toml")
    assert load_job(write('base = "base.toml"\n[generation]\nprompts = ["c"]')).generation.prompts == ("c",)


SOURCE = '[data.source]\ntype = "huggingface"\npath = "org/set"\ntext_key = "body"\n'


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        (
            '[data.source]\nsplit = "test"',
            {"type": "huggingface", "path": "org/set", "text_key": "body", "split": "test"},
        ),
        ('[data.source]\ntype = "huggingface"', {"type": "huggingface", "path": "org/set", "text_key": "body"}),
        ('[data]\nsource = "huggingface"', {"type": "huggingface", "path": "org/set", "text_key": "body"}),
        ('[data.source]\ntype = "python_stdlib"', {"type": "python_stdlib"}),
        ('[data]\nsource = "python_stdlib"', {"type": "python_stdlib"}),
        ('[data.source]\ntype = "files"\npath = "x"', {"type": "files", "path": "x", "text_key": "text"}),
    ],
)
def test_another_type_drops_the_keys_of_the_inherited_table(write, over: str, expected: dict[str, str]) -> None:
    write(SOURCE, "base.toml")
    source = load_job(write(f'base = "base.toml"\n{over}'), files=False).data.source.model_dump()
    assert {key: source[key] for key in expected} == expected


def test_naming_the_default_type_keeps_the_keys(write) -> None:
    write("[model.norm]\neps = 1e-3", "base.toml")
    assert load_job(write('base = "base.toml"\n[model.norm]\ntype = "rmsnorm"')).model.norm.eps == 1e-3


# What some families ask of other sections: texts as long as gpt2's positions, nothing that nGPT refuses.
FAMILIES_ASK = """
[training]
seq_len = 1024
[optimizer]
weight_decay = 0.0
[lr_scheduler]
warmup_steps = 0
"""


@pytest.mark.parametrize(("name", "flavor"), [(name, flavor) for name in preset_names() for flavor in flavors(name)])
def test_every_preset_loads_and_writes_itself(write, name: str, flavor: str) -> None:
    job = load_job(write(f'[model]\nname = "{name}"\nflavor = "{flavor}"\n{FAMILIES_ASK}'))
    assert (job.model.name, job.model.flavor) == (name, flavor)
    again = load_job(write(to_toml(job), "resolved.toml"))
    assert again == job
    assert again.warnings == job.warnings


# (dim, layers, heads, key/value heads, FFN width, tied, parameters) of arXiv 2407.21783, table 3, and the model cards.
PUBLISHED = {
    "1B": (2048, 16, 32, 8, 8192, True, 1_235_814_400),
    "3B": (3072, 28, 24, 8, 8192, True, 3_212_749_824),
    "8B": (4096, 32, 32, 8, 14336, False, 8_030_261_248),
    "70B": (8192, 80, 64, 8, 28672, False, 70_553_706_496),
    "405B": (16384, 126, 128, 8, 53248, False, 405_853_388_800),
}


@pytest.mark.parametrize("flavor", PUBLISHED)
def test_llama3_is_the_published_one(flavor: str) -> None:
    model = job_from_dict({"model": {"name": "llama3", "flavor": flavor}}).model
    attention = model.attention
    shape = (model.dim, model.n_layers, attention.n_heads, attention.n_kv_heads, model.ffn.hidden, model.head.tied)
    assert shape == PUBLISHED[flavor][:6]
    width = (attention.head_dim or model.dim // attention.n_heads) * (attention.n_heads + attention.n_kv_heads) * 2
    layer = model.dim * width + 3 * model.dim * model.ffn.hidden + 2 * model.dim
    tables = model.vocab_size * model.dim * (1 if model.head.tied else 2)
    assert model.n_layers * layer + tables + model.dim == PUBLISHED[flavor][6]
    assert (attention.position.theta, model.norm.eps) == (500000.0, 1e-5)


def test_a_preset_without_flavor_is_its_debug_model() -> None:
    model = job_from_dict({"model": {"name": "llama3"}}).model
    assert (model.flavor, model.dim, model.vocab_size) == ("debugmodel", 128, 0)


def test_a_resolved_config_loads_as_an_equal_job(write) -> None:
    job = load_job(
        write('[training]\ndataset = "c4"\nmax_norm = inf\n[lr_scheduler]\ndecay_ratio = 0.1'),
        ['--job.description=quotes " and \\ and\nlines \u2028 é', "--generation.prompts=a,b", "--optimizer.eps=1e-300"],
    )
    again = load_job(write(to_toml(job), "resolved.toml"))
    assert again == job
    assert again != load_job(write("", "empty.toml"))


def test_arrays_of_nested_tables_are_written_as_such() -> None:
    layers = [{"at": "0", "ffn": {"x": 1, "y": {"z": [{"a": 1}, {"b": {}}]}}}, {"n": {}, "e": []}]
    tables = {"model": {"layers": layers, "masks": [{"type": "causal"}], "none": None}, "empty": []}
    text = toml_text(tables)
    assert '[[model.layers]]\nat = "0"\n\n[model.layers.ffn]\nx = 1\n' in text
    assert 'masks = [{ type = "causal" }]' in text
    del tables["model"]["none"]
    assert tomllib.loads(text) == tables


def test_a_config_made_in_python_is_not_touched() -> None:
    tables = {"training": {"batch_size": 2, "dataset": "c4"}}
    assert job_from_dict(tables).training.local_batch_size == 2
    assert tables == {"training": {"batch_size": 2, "dataset": "c4"}}


def test_missing_files_do_not_matter_to_an_estimate(write) -> None:
    file = write('[model]\nhf_assets_path = "/no/such"\n[data.source]\ntype = "files"\npath = "/no/such.txt"')
    assert load_job(file, files=False).tokenizer.type == "huggingface"
    with pytest.raises(ConfigError) as caught:
        load_job(file)
    assert [p.key for p in caught.value.problems] == ["model.hf_assets_path", "data.source.path"]


C4 = {"type": "huggingface", "path": "allenai/c4", "name": "en", "split": "train", "text_key": "text"}


@pytest.mark.parametrize(
    ("base", "file", "overrides", "expected"),
    [
        ("", '[training]\ndataset = "c4"', [], C4),
        ("", '[training]\ndataset = "python_stdlib"', [], {"type": "python_stdlib"}),
        ("", '[training]\ndataset = "hf:org/set"', [], {"type": "huggingface", "path": "org/set", "split": "train"}),
        ("", '[training]\ndataset = "some/*.jsonl.gz"', [], {"type": "files", "path": "some/*.jsonl.gz"}),
        ("", '[training]\ndataset = "c4"\ndataset_path = "/data/c4"', [], {**C4, "path": "/data/c4"}),
        ("", '[training]\ndataset_path = "/data/x.txt"', [], {"type": "files", "path": "/data/x.txt"}),
        ("", '[training]\ndataset = "c4"', ["--training.dataset_path=/data/c4"], {**C4, "path": "/data/c4"}),
        ("", '[training]\ndataset = "c4"\n[data.source]\ntype = "huggingface"', [], C4),
        ("", '[data.source]\ntype = "files"\npath = "x"', ["--training.dataset=c4"], C4),
        ('[training]\ndataset = "c4"', '[data.source]\ntype = "python_stdlib"', [], {"type": "python_stdlib"}),
        (SOURCE + 'data_files = ["x"]', '[training]\ndataset = "c4"', [], {**C4, "data_files": ()}),
        (SOURCE, "", ["--training.dataset=hf:org/other"], {"path": "org/other", "text_key": "text"}),
    ],
)
def test_dataset_is_shorthand_for_a_source(write, base, file, overrides, expected) -> None:
    write(base, "base.toml")
    config = write(f'base = "base.toml"\n{file}')
    job = load_job(config, overrides, files=False)
    source = job.data.source.model_dump()
    assert {key: source[key] for key in expected} == expected
    assert load_job(write(to_toml(job), "resolved.toml"), files=False) == job


def test_the_source_of_the_validation(write) -> None:
    own = load_job(write('[validation]\nenable = true\ndataset = "c4_validation"')).validation.source()
    assert (own.path, own.name, own.split) == ("allenai/c4", "en", "validation")
    assert load_job(write("[validation]\nenable = true")).validation.source() is None
