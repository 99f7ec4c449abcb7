"""A corpus of bad configs: for each, exactly the problems (code, line, key) that it has, all at once."""

from __future__ import annotations

import pytest

from titan_lite.config.errors import ConfigError
from titan_lite.config.load import load_job

Found = list[tuple[str, int, str]]

CASES: dict[str, tuple[str, Found]] = {
    "unknown section": ("[trainin]\nx = 1", [("E001", 1, "trainin")]),
    "unknown root key": ("steps = 1", [("E001", 1, "steps")]),
    "unknown key": ("[training]\nstepz = 1", [("E001", 2, "training.stepz")]),
    "unknown key in a slot": ("[model.norm]\nepz = 1e-5", [("E001", 2, "model.norm.epz")]),
    "unknown keys, all of them": (
        "[training]\na = 1\n[metrics]\nb = 2\nc = 3",
        [("E001", 2, "training.a"), ("E001", 4, "metrics.b"), ("E001", 5, "metrics.c")],
    ),
    "string for int": ('[training]\nsteps = "ten"', [("E002", 2, "training.steps")]),
    "float for int": ("[training]\nsteps = 1e3", [("E002", 2, "training.steps")]),
    "bool for int": ("[training]\nsteps = true", [("E002", 2, "training.steps")]),
    "int for bool": ("[checkpoint]\nenable = 1", [("E002", 2, "checkpoint.enable")]),
    "int for string": ("[job]\ndescription = 1", [("E002", 2, "job.description")]),
    "table for int": ("[training]\nsteps = {a = 1}", [("E002", 2, "training.steps")]),
    "value for table": ("training = 3", [("E002", 1, "training")]),
    "value for slot": ("[model]\nnorm = 3", [("E002", 2, "model.norm")]),
    "date": ("[training]\nsteps = 2026-01-01", [("E002", 2, "training.steps")]),
    "int in a list of strings": ('[generation]\nprompts = ["a", 1]', [("E002", 2, "generation.prompts[1]")]),
    "sampling that draws nothing": (
        '[generation]\nprompts = ["a"]\ntemperature = 0.0\ntop_k = 5\nrepetition_penalty = 1.2\nmin_p = 0.1',
        [("E005", 4, "generation.top_k"), ("E005", 6, "generation.min_p")],
    ),
    "neither member of a union": ("[data.source]\ntype = 'files'\npath = 3", [("E002", 3, "data.source.path")]),
    "determinism check": (
        '[activation_checkpoint]\ndeterminism_check = "of course"',
        [("E003", 2, "activation_checkpoint.determinism_check")],
    ),
    "zero steps": ("[training]\nsteps = 0", [("E003", 2, "training.steps")]),
    "lr zero": ("[optimizer]\nlr = 0.0", [("E003", 2, "optimizer.lr")]),
    "lr infinite": ("[optimizer]\nlr = inf", [("E003", 2, "optimizer.lr")]),
    "lr nan": ("[optimizer]\nlr = nan", [("E003", 2, "optimizer.lr")]),
    "infinite numbers": (
        "[optimizer]\neps = inf\n[model]\ninit = {std = inf, cutoff = inf}\nnorm = {eps = inf}\n"
        "attention = {position = {theta = inf}}",
        [
            ("E003", 2, "optimizer.eps"),
            ("E003", 4, "model.init.std"),
            ("E003", 4, "model.init.cutoff"),
            ("E003", 5, "model.norm.eps"),
            ("E003", 6, "model.attention.position.theta"),
        ],
    ),
    "norm nan": ("[training]\nmax_norm = nan", [("E003", 2, "training.max_norm")]),
    "beta one": ("[optimizer]\nbeta2 = 1.0", [("E003", 2, "optimizer.beta2")]),
    "not a choice": ('[training]\ndtype = "float16"', [("E003", 2, "training.dtype")]),
    "keep one checkpoint": ("[checkpoint]\nkeep_latest_k = 1", [("E003", 2, "checkpoint.keep_latest_k")]),
    "interval zero": ("[checkpoint]\ninterval = 0", [("E003", 2, "checkpoint.interval")]),
    "global batch zero": ("[training]\nglobal_batch_size = 0", [("E003", 2, "training.global_batch_size")]),
    "shard degree zero": (
        "[parallelism]\ndata_parallel_shard_degree = 0",
        [("E003", 2, "parallelism.data_parallel_shard_degree")],
    ),
    "control characters": ('[job]\ndump_folder = "a\\u001bb"', [("E003", 2, "job.dump_folder")]),
    "empty folder": ('[job]\ndump_folder = ""', [("E003", 2, "job.dump_folder")]),
    "selective option": (
        '[activation_checkpoint]\nselective_ac_option = "0"',
        [("E003", 2, "activation_checkpoint.selective_ac_option")],
    ),
    "no components to compile": ("[compile]\ncomponents = []", [("E003", 2, "compile.components")]),
    "component to compile": ('[compile]\ncomponents = ["modle"]', [("E003", 2, "compile.components[0]")]),
    "unknown dataset": ('[training]\ndataset = "c5"', [("E003", 2, "training.dataset")]),
    "unknown validation dataset": (
        '[validation]\nenable = true\ndataset = "c5"',
        [("E003", 3, "validation.dataset")],
    ),
    "unknown type": ('[model.norm]\ntype = "layernrm"', [("E004", 2, "model.norm.type")]),
    "unknown type by its bare name": ('[model]\nnorm = "layernrm"', [("E004", 2, "model.norm.type")]),
    "type of the wrong type": ("[model.norm]\ntype = 3", [("E004", 2, "model.norm.type")]),
    "unknown optimizer": ('[optimizer]\nname = "Adan"', [("E004", 2, "optimizer.type")]),
    "type missing": ("[model.attention]\nmasks = [{}]", [("E010", 2, "model.attention.masks[0].type")]),
    "masks without causal": (
        '[model.attention]\nmasks = [{type = "document"}]',
        [("E005", 2, "model.attention.masks")],
    ),
    "vocabulary smaller than the tokenizer's": ("[model]\nvocab_size = 255", [("E005", 2, "model.vocab_size")]),
    "heads do not divide": ("[model.attention]\nn_heads = 7", [("E005", 2, "model.attention.n_heads")]),
    "dataset and another source": (
        '[training]\ndataset = "c4"\n[data.source]\ntype = "files"',
        [("E005", 2, "training.dataset")],
    ),
    "trace longer than its interval": (
        "[profiling]\nenable_profiling = true\nprofile_freq = 3",
        [("E005", 3, "profiling.profile_freq")],
    ),
    "workers that are not there": (
        "[training.dataloader]\npersistent_workers = true\nprefetch_factor = 2",
        [("E005", 2, "training.dataloader.persistent_workers"), ("E005", 3, "training.dataloader.prefetch_factor")],
    ),
    "wider than the weights": (
        '[training]\ndtype = "bfloat16"\nmixed_precision_param = "float32"',
        [("E005", 3, "training.mixed_precision_param")],
    ),
    "old and new spelling": (
        "[training]\nbatch_size = 1\nlocal_batch_size = 1",
        [("E005", 2, "training.batch_size")],
    ),
    "no such files": ('[data.source]\ntype = "files"\npath = "/no/such"', [("E006", 3, "data.source.path")]),
    "no such files by shorthand": ('[training]\ndataset = "/no/such.txt"', [("E006", 2, "data.source.path")]),
    "no such assets": ('[model]\nhf_assets_path = "/no/such"', [("E006", 2, "model.hf_assets_path")]),
    "no such checkpoint": (
        '[checkpoint]\nenable = true\ninitial_load_path = "/no/such"',
        [("E006", 3, "checkpoint.initial_load_path")],
    ),
    "no such base": ('base = "other.toml"', [("E006", 1, "base")]),
    "base of the wrong type": ("base = 1", [("E002", 1, "base")]),
    "its own base": ('base = "config.toml"', [("E009", 1, "base")]),
    "unknown preset": ('[model]\nname = "lama3"', [("E008", 2, "model.name")]),
    "unknown flavor": ('[model]\nname = "llama3"\nflavor = "9B"', [("E008", 3, "model.flavor")]),
    "flavor without name": ('[model]\nflavor = "8B"', [("E005", 2, "model.flavor")]),
    "tensor parallel": (
        "[training]\nseq_len = 7\n[parallelism]\ntensor_parallel_degree = 2",
        [("E005", 2, "training.seq_len")],
    ),
    "memory budget": ('[activation_checkpoint]\nmode = "memory_budget"', [("E005", 2, "activation_checkpoint.mode")]),
    "converters": ('[model]\nconverters = ["quantize.grouped_mm.float8"]', [("E011", 2, "model.converters")]),
    "converter": ('[model]\nconverters = ["float9"]', [("E003", 2, "model.converters")]),
    "step in backward": (
        "[optimizer]\nearly_step_in_backward = true",
        [("E011", 2, "optimizer.early_step_in_backward")],
    ),
    "Hugging Face checkpoint": (
        "[checkpoint]\nenable = true\ninitial_load_in_hf_quantized = true",
        [("E005", 3, "checkpoint.initial_load_in_hf_quantized")],
    ),
    "not TOML": ("[training]\nsteps = = 3", [("E007", 2, "")]),
    "value missing at the end": ("[training]\n\nsteps =", [("E007", 3, "")]),
    "key twice": ("[training]\nsteps = 3\nsteps = 4", [("E007", 3, "")]),
    "table twice": ("[training]\n[metrics]\n[training]", [("E007", 3, "")]),
    "nested too deep": ("x = " + "[" * 5000 + "]" * 5000, [("E007", 1, "")]),
    "nested too deep for us": ("a = 1\nx = " + "[" * 150 + "]" * 150, [("E007", 2, "")]),
    "tables too deep": ("a = 1\n[" + ".".join("t" * 200) + "]", [("E007", 2, "")]),
    "too many digits": ("[training]\nsteps = " + "9" * 5000, [("E007", 1, "")]),
    "schema and cross-field together": (
        "[training]\nstepz = 1\n[model.attention]\nn_heads = 7\n[optimizer]\nlr = -1.0",
        [("E001", 2, "training.stepz"), ("E005", 4, "model.attention.n_heads"), ("E003", 6, "optimizer.lr")],
    ),
}


