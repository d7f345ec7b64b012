"""The configuration: its sections, its file, and the one source of every default."""

from ds_higgs.config.section import Section
from ds_higgs.config.sections import (
    Config,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    LossConfig,
    OptimConfig,
    ZeroConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "EvalConfig",
    "LoggingConfig",
    "LossConfig",
    "OptimConfig",
    "Section",
    "ZeroConfig",
]
