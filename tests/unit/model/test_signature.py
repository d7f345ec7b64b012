"""The model class check: boson's own passes, forks are refused with the file they come from."""

import pytest
from boson_multimodal.model.higgs_audio import HiggsAudioModel

from ds_higgs.batch import MODEL_INPUT_NAMES
from ds_higgs.errors import UserError
from ds_higgs.model.signature import check_model_class


def make_class(arguments: str) -> type:
    namespace: dict = {}
    exec(f"def forward(self, {arguments}): ...", namespace)
    return type("HiggsAudioModel", (), {"forward": namespace["forward"], "__module__": __name__})


ALL_INPUTS = ", ".join(MODEL_INPUT_NAMES)


def test_bosons_own_class_passes():
    check_model_class(HiggsAudioModel, allow_fork=False)


@pytest.mark.parametrize(
    ("arguments", "found"), [(f"{ALL_INPUTS}, labels=None", "`labels`"), (f"{ALL_INPUTS}, **kwargs", r"`\*\*kwargs`")]
)
def test_extra_arguments_need_allow_fork(arguments: str, found: str):
    fork = make_class(arguments)
    with pytest.raises(UserError, match=found):
        check_model_class(fork, allow_fork=False)
    check_model_class(fork, allow_fork=True)


@pytest.mark.parametrize("allow_fork", [False, True])
def test_every_missing_argument_is_reported(allow_fork: bool):
    with pytest.raises(UserError) as raised:
        check_model_class(make_class("input_ids, attention_mask"), allow_fork=allow_fork)
    assert all(f"`{name}`" in str(raised.value) for name in MODEL_INPUT_NAMES[2:])


def test_the_file_is_named():
    class HiggsAudioModel:
        def forward(self, labels): ...

    with pytest.raises(UserError) as raised:
        check_model_class(HiggsAudioModel, allow_fork=False)
    assert str(raised.value).startswith(__file__)
