"""`python -m ds_higgs`, and what `deepspeed --module ds_higgs` starts."""

from ds_higgs.cli import entry_point

entry_point()
