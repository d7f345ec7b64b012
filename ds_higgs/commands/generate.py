"""Speaks a text, or a whole manifest, with a base checkpoint and an adapter, to WAV files."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from ds_higgs import setup
from ds_higgs.adapters.opening import Adapter, open_adapter
from ds_higgs.adapters.trained_prompt import TrainedPrompt
from ds_higgs.commands.voice import Voice
from ds_higgs.config import Config, DataConfig, LossConfig
from ds_higgs.data.build import OnBadSample
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.prompt_forms import PromptForm, ReferenceTurn, served_form
from ds_higgs.data.prompts import Prompt, build_voice_prompt, choose_prompts, collate_prompt
from ds_higgs.errors import UserError
from ds_higgs.job.logs import phase
from ds_higgs.model.generation import GeneratedCodes, Sampling, generate_codes, max_frames_for
from ds_higgs.model.guidance import Guidance
from ds_higgs.model.loading import DTYPES, resolve_base
from ds_higgs.speech.samples import Synthesizer, save_wav, speak_all

# In which a base that was trained by nobody known is asked: it knows the form that servers send.
FORM_OF_BASES: PromptForm = "boson"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VoiceOptions:
    """Which model speaks, and what is to be other than in the run that it comes from.

    base: folder or hub id; None: the one that the adapter names.
    read_as: the adapter whose run says how manifests and losses are read; None: `adapter`.
    step: of a run, for `adapter` and `read_as`.
    lora_scale: how much of the adapter: 0 is the base, 1 what was trained.
    codec, prompt_form, reference_turn, on_bad_sample, max_audio_s, cache_dir: of the configuration's data; None: as in
        the run, or its default where there is none; of a base alone the prompt form is FORM_OF_BASES.
    """

    base: str | None = None
    revision: str | None = None
    adapter: Path | None = None
    read_as: Path | None = None
    step: int | None = None
    lora_scale: float = 1.0
    device: str | None = None
    precision: str | None = None
    codec: str | None = None
    prompt_form: PromptForm | None = None
    reference_turn: ReferenceTurn | None = None
    on_bad_sample: OnBadSample | None = None
    max_audio_s: float | None = None
    cache_dir: Path | None = None


@dataclass(frozen=True)
class SpeechOptions:
    """How it speaks.

    cfg_scale: how far from what a prompt without reference would say; 1 is the prompt alone.
    """

    sampling: Sampling
    seed: int = 0
    max_seconds: float = 30.0
    cfg_scale: float = 1.0


@dataclass(frozen=True)
class Reference:
    """The voice to speak in: a recording and what it says."""

    audio: Path | None = None
    text: str | None = None


def load_voice(options: VoiceOptions) -> tuple[Voice, LossConfig]:
    """Load the model that `options` names, which reads manifests as the run did that its adapter comes from.

    Returns:
        the model, and how that run sums its losses up.

    Raises:
        UserError: for what is missing or does not fit.
    """
    source = options.adapter or options.read_as
    if source is None:
        if options.base is None:
            raise UserError("no model: expected --base, or --adapter with an adapter that names its base")
        if options.lora_scale != 1:
            raise UserError("--lora-scale: no adapter to scale; expected --adapter")
        folder = resolve_base(options.base, options.revision)
        trained = TrainedPrompt.read(folder)
        if trained is None and options.prompt_form is None:
            logger.info(
                "%s is asked in the form %s, as servers do; --prompt-form asks in another", folder, FORM_OF_BASES
            )
            options = replace(options, prompt_form=FORM_OF_BASES)
        return _load(options, folder, None, None, trained)
    with open_adapter(source, step=options.step, base=options.base) as opened:
        folder = resolve_base(opened.base, options.revision or opened.revision)
        adapter = opened if options.adapter else None
        return _load(options, folder, adapter, opened.run_config(), opened.prompt())


def _load(
    options: VoiceOptions, folder: Path, adapter: Adapter | None, run: Config | None, trained: TrainedPrompt | None
) -> tuple[Voice, LossConfig]:
    data = _read_data_as(options, run, trained)
    if trained is not None:
        trained.warn_of_other(prompt_form=data.prompt_form, reference_turn=data.reference_turn)
    rules = setup.validation_rules(setup.build_sample_rules(data, folder))
    voice = Voice.load(
        folder,
        adapter,
        rules=rules,
        on_bad_sample=data.on_bad_sample,
        cache_dir=setup.code_cache_dir(data),
        device=options.device,
        dtype=None if options.precision is None else DTYPES[options.precision],
        lora_scale=options.lora_scale,
    )
    return voice, LossConfig() if run is None else run.loss


def _read_data_as(options: VoiceOptions, run: Config | None, trained: TrainedPrompt | None) -> DataConfig:
    """The data section of the run, or its defaults where there is none, with what the options change."""
    data = DataConfig(train_manifest=Path("none")) if run is None else run.data
    data = data if trained is None else data.model_copy(update=trained.model_dump())
    names = ("codec", "prompt_form", "reference_turn", "on_bad_sample", "max_audio_s", "cache_dir")
    changes = {name: value for name in names if (value := getattr(options, name)) is not None}
    return data.model_copy(update=changes)


def speak_text(text: str, out: Path, *, voice: Voice, reference: Reference, speech: SpeechOptions) -> GeneratedCodes:
    """Speak `text` in the voice of `reference` to the WAV file `out`; return the codes and what ended them.

    Raises:
        UserError: for a reference that cannot be used, and where nothing was said before the end.
    """
    prompt = build_prompt(text, voice=voice, reference=reference)
    guidance = None
    if speech.cfg_scale != 1:
        without = build_prompt(text, voice=voice, reference=Reference())
        guidance = Guidance(collate_prompt(without, voice.collator), speech.cfg_scale)
    with phase("speaking"):
        spoken = generate_codes(
            voice.model,
            collate_prompt(prompt, voice.collator),
            max_frames=max_frames_for(
                speech.max_seconds, sampling_rate=voice.codec.sampling_rate, hop_length=voice.codec.hop_length
            ),
            sampling=speech.sampling,
            seed=speech.seed,
            guidance=guidance,
        )
    if spoken.codes.shape[1] == 0:
        raise UserError(f"the model ended its speech at once (seed {speech.seed}); nothing was written")
    save_wav(out, voice.codec.decode(spoken.codes), voice.codec)
    return spoken


def build_prompt(text: str, *, voice: Voice, reference: Reference) -> Prompt:
    """The prompt for `text`, as a training sample of the same layout begins."""
    if not text.strip():
        raise UserError("the text to speak is empty")
    rules = voice.rules
    if reference.audio is not None and rules.layout.whisper:
        raise UserError("--reference: not for a base with a Whisper tower; expected --manifest with a sample of it")
    codes = None if reference.audio is None else voice.encode(reference.audio)
    try:
        return build_voice_prompt(
            text,
            reference_text=reference.text,
            reference_codes=codes,
            form=served_form(rules.prompt_form),
            reference_turn=rules.reference_turn,
            tokenizer=rules.tokenizer,
            layout=rules.layout,
        )
    except BadSampleError as error:
        raise UserError(f"--reference-text is missing: {error}; expected {error.expected}") from None


def speak_manifest(manifest: Path, out: Path, *, voice: Voice, speech: SpeechOptions, count: int | None) -> list[dict]:
    """Speak up to `count` samples of a manifest (None: all) to `out`/NNN.wav, their measures to samples.jsonl.

    Target and reference of each, as the codec gives them back, go to `out`/target and `out`/reference.
    """
    items = choose_prompts(voice.read_manifest(manifest), voice.collator, count=count)
    if not items:
        raise UserError(f"{manifest}: no sample has assistant audio to speak")
    synthesizer = Synthesizer(voice.codec, sampling=speech.sampling, seed=speech.seed, max_seconds=speech.max_seconds)
    synthesizer.save_originals(out, items)
    rows = speak_all(voice.model, items, synthesizer, out)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    return rows
