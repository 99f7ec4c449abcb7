"""lm-evaluation-harness: a checkpoint through the adapter, and the exported folder through the harness's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra `lm-eval` brings 280 MB")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from tests.generation.test_chat import write_tokenizer
from tests.hf.checkpoints import save_random
from tests.hf.test_export import model_tables
from titan_lite.config.errors import ConfigError
from titan_lite.evaluation.harness import TitanLite
from titan_lite.hf.export import export

ATOL = 1e-4
ROWS = [
    {"question": "Which letter comes behind a?", "choices": ["b", "the letter c", "zz"], "answer": 0},
    {"question": "", "choices": ["x", "longer than the others"], "answer": 1},
    {"question": "Say something long " * 8, "choices": ["yes", "no"], "answer": 1},
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices}}"
metric_list:
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
"""
ANSWER = """
task: local_answer
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_text: "Q: {{question}} A:"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 10, do_sample: false}
metric_list:
  - {metric: exact_match}
"""
TASKS = {"local_choice": CHOICE, "local_rolling": ROLLING, "local_answer": ANSWER}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("run"), model_tables("llama3"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """Task files and their data, of which nothing is on the hub."""
    where = tmp_path_factory.mktemp("tasks")
    (where / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in TASKS.items():
        (where / f"{name}.yaml").write_text(text.replace("ROWS", str(where / "rows.jsonl")))
    return TaskManager(include_path=str(where), include_defaults=False)


def results(model: Any, tasks: TaskManager, names: list[str], **arguments: Any) -> dict[str, Any]:
    found = simple_evaluate(
        model,
        tasks=names,
        task_manager=tasks,
        log_samples=True,
        bootstrap_iters=0,
        verbosity="ERROR",
        **arguments,
    )
    assert found is not None
    return dict(found)


BEGIN = {"local_choice": True, "local_rolling": False, "local_answer": True}
"""What the harness's own model needs to be told: with a begin of text it would also score that, for whole texts."""


def test_both_ways_give_the_same(run: Path, tasks: TaskManager, tmp_path: Path) -> None:
    """With windows shorter than some contexts and texts, so that both have to cut them."""
    export(run, tmp_path / "hf", verified=False)
    ours = results("titan_lite", tasks, list(TASKS), model_args=f"path={run},max_length=64", batch_size=2)
    for begin in (True, False):
        names = [name for name in TASKS if BEGIN[name] == begin]
        exported = f"pretrained={tmp_path / 'hf'},max_length=64,dtype=float32,add_bos_token={begin}"
        theirs = results("hf", tasks, names, model_args=exported, batch_size=1, device="cpu")
        for task in names:
            for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
                assert mine["doc"] == other["doc"]
                _same(mine["resps"], other["resps"])
            for metric, value in ours["results"][task].items():
                if isinstance(value, float):
                    assert value == pytest.approx(theirs["results"][task][metric], rel=ATOL), (task, metric)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("talking")
    tokenizer = {"type": "huggingface", "path": str(write_tokenizer(folder))}
    return save_random(folder / "run", model_tables("llama3"), tokenizer=tokenizer)


def test_conversations_are_the_same_both_ways(talking: Path, tasks: TaskManager, tmp_path: Path) -> None:
    """With an example before each question, in turns of its own."""
    export(talking, tmp_path / "hf", verified=False)
    names, how = ["local_choice", "local_answer"], {"apply_chat_template": True, "fewshot_as_multiturn": True}
    ours = results("titan_lite", tasks, names, model_args=f"path={talking}", num_fewshot=1, **how)
    exported = f"pretrained={tmp_path / 'hf'},max_length=128,dtype=float32"
    theirs = results("hf", tasks, names, model_args=exported, device="cpu", num_fewshot=1, **how)
    for task in names:
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert mine["arguments"] == other["arguments"]
            assert "<|turn|>assistant" in str(mine["arguments"])
            _same(mine["resps"], other["resps"])


def test_specials_are_specials_in_conversations_only(talking: Path) -> None:
    model = TitanLite(str(talking))
    tokenizer: Any = model.loaded.tokenizer
    turn, end = map(tokenizer.backend.token_to_id, ("<|turn|>", "<|end|>"))
    assert turn not in model.tok_encode("<|turn|>")
    text = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    ids = model.tok_encode(text)
    assert ids.count(turn) == 2
    assert ids.count(tokenizer.bos_id) == 1 == model.tok_encode("Hi").count(tokenizer.bos_id)
    assert tokenizer.bos_id not in model.tok_encode("Hi", add_special_tokens=False)
    assert model.engine.ends == {tokenizer.eos_id, end}


def test_a_template_has_to_be_there(run: Path, talking: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--apply_chat_template\n.*needs a chat template, and the tokenizer has none"
    ):
        TitanLite(str(run)).apply_chat_template([])
    with pytest.raises(ConfigError, match=r'--apply_chat_template = "tools"\n.*names a template'):
        TitanLite(str(talking)).chat_template("tools")


def _same(ours: Any, theirs: Any) -> None:
    if isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            _same(mine, other)
    elif isinstance(ours, float):
        assert ours == pytest.approx(float(theirs), rel=ATOL)
    else:
        assert str(ours) == str(theirs)


def asked(model: TitanLite, context: str, how: dict[str, Any]) -> str:
    request = Instance("generate_until", {}, (context, how), 0)
    return model.generate_until([request], disable_tqdm=True)[0]


def test_answers_are_sampled_as_asked(run: Path) -> None:
    model = TitanLite(str(run), seed=3)
    how = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_k": 20}
    assert asked(model, "Q", how) == asked(model, "Q", how) != asked(TitanLite(str(run), seed=4), "Q", how)
    assert asked(model, "Q", {"until": [], "max_gen_toks": 12}) == asked(model, "Q", how | {"do_sample": False})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"num_beams": 4}, r"has settings that are not known here"),
        ({"max_gen_toks": 500}, r"max_gen_toks = 500\n.*leaves no room for a context in max_length = 128"),
    ],
)
def test_what_it_does_not_do_is_told(run: Path, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked(TitanLite(str(run)), "Q", how)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pth": "x"}, r'--model_args = \["pth"\]\n.*has no path'),
        ({"path": "x", "lora": 1}, r'--model_args = \["lora"\]\n.*are not known here\n.*path, max_length'),
        ({"path": "x", "max_batch_size": 4}, r"--max_batch_size = 4\n.*has no effect"),
        ({"path": "x", "device": "tpu"}, r'--device = "tpu"\n.*is not here\n.*allowed: cpu'),
    ],
)
def test_arguments_that_mean_nothing(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TitanLite(**given)
