"""`ds-higgs`, `python -m ds_higgs`, and what `deepspeed --module ds_higgs` starts."""

import signal

_usual_handler = signal.getsignal(signal.SIGINT)
if _usual_handler is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the process without a traceback

from ds_higgs.cli import entry_point  # noqa: E402

signal.signal(signal.SIGINT, _usual_handler)

if __name__ == "__main__":
    entry_point()
