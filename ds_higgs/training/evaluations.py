"""What a run measures of itself between steps: validation losses, and what it says to fixed prompts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

from deepspeed import DeepSpeedEngine

from ds_higgs.batch import Batch
from ds_higgs.data.loader import StepLoader
from ds_higgs.job.logs import logger, phase
from ds_higgs.job.stopping import StopRequests
from ds_higgs.losses import LossWeights
from ds_higgs.speech.in_training import Listener, describe_speech, log_audio, summarise_rows
from ds_higgs.training.metrics import MetricsFile, track
from ds_higgs.training.position import Position
from ds_higgs.training.save_errors import save_errors
from ds_higgs.training.stop_and_onset import Landmarks, describe_ends, known_averages
from ds_higgs.training.validation import Validation, evaluate
from ds_higgs.training.validation_sets import ValidationSet, combine, curves_of
from ds_higgs.training.whole_model import whole_model


class Evaluations:
    """Makes and records the evaluations of a run, as far as there is something to make them on.

    All ranks call its methods together. A stop ends an evaluation between two batches or prompts; nothing of it is
    recorded, and it stays due.

    Args:
        max_batches: of a validation manifest; None for all.
        keep_best: told the values of every evaluation.
        in_place: has the model be the one that is evaluated, and kept, while it is open.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        *,
        validation_sets: Sequence[ValidationSet],
        listener: Listener | None,
        weights: LossWeights,
        landmarks: Landmarks,
        max_batches: int | None,
        metrics: MetricsFile,
        stop_requests: StopRequests,
        keep_best: Callable[[Mapping[str, Any]], None],
        in_place: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self.validation_sets = validation_sets
        self.listener = listener
        self._engine = engine
        self._weights = weights
        self._landmarks = landmarks
        self._max_batches = max_batches
        self._metrics = metrics
        self._stop_requests = stop_requests
        self._keep_best = keep_best
        self._in_place = in_place

    def make(self, position: Position) -> None:
        """Make what is due at this position, unless a stop is asked for."""
        position.validation_due &= bool(self.validation_sets)
        position.listening_due &= self.listener is not None
        if position.validation_due or position.listening_due:
            with self._in_place():
                self._make(position)

    def _make(self, position: Position) -> None:
        if position.validation_due and not self._stop_requests.agreed():
            self._validate(position)
        if self.listener is not None and position.listening_due and not self._stop_requests.agreed():
            self._listen(self.listener, position)

    def _validate(self, position: Position) -> None:
        """Record the losses on the validation manifests."""
        found = []
        for one in self.validation_sets:
            with phase("validating"):
                found.append(self._evaluate_on(one.loader).values())
            if self._stop_requests.is_agreed:
                return
        values = combine(found, self.validation_sets)
        position.validation_due = False
        logger.info(
            "step %d: validation loss %.4f  text %.4f  audio %.4f  %s",
            position.step,
            values["loss"],
            values["text_loss"],
            values["audio_loss"],
            describe_ends(values),
        )
        position.remember_losses(values, "validation")
        self._metrics.write("eval", step=position.step, **values)
        shown = ("loss", "text_loss", "audio_loss")
        shown_values = {name: values[name] for name in shown} | known_averages(values) | curves_of(values)
        track(self._engine, position.step, {f"val/{name}": value for name, value in shown_values.items()})
        self._keep_best(values)

    def _evaluate_on(self, loader: StepLoader) -> Validation:
        # From the first micro-batch on, although `max_batches` may have left the loader in the middle.
        loader.epoch, loader.micro_batches_done = 0, 0
        batches = (batch for [batch] in islice(loader, self._max_batches))
        return evaluate(self._engine, self._until_stopped(batches), self._weights, self._landmarks)

    def _listen(self, listener: Listener, position: Position) -> None:
        """Record what the model says to the fixed validation prompts."""
        step = position.step
        with phase("speaking the validation prompts"), whole_model(self._engine) as model:
            rows = listener.listen(model, step, stop=self._stop_requests.requested_anywhere)
        if self._stop_requests.agreed():
            return
        position.listening_due = False
        for row in rows:
            self._metrics.write("sample", step=step, **row)
        values = summarise_rows(rows)
        self._metrics.write("listening", step=step, num_samples=len(rows), **values)
        logger.info("step %d: %d samples, %s", step, len(rows), describe_speech(values))
        track(self._engine, step, {f"samples/{name}": value for name, value in values.items()})
        with save_errors(tolerate=self._metrics.tolerate_errors):
            log_audio(self._engine, listener.run_dir, rows, step)
        self._keep_best(values)

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self._stop_requests.agreed():
                return
            yield batch
