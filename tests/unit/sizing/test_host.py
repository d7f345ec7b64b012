"""CPU memory of the copies that are saved, as counted in runs of mode full on two ranks."""

import pytest

from ds_higgs.sizing.host import estimate_host_memory
from ds_higgs.sizing.inputs import Policy

TRAINED = 3_217_536


@pytest.mark.parametrize(
    ("settings", "checkpoint", "best"),  # bytes of a trained weight on rank 0, as HostCopies had them
    [
        ({"zero_stage": 0}, 14, 2),
        ({"zero_stage": 2, "averaged": True}, 10, 2),
        ({"zero_stage": 2, "element_bytes": 4}, 10, 4),
        ({"zero_stage": 3}, 6, 2),
    ],
)
def test_copies_are_those_that_were_counted(settings, checkpoint, best):
    policy = Policy(world_size=2, async_saves=True, keeps_best=True, **settings)
    found = estimate_host_memory(policy, trainable=TRAINED)
    assert found == {
        "offloaded optimizer": 0,
        "copy of a checkpoint": checkpoint * TRAINED,
        "copy of the best": best * TRAINED,
    }


def test_an_offloaded_optimizer_is_split_and_what_is_not_asked_for_takes_nothing():
    found = estimate_host_memory(Policy(world_size=8, offload_optimizer=True), trainable=800)
    assert found == {"offloaded optimizer": 1200, "copy of a checkpoint": 0, "copy of the best": 0}
