"""Sections about the run itself: [job] [training] [metrics] [profiling] [validation] [generation] [debug] [comm]."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from titan_lite.config.component import ConfigBase
from titan_lite.config.datasets import c4_test_notice, source_table, unknown_dataset
from titan_lite.config.errors import CROSS_FIELD, NOT_HERE, Problem
from titan_lite.config.fields import (
    Count,
    Folder,
    InnerFolder,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PositiveOrMinusOne,
    Seed,
    Strings,
)
from titan_lite.config.machine import has_cuda, is_installed
from titan_lite.data.source import Source

if TYPE_CHECKING:
    from titan_lite.job import Job


class JobInfo(ConfigBase):
    """[job]: where a run writes and what it is called."""

    config_file: str = ""
    """torchtitan's way to name the file on its command line; here the file is the first argument."""
    dump_folder: Folder = "./outputs"
    """Folder of everything the run writes. It belongs to one run: starting again resumes it."""
    description: str = "default job"
    """Free text, shown at the start."""
    print_config: bool = False
    """Print the resolved config at the start."""
    save_config_file: str = ""
    """Not honoured: the resolved config is always written to <dump_folder>/config.toml."""
    custom_config_module: str = ""
    """Not honoured: nothing in a config runs code."""

    def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
        if self.config_file:
            yield "job.config_file is not used: the config is the file given as the first argument"
        if self.save_config_file:
            yield "job.save_config_file is not used: the resolved config is always <dump_folder>/config.toml"
        if self.custom_config_module:
            yield "job.custom_config_module is not used: nothing in a config runs code"


class DataLoaderConfig(ConfigBase):
    """[training.dataloader] and [validation.dataloader]: torchdata's StatefulDataLoader."""

    num_workers: Count = 0
    """Worker processes per rank; 0 loads in the training process. The batches are the same whatever the number."""
    persistent_workers: bool = False
    """Idle: the stream of batches has no epochs between which workers could end."""
    pin_memory: bool = False
    """Copy batches to page-locked memory (CUDA only)."""
    prefetch_factor: PositiveInt | None = None
    """Batches each worker loads ahead; unset = 2 with workers."""

    def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
        if self.num_workers == 0 and self.persistent_workers:
            why = "has no effect without worker processes: num_workers is 0"
            yield Problem(CROSS_FIELD, ".persistent_workers", why, True, "false, or num_workers of at least 1")
        if self.num_workers == 0 and self.prefetch_factor is not None:
            why = "has no effect without worker processes: num_workers is 0"
            yield Problem(
                CROSS_FIELD, ".prefetch_factor", why, self.prefetch_factor, "unset, or num_workers of at least 1"
            )

    def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
        if self.persistent_workers and self.num_workers:
            yield ".persistent_workers has no effect: the stream has no epochs, its workers live as long as it is read"
        if self.pin_memory and not has_cuda():
            yield ".pin_memory has no effect: there is no CUDA device on this machine"


