"""The base inside an adapted model: its forward as if nothing had been put on it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper


class AdapterSwitch:
    """Turns a model's adapter off and on again.

    PEFT's own `disable_adapter` takes and gives `requires_grad`, which DeepSpeed has tied hooks to, and walks over all
    parameters each time.
    """

    def __init__(self, model: PeftModel):
        self._model = model
        kinds = (BaseTunerLayer, ModulesToSaveWrapper)
        self._layers = [module for module in model.modules() if isinstance(module, kinds)]
        originals = [layer.original_module for layer in self._layers if isinstance(layer, ModulesToSaveWrapper)]
        assert all(original is not None for original in originals), "see whole_modules.release_originals"

    @contextmanager
    def off(self) -> Iterator[None]:
        """While open, the layers do what the base's do, without gradients."""
        self._switch(disabled=True)
        try:
            with torch.no_grad():
                yield
        finally:
            self._switch(disabled=False)

    @contextmanager
    def base(self) -> Iterator[None]:
        """While open, the whole model is its base, and draws no random number."""
        was_training = self._model.training
        self._model.eval()
        try:
            with self.off():
                yield
        finally:
            self._model.train(was_training)

    def _switch(self, *, disabled: bool) -> None:
        for layer in self._layers:
            layer._disable_adapters = disabled
