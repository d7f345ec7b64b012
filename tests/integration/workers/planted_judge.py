"""`ds_higgs` with a recogniser that hears what is planted: PLANTED is JSON, by step what it hears in every sample."""

import json
import os
from typing import Any

from ds_higgs.cli.main import entry_point
from ds_higgs.speech.in_training import Listener
from ds_higgs.speech.judges import Transcriber

planted = json.loads(os.environ["PLANTED"])
usual_listen = Listener.listen
heard = ""


def listen(self: Listener, model: Any, step: int, **kwargs: Any) -> list[dict[str, Any]]:
    global heard
    heard = planted[str(step)]
    return usual_listen(self, model, step, **kwargs)


Listener.listen = listen  # type: ignore[method-assign]
Transcriber.load = Transcriber.move_to = lambda *_: None  # type: ignore[method-assign]
Transcriber.num_bytes = 0  # type: ignore[assignment, method-assign]
Transcriber.transcribe = lambda *_, **__: heard  # type: ignore[method-assign]

if __name__ == "__main__":
    entry_point()
