"""What leaves the device, and what others than this trainer leave on it."""

from __future__ import annotations

from typing import Any

import pytest

from estimation.devices import device_of
from estimation.estimate import Estimate, estimate
from estimation.ops import NEXT_MICRO_BATCH
from estimation.recipe import PureBfloat16
from estimation.rehearsal import rehearse
from estimation.trace import Alloc, Free
from tests.estimation.test_parts import B, T, V, tables
from titan_lite.config.load import job_from_dict


def estimated(**sections: Any) -> Estimate:
    return estimate(job_from_dict(tables(4, **sections), 2, files=False), 2, device_of("h100-80gb"))


def test_optimizer_states_on_the_host():
    here = estimated()
    there = estimated(training={"enable_optimizer_offload": True})
    states = here.memory.peak.live["optimizer state"]
    assert there.host.held["optimizer state"] == states
    assert "optimizer state" not in there.memory.peak.live
    assert here.memory.peak.total - there.memory.peak.total == states
    assert there.host.moved == 2 * states
    assert there.compute.seconds > here.compute.seconds


def test_everything_on_the_host():
    here = estimated()
    there = estimated(training={"enable_cpu_offload": True})
    for name in ("parameters", "optimizer state"):
        assert there.host.held[name] == here.memory.peak.live[name]
        assert name not in there.memory.peak.live
    assert there.host.held["gradients"] == pytest.approx(there.host.held["parameters"], rel=0.01)


def test_activations_on_the_host():
    """Each block leaves its input, which is back when backward needs it."""
    here = estimated(activation_checkpoint={"mode": "full"})
    there = estimated(activation_checkpoint={"mode": "full", "offload": True})
    stream = B * T * 128 * 4
    assert there.host.held["activations"] == 4 * stream
    assert there.host.moved == 8 * stream
    # When the loss is made, all of them are away.
    assert _during_loss(here) - _during_loss(there) == 4 * stream


def _during_loss(found: Estimate) -> int:
    """Bytes of activations at the fullest moment of the head's forward."""
    moments = [m for m in found.memory.timeline if m.part.phase == "forward" and m.part.name == "head"]
    return max(moments, key=lambda moment: moment.total).live.get("activations", 0)


def test_whole_gradients_between_micro_batches():
    """Not reduced before the last micro-batch, they are there in float32, on each of any number of ranks."""
    config = tables(3, training={"global_batch_size": 16, "dtype": "bfloat16", "mixed_precision_param": "auto"})
    found = rehearse(job_from_dict(config, 4, files=False), 4, True, PureBfloat16(one_graph=False))
    live, at_marks = 0, []
    sizes: dict[int, int] = {}
    for event in found.trace.events:
        if event == NEXT_MICRO_BATCH:
            at_marks.append(live)
        elif isinstance(event, Alloc):
            sizes[event.storage] = event.nbytes
            live += event.nbytes
        elif isinstance(event, Free):
            live -= sizes.pop(event.storage)
    n = 2 * V * 128 + 128 + 3 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256 + 2 * 128)
    logits = B * T * V * 2
    assert at_marks[1] - at_marks[0] == pytest.approx(4 * n + logits, rel=0.01)
