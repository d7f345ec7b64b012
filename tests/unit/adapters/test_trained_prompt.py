"""The form of prompt that a run leaves behind."""

import pytest

from ds_higgs.adapters.trained_prompt import TrainedPrompt


@pytest.mark.parametrize(
    ("data", "form"),
    [
        ({}, "as_is"),
        ({"prompt_form": "boson", "train": []}, "boson"),
        ({"prompt_form": "as_is", "train": [{"prompt_form": "boson"}, {"prompt_form": "boson"}]}, "boson"),
        ({"prompt_form": "boson", "train": [{"prompt_form": None}, {"prompt_form": "boson"}]}, "boson"),
        ({"prompt_form": "as_is", "train": [{"prompt_form": None}, {"prompt_form": "boson"}]}, "mixed"),
    ],
)
def test_a_mixture_of_forms_is_one_form(data, form):
    assert TrainedPrompt.of_run({"data": data}, where="a run").prompt_form == form