class Training(ConfigBase):
    """[training]: how long, on what, in which precision."""

    dataset: str = ""
    """Shorthand for [data.source]: "python_stdlib", "c4", "c4_test", "hf:org/name", or a path or glob of .txt .jsonl
    .jsonl.gz .jsonl.zst .parquet; "" = whatever [data.source] says."""
    dataset_path: str = ""
    """Local folder or file that stands in for the path of `dataset`."""
    local_batch_size: PositiveInt = 8
    """Sequences per data-parallel rank and forward pass."""
    global_batch_size: PositiveOrMinusOne = -1
    """Sequences per optimizer step over all ranks, a multiple of the data-parallel degree; -1 = local_batch_size x
    data-parallel degree at the first start. A rank's share goes through in micro-batches of at most local_batch_size,
    whose gradients accumulate."""
    seq_len: PositiveInt = 2048
    """Tokens per sequence."""
    max_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient's norm is clipped to this; inf = never."""
    steps: PositiveInt = 10000
    """Optimizer steps of the whole run, over all its restarts."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in host memory between their uses."""
    enable_optimizer_offload: bool = False
    """Keep optimizer states alone in host memory; parameters and gradients stay on the device. A step brings the states
    to the device in buckets and back: 16 bytes per parameter of a rank over the bus for AdamW in float32, in place of 8
    bytes of device memory. Only with optimizers that treat each parameter by itself."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the master weights; "bfloat16" trains everything in bfloat16."""
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type in forward and backward; auto = bfloat16 where the device computes it natively, else float32."""
    mixed_precision_reduce: Literal["float32"] = "float32"
    """Type in which gradients are reduced over ranks."""
    loss_chunk_tokens: Count = 256
    """Tokens per chunk of the chunked cross entropy; 0 = dense logits."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient c of c * logsumexp(logits)^2, added to each target's cross entropy (arXiv 2204.02311; often 1e-4).
    The `loss` in logs and metrics is the sum of the two, which is what is minimised; validation is cross entropy alone.
    """
    gc_freq: PositiveInt = 50
    """Steps between Python garbage collections, which run on all ranks at the same step."""
    gc_debug: bool = False
    """Collect at every step and report reference cycles."""
    dataloader: DataLoaderConfig = DataLoaderConfig()
    """Background loading."""

    def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
        if self.dtype == "bfloat16" and self.mixed_precision_param == "float32":
            why = 'is wider than the weights: training.dtype is "bfloat16"'
            yield Problem(CROSS_FIELD, ".mixed_precision_param", why, "float32", '"auto" or "bfloat16"')
        if self.enable_cpu_offload and self.enable_optimizer_offload:
            why = "has no effect: training.enable_cpu_offload keeps optimizer states in host memory already"
            yield Problem(CROSS_FIELD, ".enable_optimizer_offload", why, True, "false, or enable_cpu_offload = false")
        if world_size is None or self.global_batch_size == -1:
            return
        degree = job.parallelism.data_parallel_degree(world_size)
        if degree is None:  # the layout does not fit the world size: reported by [parallelism]
            return
        if self.global_batch_size % degree:
            below = self.global_batch_size // degree * degree
            legal = [size for size in (below, below + degree) if size > 0]
            yield Problem(
                CROSS_FIELD,
                ".global_batch_size",
                f"cannot be shared evenly by {degree} data-parallel ranks",
                self.global_batch_size,
                f"-1, or multiples of {degree}: nearest {' or '.join(map(str, legal))}",
            )

    def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
        for key in ("enable_cpu_offload", "enable_optimizer_offload"):
            if getattr(self, key) and not has_cuda():
                yield f"training.{key} has no effect: there is no CUDA device on this machine"


class Metrics(ConfigBase):
    """[metrics]: what is logged, how often."""

    log_freq: PositiveInt = 10
    """Steps between log lines (also at step 1 and at the last one)."""
    enable_tensorboard: bool = False
    """Write TensorBoard scalars."""
    disable_color_printing: bool = False
    """Plain console lines."""
    save_tb_folder: InnerFolder = "tb"
    """Folder of the TensorBoard files, inside job.dump_folder."""
    save_for_all_ranks: bool = False
    """Every rank writes its scalars, not only the first."""
    enable_wandb: bool = False
    """Log to Weights & Biases (extra `wandb`)."""
    compare_with_estimate: Literal["auto", "always", "never"] = "auto"
    """Print one of the first steps' memory and time beside what `python -m estimation` says, once that is there. The
    estimate runs beside the training on one CPU core. auto = at a low priority, where the run has a minute to go;
    always = however short it is, and a run that is done waits for it."""

    def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
        if self.enable_wandb and not is_installed("wandb"):
            why = "Weights & Biases is not installed: pip install 'titan_lite[wandb]'"
            yield Problem(NOT_HERE, ".enable_wandb", why, True, "false without the extra `wandb`")
        if self.compare_with_estimate == "always" and not is_installed("estimation"):
            why = "the estimator is not installed: it comes with the checkout"
            yield Problem(NOT_HERE, ".compare_with_estimate", why, "always", '"auto" or "never"')

    def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
        if self.save_for_all_ranks and not (self.enable_tensorboard or self.enable_wandb):
            yield "metrics.save_for_all_ranks has no effect: neither enable_tensorboard nor enable_wandb is true"


class Profiling(ConfigBase):
    """[profiling]: torch profiler traces and CUDA memory snapshots."""

    enable_profiling: bool = False
    """Write traces of some steps."""
    save_traces_folder: InnerFolder = "profile_traces"
    """Folder of the traces, inside job.dump_folder."""
    profile_freq: PositiveInt = 10
    """Steps from one trace to the next."""
    profiler_active: PositiveInt = 1
    """Steps per trace."""
    profiler_warmup: Count = 3
    """Steps the profiler warms up before each trace."""
    enable_memory_snapshot: bool = False
    """Write CUDA memory snapshots."""
    save_memory_snapshot_folder: InnerFolder = "memory_snapshot"
    """Folder of the snapshots, inside job.dump_folder."""

    def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
        needed = self.profiler_active + self.profiler_warmup
        if self.enable_profiling and self.profile_freq < needed:
            why = f"is shorter than one trace: profiler_warmup + profiler_active = {needed} steps"
            yield Problem(CROSS_FIELD, ".profile_freq", why, self.profile_freq, f"at least {needed}")
        if self.enable_memory_snapshot and not has_cuda():
            why = "only CUDA's allocator records its history, and there is no CUDA device on this machine"
            yield Problem(NOT_HERE, ".enable_memory_snapshot", why, True, "false")

    def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
        if self.enable_profiling and self.profile_freq > job.training.steps:
            yield f"profiling.profile_freq = {self.profile_freq} exceeds training.steps: no trace will be written"


class Validation(ConfigBase):
    """[validation]: loss on text that training never sees."""

    enable: bool = False
    """Validate during and after training."""
    dataset: str = ""
    """Like training.dataset (also "c4_validation"); "" = the held-out split of the training source."""
    dataset_path: str = ""
    """Local folder or file that stands in for the path of `dataset`."""
    local_batch_size: PositiveInt = 8
    """Sequences per data-parallel rank and forward pass."""
    seq_len: PositiveInt = 2048
    """Tokens per sequence."""
    freq: PositiveInt = 10
    """Optimizer steps between validations."""
    steps: PositiveOrMinusOne = -1
    """Batches per validation; -1 = the whole split. A batch is local_batch_size rows on each data-parallel rank, so a
    limited validation covers more rows on more ranks, while -1 covers the same rows on any number."""
    dataloader: DataLoaderConfig = DataLoaderConfig()
    """Background loading."""

    def source(self) -> Source.Config | None:
        """The source that `dataset` names; None = the held-out split of the training source."""
        if not self.dataset and not self.dataset_path:
            return None
        table = source_table(self.dataset, self.dataset_path)
        return None if table is None else Source.Config.choose(table)

    def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
        if not self.enable:
            return
        source = self.source()
        if source is not None:
            key = ".dataset_path" if self.dataset_path else ".dataset"
            for problem in source.problems(job, world_size):
                yield replace(problem, key=key, value=getattr(self, key[1:]))
        elif self.dataset:
            yield unknown_dataset(".dataset", self.dataset)

    def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
        if self.enable and self.dataset == "c4_test" and not self.dataset_path:
            yield c4_test_notice("validation")


class Generation(ConfigBase):
    """[generation]: text sampled from the model at the end of training."""

    prompts: Strings = ()
    """Texts to continue; none = nothing is sampled."""
    max_new_tokens: PositiveInt = 128
    """Tokens sampled per prompt."""
    temperature: NonNegativeFloat = 0.8
    """Logits are divided by it; 0 = always the likeliest token."""
    top_k: Count = 0
    """Sample among the k likeliest tokens; 0 = all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the likeliest tokens that together have this probability; 1 = all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Sample among tokens at least this times as likely as the likeliest one; 0 = all."""
    typical_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the tokens of the most typical -log p that together have this probability; 1 = all."""
    repetition_penalty: PositiveFloat = 1.0
    """Logits of tokens that are in the text, prompt included, are divided by it (multiplied where they are negative);
    1 = they stay."""
    seed: Seed = 0
    """Seed of the sampling."""

    def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
        names = ("top_k", "top_p", "min_p", "typical_p")
        for name in names if self.prompts and not self.temperature else ():
            value, off = getattr(self, name), type(self).model_fields[name].default
            if value != off:
                why = "has no effect with temperature = 0: nothing is drawn"
                yield Problem(CROSS_FIELD, f".{name}", why, value, f"{off}, or a temperature above 0")