@pytest.mark.parametrize(("text", "expected"), CASES.values(), ids=CASES)
def test_problems_of_a_bad_config(write, text: str, expected: Found) -> None:
    file = write(text)
    with pytest.raises(ConfigError) as caught:
        load_job(file)
    problems = caught.value.problems
    assert [(p.code, p.line, p.key) for p in problems] == expected
    assert all(p.file == str(file) for p in problems)


BYTES: dict[str, tuple[bytes, int]] = {
    "byte order mark": (b"\xef\xbb\xbf[training]\n", 1),
    "Latin-1": ("[job]\ndescription = 'Füße'".encode("latin-1"), 2),
    "too large": (b"#" * ((1 << 20) + 1), 1),
    "NUL": (b"[job]\n\ndescription = 'a\x00b'", 3),
    "lone carriage return": (b"[job]\r[training]", 1),
}


@pytest.mark.parametrize(("content", "line"), BYTES.values(), ids=BYTES)
def test_files_that_are_not_toml(write, content: bytes, line: int) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(write(content))
    assert [(p.code, p.line) for p in caught.value.problems] == [("E007", line)]


def test_windows_line_ends_are_toml(write) -> None:
    job = load_job(write(b"[training]\r\nsteps = 3\r\n"))
    assert (job.training.steps, job.origin("training.steps").line) == (3, 2)


