"""What every section of the configuration is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the configuration: unknown keys are refused, values cannot be changed after validation.

    A key that is a word of Python's own, such as `async`, is the alias of a field that ends with `_`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), serialize_by_alias=True)

    @classmethod
    def key_of(cls, field: str) -> str:
        """The key that a field is set by."""
        return cls.model_fields[field].alias or field
