"""The search for a layout: what it looks at, that it misses nothing, what it writes, and what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from estimation.__main__ import main
from estimation.compute import Assumptions
from estimation.devices import device_of
from estimation.floors import Floors
from estimation.layouts import EXPERT, LOCAL_BATCH, REPLICATE, SHARD, TENSOR, Layouts
from estimation.plan import HEAVIER, MODE, OPTION, Plan, _modes, plan
from estimation.plot import draw_plan
from estimation.question import Changes, Outcome, Question, keys_of
from titan_lite.config.load import load_job

TINY = """
[model]
dim = 64
n_layers = 2
vocab_size = 512
attention = { n_heads = 4, n_kv_heads = 4 }
ffn = { hidden = 128 }
[training]
local_batch_size = 2
seq_len = 64
loss_chunk_tokens = 0
[activation_checkpoint]
mode = "none"
"""
ONE_STAGE = ("--parallelism.pipeline_parallel_degree=1", "--parallelism.context_parallel_degree=1")
"""The formula knows neither pipelines nor parts of rows."""
H100 = device_of("h100-80gb")
PNG = b"\x89PNG"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


class Formula(Question):
    """Costs by a formula in place of an estimate; counts how often it is asked."""

    asked: list[Changes]

    def answer(self, changes: Changes) -> Outcome:
        job = self.job(changes)
        self.__dict__.setdefault("asked", []).append(changes)
        layout, batch = job.parallelism, job.training.local_batch_size
        replicas, tp = layout.data_parallel_replicate_degree, layout.tensor_parallel_degree
        name = job.activation_checkpoint.mode + job.activation_checkpoint.selective_ac_option
        kept, again = {"none": (9.0, 0.0), "full": (1.0, 0.35)}.get(job.activation_checkpoint.mode, (5.0, 0.15))
        if name == "selective2":
            kept, again = 6.0, 0.18
        rest = 96.0 * replicas / self.world_size
        live = rest + 3.0 + batch * kept / tp
        seconds = batch * (1 + again) / tp + 0.2 * (tp - 1) + 0.1 + 0.02 * replicas
        ranks = self.world_size // tp
        return Outcome(
            changes, f"{replicas} {tp}", name, batch, live, live * 1.05, 70.0, 70.0 - live * 1.05, live * 1.05 <= 70.0,
            seconds, seconds / (batch * ranks), 1.0, 0.5, batch * ranks, (rest / 4, rest * 3 / 4),
            (batch * (1 + again) / tp + 0.1) / seconds, 0.0,
        )  # fmt: skip


def formula(config: Path, size: int, *overrides: str) -> Formula:
    return Formula(str(config), overrides, size, H100, Assumptions())


def searched(question: Question, *overrides: str) -> Plan:
    return plan(question, keys_of(overrides), 100, 1, lambda line: None)


def every_candidate(question: Question, fixed: frozenset[str] = frozenset()) -> Iterator[Changes]:
    given = question.given()
    layouts = Layouts(question, given, fixed)
    for layout in layouts:
        for mode in _modes(given, fixed):
            for batch in layouts.batches(layout):
                yield {**layout, **mode, **batch}


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("--training.global_batch_size=64",),
        ("--activation_checkpoint.mode=selective",),
        ("--training.batch_size=2",),
    ],
    ids=["batches of any size", "a fixed batch", "a mode on the command line", "a micro-batch on the command line"],
)
def test_nothing_better_is_left_out(overrides: tuple[str, ...], config: Path):
    """The best of the search is the best of all there are, and few of them are asked about."""
    overrides += ONE_STAGE
    question = formula(config, 8, *overrides)
    every = [question.answer(changes) for changes in every_candidate(question, keys_of(overrides))]
    best = min(outcome.seconds_per_token for outcome in every if outcome.fits)
    question = formula(config, 8, *overrides)
    found = searched(question, *overrides)
    assert found.ranked[0].seconds_per_token == pytest.approx(best)
    assert len(question.asked) <= len(every)
    assert [outcome.seconds_per_token for outcome in found.ranked] == sorted(o.seconds_per_token for o in found.ranked)
    assert found.fixed_batch == (question.given().training.global_batch_size != -1)


def test_most_candidates_are_not_asked_about(config: Path):
    question = formula(config, 8, *ONE_STAGE)
    every = len(list(every_candidate(question, keys_of(ONE_STAGE))))
    found = searched(question, *ONE_STAGE)
    assert len(question.asked) < every / 3
    assert all(found.pruned.values())
    assert len(found.estimated) + sum(found.pruned.values()) + sum(found.refused.values()) >= every


def test_heavy_modes_come_first_where_light_ones_do_not_fit(config: Path):
    """Over two tensor-parallel ranks per-op checkpoints do not fit, so that none at all are not tried; of two replicas
    full ones do not, so that nothing else is.
    """
    overrides = ("--training.local_batch_size=7", *ONE_STAGE)
    question = formula(config, 2, *overrides)
    every = [question.answer(changes) for changes in every_candidate(question, keys_of(overrides))]
    found = searched(formula(config, 2, *overrides), *overrides)
    assert found.pruned[HEAVIER] == 1 + 2
    assert found.ranked[0].seconds_per_token == min(o.seconds_per_token for o in every if o.fits)


def test_what_others_take_rules_out_what_is_slower(config: Path):
    """0.9 seconds of a token grow with the micro-batch, and 0.3 are those of its weights."""
    some = formula(config, 8).answer({})
    one, two = (replace(some, seconds_per_token=0.9 + 0.3 / n, computing=1.0, fits=True) for n in (1, 2))
    floors, alone, bubble = Floors(), (1, 1, 1, 1), 0.2
    floors.learn_computing({(0, 1): one, (0, 2): two})
    assert floors.computing == {0: pytest.approx(0.9)}
    for seconds in (0.95, 1.0, 1.05):
        assert not floors.rule_out(0, alone, bubble)
        floors.learn(0, alone, replace(some, seconds_per_token=seconds, fits=True, exposed=0.0))
    assert not floors.rule_out(0, alone, 0.0)
    assert floors.rule_out(0, alone, bubble)
    floors.learn(0, (2, 1, 1, 1), replace(some, seconds_per_token=1.2, fits=True, exposed=0.25))
    assert floors.rule_out(0, (4, 1, 1, 1), 0.0)
    assert not floors.rule_out(0, (1, 4, 1, 1), 0.0)


def test_legal_layouts(config: Path):
    """All divisors of 8 for shards, replicas and tensor parallel; four heads cannot be cut into eight."""
    layouts = Layouts(formula(config, 8), load_job(config), frozenset())
    found = {(layout[REPLICATE], layout[TENSOR]) for layout in layouts}
    assert found == {(r, t) for r in (1, 2, 4, 8) for t in (1, 2, 4) if r * t <= 8}
    assert any(why.startswith(EXPERT) for why in layouts.refused)  # there are no experts
    assert any("n_heads" in why or "n_kv_heads" in why for why in layouts.refused)


def test_what_the_command_line_sets_stays(config: Path):
    overrides = (
        "--parallelism.tensor_parallel_degree=2",
        "--parallelism.data_parallel_replicate_degree",
        "2",
        *ONE_STAGE,
    )
    layouts = Layouts(formula(config, 8, *overrides), load_job(config, overrides), keys_of(overrides))
    assert [dict(layout) for layout in layouts if layout.get(EXPERT, 1) == 1] == [{**next(iter(layouts))}]
    assert TENSOR not in next(iter(layouts))
    assert next(iter(layouts))[SHARD] == -1


def test_no_tensor_parallelism_over_nodes(config: Path):
    question = replace(formula(config, 8), device=replace(H100, per_node=2))
    assert {layout[TENSOR] for layout in Layouts(question, load_job(config), frozenset())} == {1, 2}


@pytest.mark.parametrize(
    ("local", "rows", "sizes"),
    [(3, -1, [3, 6, 12, 24]), (4, -1, [1, 2, 4, 8, 16, 32]), (2, 32, [1, 2, 4]), (3, 48, [1, 2, 3])],
)
def test_micro_batches(local: int, rows: int, sizes: list[int], config: Path):
    """On eight ranks without tensor parallelism; a share of six is not cut into micro-batches of four."""
    overrides = (f"--training.local_batch_size={local}", f"--training.global_batch_size={rows}")
    layouts = Layouts(formula(config, 8, *overrides), load_job(config, overrides), frozenset())
    assert [batch[LOCAL_BATCH] for batch in layouts.batches({TENSOR: 1})] == sizes


def test_what_rests_prunes_layouts(config: Path):
    """Two replicas of what takes a device and a half do not fit on two devices: nothing is asked about them."""

    class Heavy(Formula):
        def answer(self, changes: Changes) -> Outcome:
            found = super().answer(changes)
            return replace(found, rest_gib=(found.rest_gib[0], found.rest_gib[0] * 1e6))

    question = Heavy(str(config), (), 2, H100, Assumptions())
    found = searched(question)
    assert {outcome.layout.split()[0] for outcome in found.estimated} == {"1"}


COMMAND = ("--jobs", "1", "--training.local_batch_size=2", "--activation_checkpoint.mode=none")


def test_a_plan_and_the_config_it_writes(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Each candidate's numbers are those of `python -m estimation` with its changes."""
    written, picture = tmp_path / "best.toml", tmp_path / "plan.png"
    arguments = [
        "plan",
        str(config),
        "--gpus",
        "2",
        *COMMAND,
        "--write",
        str(written),
        "--plot",
        str(picture),
        "--json",
    ]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert {outcome["layout"] for outcome in found["ranked"]} == {"FSDP 2", "DDP 2", "TP 2", "CP 2", "PP 2"}
    best = found["ranked"][0]
    assert main([str(written), "--world-size", "2", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["step_seconds"] == best["step_seconds"]
    assert alone["peak_reserved_gib"] == best["peak_reserved_gib"]
    assert written.read_text().splitlines()[1] == 'base = "tiny.toml"'
    assert load_job(written).training.local_batch_size == 2
    assert picture.read_bytes()[:4] == PNG


def test_a_plan_for_people(config: Path, tmp_path: Path):
    from estimation.plan_report import as_dict, text

    found = searched(formula(config, 8))
    lines = text(found)
    assert "not legal here: parallelism.expert_parallel_degree" in lines
    assert "time per token" in lines
    assert "[parallelism]" in lines
    assert as_dict(found)["ranked"][0]["fits"]
    draw_plan(found, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[:4] == PNG


def test_reasons_that_differ_in_numbers_are_said_once(config: Path):
    from estimation.plan_report import as_dict, text

    refused = Counter({"a.b: 1 of 8 rows": 30, "a.b: 10 of 8 rows": 9, "a.b: 2 of 8 rows": 1, "a.c: 8 rows": 3})
    found = replace(searched(formula(config, 1)), refused=refused, pruned=Counter({"": 0}))
    assert [line.strip() for line in text(found).splitlines() if " not legal here" in line] == [
        "40 not legal here: a.b: 1 to 10 of 8 rows",
        "3 not legal here: a.c: 8 rows",
    ]
    assert as_dict(found)["refused"] == refused  # for programs as it was


def test_nothing_fits(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("estimation.devices.device_of", lambda name: replace(H100, memory_gib=0.001))
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(config), "--gpus", "1", *COMMAND])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "nothing fits on 1 x h100-80gb" in error
    assert "the nearest" in error


def test_advice(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What makes it fit does, each with the numbers of its own estimate, cheapest first."""
    big = (str(config), "--training.seq_len=512", "--training.local_batch_size=8")
    assert main([*big, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert "advice" not in whole
    limit = whole["outside_allocator_gib"] + 0.8 * whole["peak_reserved_gib"]
    monkeypatch.setattr("estimation.devices.device_of", lambda name: replace(H100, memory_gib=limit))
    assert main([*big, "--json", "--jobs", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    advice = found["advice"]
    assert 1 <= len(advice) <= 3
    rate = [outcome["tokens_per_second_per_device"] for outcome in advice]
    assert rate == sorted(rate, reverse=True)
    for outcome in advice:
        assert outcome["fits"]
        assert outcome["sequences_per_step"] == 8
    changes = [f"--{key}={value}" for key, value in advice[0]["changes"].items()]
    assert main([*big, *changes, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["fits"]
    assert alone["step_seconds"] == advice[0]["step_seconds"]
    assert alone["peak_reserved_gib"] == advice[0]["peak_reserved_gib"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpus", "0"), "--gpus must be at least 1"),
        (("--gpus", "2", "--layouts", "0"), "--layouts must be at least 1"),
        (("--gpus", "2", "--jobs", "0"), "--jobs must be at least 1"),
        (("--gpus", "2", "--device", "h1000"), "h200-141gb"),
        (("--gpus", "2", "--write", "tiny.toml"), "exists already"),
        (("--gpus", "2", "--write", "plan.json"), "another ending"),
        (("--gpus", "2", "--plot", "nowhere/plan.png"), "nowhere is not a folder"),
        (("--gpus", "2", "--model.dim=5"), "model.dim"),
        (("--gpus", "6", "--training.global_batch_size=4", "--parallelism.tensor_parallel_degree=4"), "world size 6"),
        ((), "--gpus"),
    ],
)
def test_refused(
    arguments: tuple[str, ...],
    said: str,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(config.parent)
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "tiny.toml", *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("titan_lite.config.machine.is_installed", lambda package: False)
    with pytest.raises(SystemExit) as stopped:
        main(["tiny.toml", "--plot", "step.png"])
    assert stopped.value.code == 2
    assert "titan_lite[plot]" in capsys.readouterr().err


def test_old_spellings_stay_too():
    assert keys_of(("--training.batch_size=2", "--activation_checkpoint.mode", "full")) == {LOCAL_BATCH, MODE}
    assert OPTION not in keys_of(())
