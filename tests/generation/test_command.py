"""scripts/generate.py, in this process and on two ranks."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts.generate import main
from tests.distributed.pool import WorkerPool
from tests.hf.checkpoints import save_random
from tests.hf.test_export import model_tables
from titan_lite.config.errors import ConfigError
from titan_lite.config.load import job_from_dict
from titan_lite.generation import BeamSearch, Sampling, generate
from titan_lite.hf.export import export
from titan_lite.hf.loaded import load_theirs
from titan_lite.hf.verify import quiet_transformers
from titan_lite.pretrained import empty_model, load_pretrained

CPU = torch.device("cpu")
PROMPTS = ["def main(", "Grüße", "x"]
NEW = 12
CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump folder."""
    return save_random(tmp_path_factory.mktemp("run"), model_tables("llama3"), std=0.2)


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a Hugging Face folder, with a chat template."""
    out = tmp_path_factory.mktemp("hf") / "model"
    export(run, out, verified=False)
    (out / "chat_template.jinja").write_text(CHAT)
    return out


def printed(*arguments: object) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(list(map(str, arguments))) == 0
    return out.getvalue()


def lines(*arguments: object) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed(*arguments, "--json").splitlines()]


def prompts(texts: list[str]) -> list[str]:
    return [part for text in texts for part in ("--prompt", text)]


def test_one_prompt_is_what_generate_makes_of_it(run: Path) -> None:
    model, tokenizer, _ = loaded = load_pretrained(run, CPU)
    drawn = generate(model, loaded.prompt("def main("), NEW, Sampling(0.7, 20), 5, CPU, 256, [tokenizer.eos_id])
    text = tokenizer.decode(list(drawn))
    options = ("--temperature", 0.7, "--top-k", 20, "--seed", 5, "--max-new-tokens", NEW)
    assert printed(run, "--prompt", "def main(", *options) == f"def main({text}\n"


def test_many_prompts_are_each_what_they_are_alone(run: Path, tmp_path: Path) -> None:
    options = ("--max-new-tokens", NEW, "--samples", 2, "--seed", 7)
    alone = [line for text in PROMPTS for line in lines(run, "--prompt", text, *options)]
    assert [line["seed"] for line in alone] == [7, 8] * 3
    assert lines(run, *prompts(PROMPTS), *options) == alone
    assert lines(run, *prompts(PROMPTS), *options, "--batch-size", 2) == alone
    file = tmp_path / "prompts.jsonl"
    rows = [json.dumps(PROMPTS[0]), json.dumps({"prompt": PROMPTS[1], "note": "\u2028"}, ensure_ascii=False)]
    file.write_text("\n".join([*rows, "", json.dumps("x")]))
    assert lines(run, "--prompts", file, *options) == alone
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    shown = printed(run, "--prompts", tmp_path / "prompts.txt", *options)
    expected = [f"==> {i} of 6 <==\n{line['prompt']}{line['text']}\n" for i, line in enumerate(alone, 1)]
    assert shown == "".join(expected)


def test_a_stop_string_ends_each_text(run: Path) -> None:
    whole = lines(run, *prompts(PROMPTS), "--max-new-tokens", 30)
    stop = next(c for c in whole[0]["text"][3:] if c not in whole[0]["text"][:3])
    for line, cut in zip(whole, lines(run, *prompts(PROMPTS), "--max-new-tokens", 30, "--stop", stop), strict=True):
        assert cut["text"] == line["text"].split(stop)[0]
        assert (cut["ended_by"] == "stop") == (stop in line["text"])


def test_a_hugging_face_folder_goes_on_as_transformers_does(folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    with quiet_transformers():
        model = load_theirs(folder)
    for line in lines(folder, *prompts(PROMPTS), "--temperature", 0, "--max-new-tokens", NEW):
        tokens = theirs(line["prompt"], return_tensors="pt")
        made = model.generate(**tokens, max_new_tokens=NEW, do_sample=False)[0, tokens["input_ids"].shape[1] :]
        assert line["tokens"] == [int(token) for token in made if token != theirs.eos_token_id]


def test_beams(run: Path) -> None:
    loaded = load_pretrained(run, CPU)
    for line in lines(run, *prompts(PROMPTS[:2]), "--beams", 3, "--length-penalty", 2, "--max-new-tokens", NEW):
        search = BeamSearch(3, 2.0)(loaded.engine(), loaded.prompt(line["prompt"]), NEW, Sampling(temperature=0))
        assert line["tokens"] == search


def test_a_conversation(folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer is the continuation of all that was said before."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nbye\n"))
    options = ("--max-new-tokens", NEW, "--temperature", 0)
    shown = printed(folder, "--chat", *options)
    loaded = load_pretrained(folder, CPU)
    said, answers = "[user] hello\n", []
    for line in ("[user] bye\n", ""):
        ids = loaded.tokenizer.encode(said).tolist()
        made = generate(loaded.model, ids, NEW, Sampling(temperature=0), 0, CPU, 256, loaded.ends())
        answers.append(loaded.tokenizer.decode(list(made)))
        said += f"[assistant] {answers[-1]}\n{line}"
    assert shown == "".join(f"{answer}\n" for answer in answers)
    assert printed(folder, "--chat", "--prompt", "hello", *options) == f"{answers[0]}\n"


# ---- several ranks


def on_ranks(arguments: list[str]) -> tuple[str, tuple[int, ...]]:
    """What this rank prints, and the shape of a part of its model."""
    os.environ["WORLD_SIZE"] = "2"
    shapes: list[tuple[int, ...]] = []
    import titan_lite.generation.command as command

    load = command.load_pretrained

    def spied(*args: Any) -> Any:
        found = load(*args)
        shapes.append(tuple(found.model.stack.blocks["0"].attention.q.weight.shape))
        return found

    command.load_pretrained = spied
    try:
        return printed(*arguments), shapes[0]
    finally:
        command.load_pretrained = load
        del os.environ["WORLD_SIZE"]


@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
def test_two_ranks_with_half_of_the_model_each_say_what_one_does(
    pool2: WorkerPool, run: Path, folder: Path, kind: str
) -> None:
    path = run if kind == "checkpoint" else folder
    options = [str(path), *prompts(PROMPTS), "--max-new-tokens", str(NEW), "--top-p", "0.9", "--json"]
    alone = printed(*options)
    first, second = pool2.run(on_ranks, [*options, "--tensor-parallel", "2"], timeout=120)
    assert first[0] == alone
    assert second[0] == ""
    whole = load_pretrained(path, CPU).model.stack.blocks["0"].attention.q.weight.shape
    assert first[1] == second[1] == (whole[0] // 2, whole[1])


def test_a_model_that_does_not_go_into_equal_parts() -> None:
    job = job_from_dict({"model": {"attention": {"n_heads": 4}, "ffn": {"hidden": 100}, "vocab_size": 258}})
    with pytest.raises(ConfigError) as error:
        empty_model(job, 258, CPU, SimpleNamespace(tp_size=3))  # type: ignore[arg-type]
    assert {problem.key for problem in error.value.problems} == {"model.attention.n_heads", "model.ffn.hidden"}


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to continue: give --prompt, --prompts or --chat"),
        (("--prompt", "x", "--prompts", "f"), "--prompt and --prompts"),
        (("--prompt", "x", "--min-p", "2"), "--min-p 2.0: allowed is 0 to 1"),
        (("--prompt", "x", "--repetition-penalty", "0"), "--repetition-penalty 0.0: allowed is above 0"),
        (("--prompt", "x", "--temperature", "0", "--top-p", "0.5"), "--top-p has no effect with --temperature 0"),
        (("--prompt", "x", "--temperature", "0", "--samples", "2"), "--samples has no effect with --temperature 0"),
        (("--prompt", "x", "--beams", "2", "--seed", "1"), "--seed has no effect with --beams"),
        (("--prompt", "x", "--temperature", "0", "--seed", "0"), "--seed has no effect with --temperature 0"),
        (("--prompt", "x", "--beams", "1"), "--beams 1: allowed is at least 2"),
        (("--prompt", "x", "--length-penalty", "1"), "--length-penalty has no effect without --beams"),
        (("--prompt", "x", "--beams", "2", "--stop", "y"), "--stop is not available with --beams"),
        (("--chat", "--json"), "--json has no effect in a conversation"),
        (("--prompt", "x", "--stop", ""), "--stop: an empty text is everywhere"),
    ],
)
def test_options_that_do_not_go(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["nowhere", *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--chat",), "needs a chat template, and the tokenizer has none"),
        (("--prompt", "x", "--ahead"), "this one's model.mtp is none"),
        (("--prompt", "x", "--tensor-parallel", "2"), "needs as many processes, and there is 1"),
        (("--prompts", "no.jsonl"), "no.jsonl\n    cannot be read"),
    ],
)
def test_what_does_not_go_with_the_model(
    run: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([str(run), *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [('"a"\n{"text": "b"}\n', ":2\n    has no prompt"), ("{\n", ":1\n    is not valid JSON"), ("\n", "has no prompts")],
)
def test_a_file_without_prompts(
    run: Path, tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(SystemExit):
        main([str(run), "--prompts", str(tmp_path / "p.jsonl")])
    assert message in capsys.readouterr().err


def test_texts_that_cannot_share_calls_have_no_beams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moving = {"attention": {"position": {"scaling": {"type": "dynamic_ntk", "original_max_len": 8}}}}
    save_random(tmp_path / "run", model_tables("llama3", **moving))
    with pytest.raises(SystemExit):
        main([str(tmp_path / "run"), "--prompt", "x", "--beams", "2"])
    assert "--beams\n    reads several continuations at once" in capsys.readouterr().err
