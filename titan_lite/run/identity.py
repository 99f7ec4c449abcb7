"""Which run this is: what its checkpoints say of it, and whether its folder belongs to another one."""

from __future__ import annotations

from pathlib import Path

from titan_lite.checkpoint.compare import model_problems
from titan_lite.checkpoint.facts import RunFacts as CheckpointFacts
from titan_lite.checkpoint.folder import list_steps
from titan_lite.checkpoint.world import agreed
from titan_lite.config.errors import CROSS_FIELD, ConfigError
from titan_lite.config.load import job_from_toml, to_toml
from titan_lite.data.loader import data_fingerprint
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.job import Job
from titan_lite.parallel.world import World


def checkpoint_facts(job: Job, world: World, tokenizer: Tokenizer) -> CheckpointFacts:
    """What every checkpoint of the run says about it. Collective."""
    return CheckpointFacts(
        config=to_toml(job),
        model=job.model.identity(),
        tokenizer=tokenizer.fingerprint(),
        data=_agreed_data_fingerprint(job, world),
        layout=world.axes,
    )


def _agreed_data_fingerprint(job: Job, world: World) -> str:
    """The data's fingerprint, which every rank must see alike: the rows they read belong to one global batch."""
    with agreed(world):
        mine = data_fingerprint(job.data)
    if len(set(world.gather(mine))) > 1:
        raise ConfigError.at("data.source", "the ranks see different data: are all files there on every node?")
    return mine


def refuse_another_run(job: Job, folder: Path) -> None:
    """A run that starts from nothing must not write over another one: one with checkpoints, or of another model."""
    config, written = job.checkpoint, folder / "config.toml"
    if written.exists():
        identity = job_from_toml(written.read_text(encoding="utf-8"), written).model.identity()
        if problems := model_problems(written, identity, job.model.identity()):
            raise ConfigError(problems)
    if not config.enable and list_steps(folder / config.folder):
        why = f"is off, but {folder / config.folder} holds checkpoints of a run"
        raise ConfigError.at("checkpoint.enable", why, False, "true, or another job.dump_folder", code=CROSS_FIELD)
