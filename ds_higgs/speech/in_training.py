"""Lets a run be heard while it trains: the same validation prompts again and again, each rank its share."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from ds_higgs.batch import FixedPrompt
from ds_higgs.job.distributed import Ranks
from ds_higgs.model.loading import HiggsAudioModel
from ds_higgs.run_folder import RunFolder, step_name
from ds_higgs.speech.judging import ERROR_RATES, NOBODY, Judges, error_rates
from ds_higgs.speech.measures import average
from ds_higgs.speech.samples import Synthesizer, speak_all

# Of the rows of one step: what is averaged.
_AVERAGED = ("code_accuracy", "duration_ratio", "silence_share", "mel_cepstral_distance", "speaker_similarity")


class Listener:
    """Speaks, measures and saves the fixed prompts of a run.

    Args:
        prompts: of all ranks; with their texts, where `judges` has a transcriber.
        judges: loaded, on the CPU.
        judge_device: where they are while they listen.
    """

    def __init__(
        self,
        prompts: Sequence[FixedPrompt],
        synthesizer: Synthesizer,
        *,
        run_dir: Path,
        ranks: Ranks,
        judges: Judges = NOBODY,
        judge_device: torch.device | str = "cpu",
    ):
        self.run_dir = run_dir
        self._judges = judges
        self._judge_device = judge_device
        self._own = prompts[ranks.rank :: ranks.world_size]
        self._synthesizer = synthesizer
        self._ranks = ranks
        self._originals_saved = False

    def listen(
        self, model: HiggsAudioModel, step: int, *, stop: Callable[[], bool] = lambda: False
    ) -> list[dict[str, Any]]:
        """Speak to samples/step-XXXXXXXX/NNN.wav; the rows of all ranks, in the prompts' order, on every rank.

        `stop` is asked at every frame whether to leave the rest. Draws nothing from the random state of training.
        """
        folder = RunFolder(self.run_dir).samples
        if not self._originals_saved:  # by this start: the prompts of an earlier one may have been others
            self._synthesizer.save_originals(folder, self._own)
            self._originals_saved = True
        with self._judges.on(self._judge_device):
            rows = speak_all(
                model, self._own, self._synthesizer, folder / step_name(step), judges=self._judges, stop=stop
            )
        for row in rows:
            row["file"] = str(Path(row["file"]).relative_to(self.run_dir))
        return sorted(self._gather(rows), key=lambda row: row["number"])

    def _gather(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self._ranks.world_size == 1:
            return rows
        gathered: list[list[dict[str, Any]]] = [[] for _ in range(self._ranks.world_size)]
        dist.all_gather_object(gathered, rows)
        return [row for share in gathered for row in share]


def summarise_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Averages over the rows of one step, the share that the model ended itself, errors over all words together."""
    plain = [{key: row.get(key) for key in _AVERAGED} | {"stop_rate": row.get("stopped_by") == "eos"} for row in rows]
    return average(plain) | error_rates(rows)


def describe_speech(values: Mapping[str, float]) -> str:
    """One line of what `summarise_rows` found."""
    said = [f"{100 * values['stop_rate']:.0f} % ended by the model"]
    if "word_error_rate" in values:
        words, characters = (100 * values[name] for name in ERROR_RATES.values())
        said.append(f"{words:.1f} % of words and {characters:.1f} % of characters wrong")
    if "speaker_similarity" in values:
        said.append(f"similarity of the voices {values['speaker_similarity']:.3f}")
    return ", ".join(said)


def log_audio(engine: DeepSpeedEngine, run_dir: Path, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Add the rows' WAV files to TensorBoard, where it is on; on rank 0."""
    if engine.monitor.tb_monitor is None:
        return
    writer = engine.monitor.tb_monitor.summary_writer
    for row in rows:
        waveform, rate = soundfile.read(run_dir / row["file"], dtype="float32")
        if len(waveform):
            writer.add_audio(f"samples/{row['number']:03d} {row['sample_id']}", waveform[None], step, sample_rate=rate)
    writer.flush()