class Debug(ConfigBase):
    """[debug]: seed and determinism."""

    seed: Seed = 0
    """Seed of weights, data order and every other random draw."""
    deterministic: bool = False
    """Refuse operations without a deterministic implementation."""
    deterministic_warn_only: bool = False
    """With deterministic: only warn about them."""
    moe_force_load_balance: bool = False
    """For timing: routers send tokens to experts in turn, equally many to each, in place of those with the best scores.
    """

    def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
        if self.deterministic_warn_only and not self.deterministic:
            yield "debug.deterministic_warn_only has no effect: debug.deterministic is false"


class Comm(ConfigBase):
    """[comm]: process groups."""

    init_timeout_seconds: PositiveInt = 300
    """Seconds a collective may take until the first step is done."""
    train_timeout_seconds: PositiveInt = 100
    """Seconds a collective may take afterwards."""
    trace_buf_size: Count = 20000
    """Entries of NCCL's flight recorder; 0 = off."""
    save_traces_folder: InnerFolder = "comm_traces"
    """Folder of the flight recorder's traces, inside job.dump_folder."""
    save_traces_file_prefix: str = "rank_"
    """Beginning of their file names."""
    mode: Literal["default", "fake_backend", "local_tensor"] = "default"
    """Only "default" is honoured: `python -m estimation` is the dry run."""

    def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
        if self.mode != "default":
            yield f'comm.mode = "{self.mode}" is not honoured: `python -m estimation CONFIG` is the dry run'