@pytest.mark.parametrize("path", ["missing.toml", "."])
def test_a_config_that_cannot_be_read(tmp_path, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(tmp_path / path)
    assert [(p.code, p.key) for p in caught.value.problems] == [("E006", "config file")]


NEAREST = {
    "[training]\nstepz = 1": "steps",
    "[model.attention]\nn_hedas = 1": "n_heads",
    "[trainig]\nsteps = 1": "training",
    "[training]\nlr = 1.0": "optimizer.lr",
    '[model.norm]\ntype = "rmsnrm"': "rmsnorm",
    '[training]\ndtype = "bfloat"': "bfloat16",
    '[model]\nname = "llama4"': "llama3",
    '[model]\nname = "llama3"\nflavor = "8b"': "8B",
    '[training]\ndataset = "c4_tst"': "c4_test",
}


@pytest.mark.parametrize(("text", "nearest"), NEAREST.items(), ids=NEAREST)
def test_the_nearest_name_is_offered(write, text: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(write(text))
    assert [p.nearest for p in caught.value.problems] == [nearest]
    assert f"did you mean `{nearest}`?" in str(caught.value)


def test_a_key_of_another_type_is_explained(write) -> None:
    with pytest.raises(ConfigError, match='it belongs to type "huggingface"'):
        load_job(write('[data.source]\ntype = "files"\npath = "."\nsplit = "x"'), files=False)


def test_what_a_problem_says(write) -> None:
    file = write("[optimizer]\nbeta1 = 1.5")
    with pytest.raises(ConfigError) as caught:
        load_job(file)
    assert (
        str(caught.value) == f"E003  {file}:2  optimizer.beta1 = 1.5\n    is out of range\n    allowed: 0 <= value < 1"
    )


def test_defaults_that_stand_in_for_broken_values_are_not_blamed(write) -> None:
    text = '[profiling]\nenable_profiling = true\nprofiler_warmup = "1"\nprofile_freq = 3'
    with pytest.raises(ConfigError) as caught:
        load_job(write(text))
    assert [p.key for p in caught.value.problems] == ["profiling.profiler_warmup"]
