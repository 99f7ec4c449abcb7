"""Garbage collection at the same steps on every rank, so that no rank stops alone and makes the others wait."""

from __future__ import annotations

import gc
import logging

from titan_lite.run.hooks import Hook, RunFacts, StepResult

logger = logging.getLogger(__name__)


class GarbageCollectionHook(Hook):
    """Turns automatic collection off and collects generation 1 every `freq` steps (torchtitan's policy).

    With `debug` it collects everything after every step and reports what it found; with `watch_cuda` also the reference
    cycles that hold CUDA memory.
    """

    def __init__(self, freq: int, debug: bool = False, watch_cuda: bool = False) -> None:
        self.freq = freq
        self.debug = debug
        self.watch_cuda = watch_cuda
        self._was_enabled = False

    def on_start(self, facts: RunFacts) -> None:
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect(1)
        if self.debug and self.watch_cuda:
            from torch.utils.viz._cycles import warn_tensor_cycles

            warn_tensor_cycles()

    def on_step(self, result: StepResult) -> None:
        if self.debug:
            logger.info("[GC] %d unreachable objects after step %d", gc.collect(), result.step)
        elif result.step % self.freq == 0:
            gc.collect(1)

    def on_end(self, reason: str) -> None:
        if self._was_enabled:
            gc.enable()
