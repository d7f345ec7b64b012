"""What every section of the configuration is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the configuration: unknown keys are refused, values cannot be changed after validation."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
