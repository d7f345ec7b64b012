"""The training loop, and what happens every so many steps."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine

from ds_higgs.batch import Batch
from ds_higgs.checkpoint import load_checkpoint, reseed, restore_random_state
from ds_higgs.config import Config
from ds_higgs.config.file import FIXED_BEFORE, fixed_values
from ds_higgs.data.loader import StepLoader
from ds_higgs.files import write_json
from ds_higgs.job.distributed import Ranks
from ds_higgs.job.logs import logger
from ds_higgs.job.stopping import StopRequests
from ds_higgs.losses import LossWeights
from ds_higgs.run_folder import FINAL, RunFolder
from ds_higgs.speech.in_training import Listener
from ds_higgs.training.average import Average, forget_average
from ds_higgs.training.best import Best
from ds_higgs.training.evaluations import Evaluations
from ds_higgs.training.keep_base import KeptBase
from ds_higgs.training.metrics import (
    MetricsFile,
    Progress,
    StepTimer,
    eval_values,
    find_peak,
    json_values,
    source_values,
    step_values,
    track,
)
from ds_higgs.training.position import Position
from ds_higgs.training.profiling import profiling
from ds_higgs.training.results import NonFiniteError, StepResult
from ds_higgs.training.save_errors import save_errors
from ds_higgs.training.saves import Saves
from ds_higgs.training.stop_and_onset import Landmarks
from ds_higgs.training.train_step import train_step
from ds_higgs.training.validation_sets import ValidationSet, curves_of


class Outcome(Enum):
    """How a run ended that did not fail."""

    DONE = "done"
    STOPPED = "stopped"
    NO_BETTER = "no better"


class Trainer:
    """A run in progress: what it trains, where it is, what it writes."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        stop_requests: StopRequests,
        *,
        engine: DeepSpeedEngine,
        train_loader: StepLoader,
        validation_sets: Sequence[ValidationSet],
        listener: Listener | None,
        weights: LossWeights,
        keep: KeptBase | None,
        landmarks: Landmarks,
        total_steps: int,
    ):
        self.config = config
        self.ranks = ranks
        self.stop_requests = stop_requests
        self.engine = engine
        self.train_loader = train_loader
        self.weights = weights
        self.keep = keep
        self.total_steps = total_steps
        self._peak_tokens_per_second = find_peak(engine.module.higgs.config, config, ranks.world_size)
        self.position = Position()
        self.best = Best(
            config.eval.best_by, config.eval.patience, judge=config.eval.best_judge, weights=config.eval.weights
        )
        self.folder = RunFolder(config.run.output_dir)
        self.tolerate = config.checkpoint.on_save_error == "warn"  # files that cannot be written
        self.metrics = MetricsFile(self.folder.metrics_file, enabled=ranks.is_main, tolerate_errors=self.tolerate)
        self.average = None if config.optim.ema_decay is None else Average(engine, config.optim.ema_decay)
        self.saves = Saves(config, engine, folder=self.folder, metrics=self.metrics, average=self.average)
        self.evaluations = Evaluations(
            engine,
            validation_sets=validation_sets,
            listener=listener,
            weights=weights,
            landmarks=landmarks,
            max_batches=config.eval.max_batches,
            metrics=self.metrics,
            stop_requests=stop_requests,
            keep_best=self._keep_best,
            in_place=nullcontext if self.average is None or config.eval.weights != "ema" else self.average.in_place,
        )

    def fit(self) -> Outcome:
        """Train to the last step, or until a stop is asked for, validating and saving on the way."""
        try:
            outcome = self._fit()
        except BaseException:
            self.saves.abandon()
            raise
        self.metrics.write("end", step=self.position.step, reason=outcome.value)
        if outcome is not Outcome.STOPPED:
            logger.info("%s: what was trained is in %s", outcome.value, self.folder.adapters / FINAL)
        return outcome

    def _fit(self) -> Outcome:
        if self.position.step == 0:
            self._note_evaluations()
        self.evaluations.make(self.position)
        progress = Progress(
            total_steps=self.total_steps,
            done_steps=self.position.step,
            bar=self.config.logging.progress,
            log_steps=self.config.logging.log_steps,
            enabled=self.ranks.is_main,
        )
        for epoch, micro_batches, timer in self._steps():
            values = self.train_one_step(epoch, micro_batches, timer)
            progress.step(self.position.step, values)
            self._note_evaluations()
            self.evaluations.make(self.position)
            last = self.stop_requests.is_agreed or self.finished
            if last or self._due(self.config.checkpoint.save_steps):
                self.save(last=last)
        progress.close()
        return self._outcome()

    def train_one_step(self, epoch: int, micro_batches: list[Batch], timer: StepTimer) -> dict[str, Any]:
        """Make one optimizer step and record it; all ranks learn in it whether any of them was asked to stop."""
        learning_rate = self.engine.get_lr()[0]
        num_samples = sum(len(batch.sample_ids) for batch in micro_batches)
        num_tokens = sum(batch.num_tokens for batch in micro_batches)
        try:
            result = train_step(
                self.engine,
                micro_batches,
                self.weights,
                keep=self.keep,
                num_sources=len(self.train_loader.order.names),
                skip_non_finite=self.config.run.on_nonfinite == "skip",
                extra=(num_samples, num_tokens, self.stop_requests.requested(), self.saves.is_ready),
            )
        except NonFiniteError as error:  # on every rank
            self._record_non_finite(micro_batches, error.result)
            self.saves.finish()
            raise
        if not result.applied:
            self._record_non_finite(micro_batches, result)
            self.position.skipped_steps += 1
        num_samples, num_tokens, stop_requests, ready_to_save = (int(total) for total in result.extra)
        self.stop_requests.settle(stop_requests > 0)
        if ready_to_save == self.ranks.world_size:
            self.saves.go_on()
        self.position.advance(samples=num_samples, tokens=num_tokens, audio_targets=result.num_audio_targets)
        if self.average is not None and result.applied:
            self.average.update(self.position.step)
        values = step_values(
            result,
            epoch=epoch,
            learning_rate=learning_rate,
            num_samples=num_samples,
            num_tokens=num_tokens,
            seconds=timer.stop(),
        )
        if self.config.data.train:
            values["sources"] = source_values(result, self.train_loader)
        if self._peak_tokens_per_second is not None:
            values["mfu"] = values["tokens_per_second"] / self._peak_tokens_per_second
        self.position.remember_losses(values, "training")
        self.metrics.write("step", step=self.position.step, **values, skipped_steps=self.position.skipped_steps)
        if self.position.step % self.config.logging.log_steps == 0:
            shown = ("loss", "text_loss", "audio_loss", "learning_rate", "grad_norm", "tokens_per_second")
            shown_values = {name: values[name] for name in shown} | curves_of(values)
            track(self.engine, self.position.step, {f"train/{name}": value for name, value in shown_values.items()})
        return values

    @property
    def finished(self) -> bool:
        """Whether there is no step left to make."""
        return self.position.step == self.total_steps or self.best.is_over

    def _outcome(self) -> Outcome:
        if self.stop_requests.is_agreed and (not self.finished or self.position.events_due()):
            return Outcome.STOPPED
        return Outcome.NO_BETTER if self.best.is_over else Outcome.DONE

    def _note_evaluations(self) -> None:
        """Note what is to be evaluated at this step."""
        every = self.config.eval
        self.position.validation_due = self._due(every.eval_steps)
        self.position.listening_due = self._due(every.audio_every or every.eval_steps)

    def _keep_best(self, values: Mapping[str, Any]) -> None:
        """Save the adapter as adapters/best where an evaluation is the best so far, by `eval.best_by`."""
        if self.best.update(values, step=self.position.step):
            write = partial(self.metrics.write, "best", step=self.position.step)
            done = partial(write, measure=self.best.measure, value=self.best.value)
            self.saves.hand_out_best(self.position, done=done)

    def save(self, *, last: bool) -> None:
        """Save adapter and checkpoint; `last`: the run ends with this step, and not before both are complete."""
        states = {"loader": self.train_loader.state_dict(), "best": self.best.state_dict()}
        also = (FINAL,) if self.finished else ()
        self.saves.save(self.position, states, also=also, may_fail=not last and self.tolerate)
        if last:
            self.saves.finish()

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of this run, or of another one."""
        state, random_state = load_checkpoint(
            self.engine, path, fixed=fixed_values(self.config), fixed_before=FIXED_BEFORE
        )
        if self.average is None:
            forget_average(self.engine)
        else:
            self.average.take_over()
        self.position = Position.from_state(state["position"])
        self.best.load_state_dict(state["best"])
        self.train_loader.load_state_dict(state["loader"])
        if random_state is None:
            reseed(self.config.run.seed, step=self.position.step, rank=self.ranks.rank)
        else:
            restore_random_state(random_state)
        logger.info("going on from %s", path)

    def take_over_folder(self, deepspeed_config: dict[str, Any], *, starts_anew: bool) -> None:
        """Make the run's folder this start's own: its configuration in it, adapters of what it supersedes aside."""
        self.folder.begin(self.config, deepspeed_config)
        self.folder.set_adapters_aside(
            reached=-1 if starts_anew else self.position.step,
            finished=self.finished,
            best_step=None if self.best.value is None else self.best.step,
        )

    def _steps(self) -> Iterator[tuple[int, list[Batch], StepTimer]]:
        """The rest of the run: epoch (from 1), this rank's micro-batches, a timer that started with loading them."""
        timer = StepTimer()
        steps = self.config.logging.profile_steps if self.ranks.is_main else 0
        with profiling(self.folder.profile, steps=steps) as step_done:
            while not self._is_over:
                epoch = self.train_loader.epoch + 1
                timer.start()
                for micro_batches in self.train_loader:
                    yield epoch, micro_batches, timer
                    step_done()
                    if self._is_over:
                        return
                    timer.start()

    @property
    def _is_over(self) -> bool:
        return self.finished or self.stop_requests.is_agreed

    def _due(self, every: int) -> bool:
        return self.position.step % every == 0 or self.position.step == self.total_steps

    def _record_non_finite(self, micro_batches: list[Batch], result: StepResult) -> None:
        """Write down, on each rank, the samples and numbers of a step that was not finite."""
        step = self.position.step + 1
        record = {
            "step": step,
            "rank": self.ranks.rank,
            "samples": [list(batch.sample_ids) for batch in micro_batches],
            **eval_values(result),
            "grad_norm": result.grad_norm,
        }
        with save_errors(tolerate=self.tolerate):
            write_json(self.folder.nonfinite_file(step, self.ranks.rank), json_values(record))
