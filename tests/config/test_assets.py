"""model.hf_assets_path chooses the tokenizer, and what happens where [tokenizer] does too."""

from __future__ import annotations

from pathlib import Path

import pytest

from titan_lite.config.errors import ConfigError
from titan_lite.config.load import load_job, to_toml


@pytest.mark.parametrize(
    ("name", "content", "chosen", "path"),
    [
        ("tokenizer.json", b"{}", "huggingface", "tokenizer.json"),
        ("original/tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken", "original/tokenizer.model"),
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\x00", "sentencepiece", "tokenizer.model"),
    ],
)
def test_assets_choose_the_tokenizer(tmp_path, write, name, content, chosen, path) -> None:
    assets = tmp_path / "assets"
    (assets / name).parent.mkdir(parents=True)
    (assets / name).write_bytes(content)
    for given in (assets, assets / name):
        tokenizer = load_job(write(f'[model]\nhf_assets_path = "{given}"')).tokenizer
        assert (tokenizer.type, tokenizer.path) == (chosen, str(assets / path))


def test_assets_without_a_tokenizer(tmp_path, write) -> None:
    with pytest.raises(ConfigError, match="the folder holds no tokenizer"):
        load_job(write(f'[model]\nhf_assets_path = "{tmp_path}"'))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The assets of a published model: both of its tokenizer's forms."""
    folder = tmp_path / "assets"
    (folder / "original").mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "original/tokenizer.model").write_text("IQ== 0\n")
    return folder


@pytest.mark.parametrize("tokenizer", ['"bytes"', '{type = "tiktoken", path = "/other/tokenizer.model"}'])
def test_two_meanings_in_one_file_are_refused(write, folder, tokenizer: str) -> None:
    file = write(f'tokenizer = {tokenizer}\n[model]\nhf_assets_path = "{folder}"')
    with pytest.raises(ConfigError, match=r"model\.hf_assets_path(.|\n)*tokenizer\.(type|path)") as caught:
        load_job(file)
    assert [(p.code, p.line, p.key) for p in caught.value.problems] == [("E005", 3, "model.hf_assets_path")]


@pytest.mark.parametrize(
    ("more", "chosen", "path", "eos"),
    [
        ('eos = "E"', "huggingface", "tokenizer.json", "E"),
        ('type = "huggingface"', "huggingface", "tokenizer.json", ""),
        ('type = "tiktoken"\npath = "FOLDER/original/tokenizer.model"', "tiktoken", "original/tokenizer.model", ""),
    ],
)
@pytest.mark.parametrize("apart", [False, True])
def test_a_tokenizer_table_may_say_more_about_the_assets(write, folder, more, chosen, path, eos, apart: bool) -> None:
    low, high = f'[model]\nhf_assets_path = "{folder}"\n', f"[tokenizer]\n{more.replace('FOLDER', str(folder))}\n"
    write(low, "base.toml")
    job = load_job(write('base = "base.toml"\n' + high if apart else low + high))
    tokenizer = job.tokenizer
    assert (tokenizer.type, tokenizer.path, tokenizer.eos) == (chosen, str(folder / path), eos)
    assert (job.model.hf_assets_path, job.warnings) == (str(folder), ())


def test_assets_win_over_the_tokenizer_of_the_base(write, folder) -> None:
    """A child of debug.toml with a published model's assets does not train on bytes."""
    child = f'[model]\nname = "llama3"\nflavor = "8B"\nhf_assets_path = "{folder}"'
    for table in ('type = "bytes"', 'type = "huggingface"\npath = "/other/tokenizer.json"\neos = "E"'):
        write(f"[tokenizer]\n{table}", "base.toml")
        job = load_job(write(f'base = "base.toml"\n{child}'))
        expected = {"type": "huggingface", "path": str(folder / "tokenizer.json"), "eos": ""}
        assert {key: getattr(job.tokenizer, key) for key in expected} == expected
        assert job.origin("tokenizer.path") == job.origin("model.hf_assets_path")
        assert job.warnings == ()
        assert load_job(write(to_toml(job), "resolved.toml")) == job
    overridden = load_job(write("tokenizer = 'bytes'"), [f"--model.hf_assets_path={folder}", "--tokenizer.eos=E"])
    assert (overridden.tokenizer.type, overridden.tokenizer.eos) == ("huggingface", "E")


@pytest.mark.parametrize("there", [True, False])
def test_a_tokenizer_wins_over_the_assets_of_the_base_with_a_word(write, folder, there: bool) -> None:
    assets = folder if there else "/no/such"
    write(f'[model]\nhf_assets_path = "{assets}"', "base.toml")
    file = write('base = "base.toml"\n[tokenizer]\ntype = "bytes"')
    job = load_job(file)
    assert (job.tokenizer.type, job.model.hf_assets_path) == ("bytes", "")
    assert job.warnings == (
        f'model.hf_assets_path = "{assets}" is not used: [tokenizer] ({file}:2) comes later and wins',
    )
    again = load_job(write(to_toml(job), "resolved.toml"))
    assert (again, again.warnings) == (job, ())


def test_no_assets_takes_back_those_of_the_base(write) -> None:
    write('[model]\nhf_assets_path = "/no/such"', "base.toml")
    job = load_job(write('base = "base.toml"\n[model]\nhf_assets_path = ""'))
    assert (job.tokenizer.type, job.warnings) == ("bytes", ())


def test_a_resolved_config_loads_where_the_assets_are_gone(write, folder) -> None:
    given = f'[model]\nhf_assets_path = "{folder}"\n[tokenizer]\ntype = "tiktoken"\n'
    job = load_job(write(given + f'path = "{folder}/original/tokenizer.model"'))
    file = write(to_toml(job), "resolved.toml")
    folder.rename(folder.parent / "elsewhere")
    assert load_job(file, files=False) == job
    with pytest.raises(ConfigError) as caught:
        load_job(file)
    assert {p.code for p in caught.value.problems} == {"E006"}


def test_a_file_of_another_name_in_the_assets_can_be_named(tmp_path, write) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    path = f'path = "{tmp_path}/tekken.json"'
    file = write(f'[model]\nhf_assets_path = "{tmp_path}"\n[tokenizer]\ntype = "huggingface"\n{path}')
    assert load_job(file).tokenizer.path == f"{tmp_path}/tekken.json"
