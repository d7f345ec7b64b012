"""Refuses a model class whose forward would take labels, or lacks an argument that training passes."""

import inspect

from ds_higgs.batch import MODEL_INPUT_NAMES
from ds_higgs.errors import UserError

_FORBIDDEN = ("labels",)


def check_model_class(model_class: type, *, allow_fork: bool) -> None:
    """Check the signature of `model_class.forward` before any weight is read.

    With `allow_fork` a forward that has `labels` or `**kwargs` passes: training never fills them. An argument that
    training needs must be there in any case.

    Raises:
        UserError: naming the file that the class was imported from.
    """
    parameters = inspect.signature(model_class.forward).parameters  # type: ignore[attr-defined]
    problems = [f"its forward lacks the argument `{name}`" for name in MODEL_INPUT_NAMES if name not in parameters]
    if not allow_fork:
        problems += [f"its forward has the argument `{name}`" for name in _FORBIDDEN if name in parameters]
        problems += [
            f"its forward takes `**{parameter.name}`, which would swallow labels"
            for parameter in parameters.values()
            if parameter.kind is inspect.Parameter.VAR_KEYWORD
        ]
    if problems:
        title = (
            f"{_source_file(model_class)}: this {model_class.__name__} is not boson_multimodal's own "
            "(expected version 0.1.1: no labels, no loss inside)"
        )
        hint = "install it with `pip install --no-deps boson-multimodal==0.1.1`"
        if not allow_fork:
            hint += ", or set model.allow_fork to accept a forward with extra arguments"
        raise UserError.from_problems(title, [*problems, hint])


def _source_file(model_class: type) -> str:
    try:
        return inspect.getsourcefile(model_class) or model_class.__module__
    except (OSError, TypeError):  # defined in an interactive session or in C
        return model_class.__module__
