"""Classifier-free guidance: boson's generate, with the same speech continued after a second prompt beside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from transformers import DynamicCache

from ds_higgs.batch import ModelInputs
from ds_higgs.module_calls import replaced_forward


@dataclass(frozen=True)
class Guidance:
    """Away from what the model says without a part of the prompt.

    without: the prompt without that part, one sample; it ends as the whole one does.
    scale: logits are those without, plus `scale` times the difference that the part makes; 1 changes nothing.
    """

    without: ModelInputs
    scale: float


@contextmanager
def guided(model: HiggsAudioModel, guidance: Guidance | None) -> Iterator[None]:
    """While open, one call of `model.generate` draws its codes from guided logits."""
    if guidance is None:
        yield
        return
    with replaced_forward(model, _GuidedForward(model, guidance)):
        yield


class _GuidedForward:
    """The model's forward on both prompts; what the second one needs from step to step is kept here."""

    def __init__(self, model: HiggsAudioModel, guidance: Guidance):
        update_wrapper(self, model.forward)  # generate looks up what its own arguments may be
        self._model = model
        self._forward: Callable[..., Any] = model.forward
        self._scale = guidance.scale
        inputs = guidance.without.to(model.device)
        # As in `generate_codes`: segment locations are made in the model.
        first = {name: tensor for name, tensor in inputs.items() if name != "audio_out_ids_start_group_loc"}
        self._input_ids: torch.Tensor | None = first.pop("input_ids")
        self._state: dict[str, Any] = {
            **first,
            "past_key_values": DynamicCache(),
            "use_cache": True,
            "cache_audio_discrete_codes_mask": None,
        }

    def __call__(self, **step: Any) -> Any:
        outputs = self._forward(**step)
        is_prompt = self._input_ids is not None
        without = self._forward(**(self._prompt() if is_prompt else self._continued(step)), return_dict=True)
        self._state = self._model._update_model_kwargs_for_generation(without, self._state)
        if not is_prompt and outputs.audio_logits is not None and outputs.audio_logits.shape[0]:
            # In the prompts' own step nothing is drawn from audio logits, of which the two have unequally many.
            outputs.audio_logits = without.audio_logits + self._scale * (outputs.audio_logits - without.audio_logits)
        return outputs

    def _prompt(self) -> dict[str, Any]:
        input_ids, self._input_ids = self._input_ids, None
        return {"input_ids": input_ids, **self._state}

    def _continued(self, step: dict[str, Any]) -> dict[str, Any]:
        """What the whole prompt's speech goes on with, after this prompt's past."""
        new = {name: step.get(name) for name in ("input_ids", "audio_out_ids", "audio_out_ids_start")}
        past = ("attention_mask", "past_key_values", "use_cache", "cache_audio_discrete_codes_mask")
        return {**{name: self._state[name] for name in past}, **new}
