"""The whole model in every rank's hands, for work that the ranks do each for itself, such as speaking."""

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
from deepspeed import DeepSpeedEngine

from ds_higgs.model.loading import HiggsAudioModel
from ds_higgs.module_calls import without_hooks

SPLITTING_STAGE = 3  # of ZeRO: the one that splits the weights


@contextmanager
def whole_model(engine: DeepSpeedEngine) -> Iterator[HiggsAudioModel]:
    """The HiggsAudioModel inside an engine; of ZeRO-3, all ranks gather it together, once, and let it go afterwards.

    Its weights are not to be changed meanwhile. A rank then holds all of them. The hooks by which ZeRO-3 gathers and
    releases each module's weights are off: with them, ranks that call the model unequally often would wait without end.
    """
    model = engine.module.higgs
    if engine.zero_optimization_stage() != SPLITTING_STAGE:
        yield model
        return
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=None), without_hooks(model):
        yield model
