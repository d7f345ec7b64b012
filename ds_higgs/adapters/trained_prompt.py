"""prompt.json beside an exported adapter or model: the form of prompt in which it was trained."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_higgs.adapters.record import StoredValues
from ds_higgs.data.prompt_forms import FORMS_OF, PromptForms, ReferenceTurn, joint_form
from ds_higgs.files import read_json, write_json

logger = logging.getLogger(__name__)

PROMPT_FILE = "prompt.json"


class TrainedPrompt(StoredValues):
    """`data.prompt_form` and `data.reference_turn` of the run that a model comes from; runs of old had one form."""

    prompt_form: PromptForms = "as_is"
    reference_turn: ReferenceTurn = "as_is"

    @classmethod
    def read(cls, folder: Path) -> "TrainedPrompt | None":
        """What `folder` says; None where it says nothing.

        Raises:
            UserError: the file is not what `write` made.
        """
        path = folder / PROMPT_FILE
        return cls.parse(read_json(path), where=str(path)) if path.exists() else None

    @classmethod
    def of_run(cls, config: Mapping[str, Any], *, where: str) -> "TrainedPrompt":
        """As a run's configuration says, in plain values; `where` is its place."""
        data = config.get("data", {})
        found = {key: data[key] for key in cls.model_fields if key in data}
        if sources := data.get("train"):
            of_all = found.get("prompt_form", "as_is")
            found["prompt_form"] = joint_form([source.get("prompt_form") or of_all for source in sources])
        return cls.parse(found, where=where)

    def write(self, folder: Path) -> None:
        """Put prompt.json into `folder`."""
        write_json(folder / PROMPT_FILE, self.model_dump())

    def warn_of_other(self, *, prompt_form: PromptForms, reference_turn: ReferenceTurn) -> None:
        """Say so where speech is asked for otherwise than it was trained: it is worse then, or fails."""
        if not set(FORMS_OF[prompt_form]) <= set(FORMS_OF[self.prompt_form]):
            forms = self.prompt_form, prompt_form
            logger.warning("the adapter was trained with data.prompt_form %s and is asked in the form %s", *forms)
        elif prompt_form == "as_is" and reference_turn != self.reference_turn:
            turns = self.reference_turn, reference_turn
            logger.warning("the adapter was trained with data.reference_turn %s and is asked with %s", *turns)
