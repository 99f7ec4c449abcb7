"""torchtitan's files: v0.2.2's Llama 3 8B unchanged, and the spellings of older releases."""

from __future__ import annotations

from pathlib import Path

import pytest

from titan_lite.config.aliases import our_name
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict, load_job, to_toml
from titan_lite.config.paths import get

LLAMA3_8B = Path(__file__).parent / "data" / "llama3_8b.toml"


def test_llama3_8b_is_read_unchanged(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assets = tmp_path / "assets/hf/Llama-3.1-8B"
    assets.mkdir(parents=True)
    (assets / "tokenizer.json").write_text("{}")
    job = load_job(LLAMA3_8B, world_size=64)
    assert job.warnings == ()
    assert (job.model.dim, job.model.n_layers, job.model.ffn.hidden, job.model.vocab_size) == (4096, 32, 14336, 128256)
    assert (job.model.attention.n_heads, job.model.attention.n_kv_heads) == (32, 8)
    assert (job.optimizer.type, job.optimizer.lr, job.optimizer.eps) == ("adamw", 3e-4, 1e-8)
    assert (job.lr_scheduler.warmup_steps, job.lr_scheduler.decay_ratio) == (200, None)
    assert (job.training.local_batch_size, job.training.seq_len, job.training.steps) == (1, 8192, 1000)
    assert (job.data.source.path, job.data.source.name, job.data.source.split) == ("allenai/c4", "en", "train")
    assert (job.tokenizer.type, job.tokenizer.path) == ("huggingface", "assets/hf/Llama-3.1-8B/tokenizer.json")
    assert (job.activation_checkpoint.mode, job.activation_checkpoint.selective_ac_option) == ("selective", "op")
    assert job.quantize.linear.float8.filter_fqns == ("head",)
    assert job.checkpoint.last_save_model_only
    assert (job.validation.steps, job.validation.freq) == (1200, 500)
    assert job.metrics.enable_tensorboard
    assert job.profiling.save_traces_folder == "profile_trace"
    assert job.parallelism.data_parallel_degree(64) == 64


def test_llama3_8b_without_its_assets_has_one_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(LLAMA3_8B)
    assert [(p.code, p.key, p.line) for p in caught.value.problems] == [("E006", "model.hf_assets_path", 18)]
    assert load_job(LLAMA3_8B, files=False).model.dim == 4096


# old key, old value, key of today, value of today
OLD = [
    ("training.batch_size", 3, "training.local_batch_size", 3),
    ("training.compile", True, "compile.enable", True),
    ("training.warmup_steps", 3, "lr_scheduler.warmup_steps", 3),
    ("training.seed", 7, "debug.seed", 7),
    ("training.deterministic", True, "debug.deterministic", True),
    ("training.data_parallel_replicate_degree", 2, "parallelism.data_parallel_replicate_degree", 2),
    ("checkpoint.enable_checkpoint", True, "checkpoint.enable", True),
    ("checkpoint.model_weights_only", True, "checkpoint.last_save_model_only", True),
    ("float8.emulate", True, "quantize.linear.float8.emulate", True),
    ("float8.filter_fqns", "output, layers.0", "quantize.linear.float8.filter_fqns", ("head", "stack.blocks.0")),
    ("mx.recipe_name", "mxfp8_emulated", "quantize.linear.mx.recipe_name", "mxfp8_emulated"),
    ("lr_scheduler.lr_min", 0.1, "lr_scheduler.min_lr_factor", 0.1),
    ("experimental.context_parallel_degree", 1, "parallelism.context_parallel_degree", 1),
    ("experimental.enable_async_tensor_parallel", True, "parallelism.enable_async_tensor_parallel", True),
    ("compile.components", "loss", "compile.components", ("loss",)),
    ("checkpoint.exclude_from_loading", "optimizer", "checkpoint.exclude_from_loading", ("optimizer",)),
]


@pytest.mark.parametrize(("old", "value", "new", "expected"), OLD, ids=[case[0] for case in OLD])
def test_an_old_spelling_acts_and_is_said_once(write, old, value, new, expected) -> None:
    section, _, key = old.rpartition(".")
    text = f'"{value}"' if isinstance(value, str) else str(value).lower()
    job = load_job(write(f"[{section}]\n{key} = {text}"))
    assert get(job.model_dump(), tuple(new.split("."))) == expected
    assert sum("is an old spelling" in line for line in job.warnings) in ({1, 2} if key == "filter_fqns" else {1})
    assert job.origin(new).line in (1, 2)
    again = load_job(write(to_toml(job), "resolved.toml"))
    assert again == job
    assert again.warnings == ()


def test_names_of_optimizers_are_read_whatever_their_case() -> None:
    for name in ("AdamW", "adamw"):
        job = job_from_dict({"optimizer": {"name": name, "beta2": 0.9}})
        assert (job.optimizer.type, job.optimizer.beta2, job.warnings) == ("adamw", 0.9, ())


def test_tokenizer_path_of_an_old_file(tmp_path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_text("IQ== 0\n")
    job = job_from_dict({"model": {"tokenizer_path": str(file)}})
    assert (job.tokenizer.type, job.tokenizer.path) == ("tiktoken", str(file))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("output", "head"),
        ("tok_embeddings", "embedding"),
        ("layers.3", "stack.blocks.3"),
        ("layers.3.attention.wq", "stack.blocks.3.attention.q"),
        ("layers.0.feed_forward.w2", "stack.blocks.0.ffn.down"),
        ("stack.blocks.3.attention.q", "stack.blocks.3.attention.q"),
        ("auto_filter_small_kn", "auto_filter_small_kn"),
    ],
)
def test_torchtitans_parameter_names(theirs: str, ours: str) -> None:
    assert our_name(theirs) == ours


NOT_HONOURED = {
    "fault_tolerance.enable": True,
    "experimental.custom_import": "x.y",
    "experimental.custom_args_module": "x.y",
    "job.custom_config_module": "x.y",
    "job.save_config_file": "x.toml",
    "job.config_file": "x.toml",
    "comm.mode": "fake_backend",
    "memory_estimation.enable": True,
    "checkpoint.create_seed_checkpoint": True,
}


@pytest.mark.parametrize("key", NOT_HONOURED)
def test_what_is_not_honoured_is_said_once(key: str) -> None:
    section, name = key.split(".")
    warnings = job_from_dict({section: {name: NOT_HONOURED[key]}}).warnings
    assert len(warnings) == 1
    assert warnings[0].startswith(key)


def test_c4_test_is_replaced_with_a_word() -> None:
    job = job_from_dict({"training": {"dataset": "c4_test"}})
    assert job.data.source.type == "python_stdlib"
    assert ["c4_test" in line for line in job.warnings] == [True]
