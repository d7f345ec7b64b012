"""Warnings about sound: one small function a kind, each over all samples of a manifest."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from ds_higgs.data.clips import Clip
from ds_higgs.data.review.kinds import LIMITS, DataWarning
from ds_higgs.data.review.samples import ReviewedSample
from ds_higgs.data.review.sound import Sound
from ds_higgs.data.review.text_checks import count_letters

Sounds = Mapping[str, Sound]


def find_odd_paces(samples: Sequence[ReviewedSample], sounds: Sounds) -> Iterator[DataWarning]:
    """Letters a second beyond what people say, or far from the set's other texts in that script."""
    paces: list[tuple[ReviewedSample, str, float]] = []
    for sample in samples:
        script, letters = count_letters(sample.text)
        if len(sample.targets) == 1 and letters:
            paces.append((sample, script, letters / sounds[sample.targets[0].key].speech_seconds))
    usual = {script: median(pace for _, of, pace in paces if of == script) for script in {of for _, of, _ in paces}}
    counts = {script: sum(of == script for _, of, _ in paces) for script in usual}
    for sample, script, pace in paces:
        far = max(pace / usual[script], usual[script] / pace) > LIMITS.pace_factor
        tells = counts[script] >= LIMITS.enough and sounds[sample.targets[0].key].seconds >= LIMITS.pace_seconds
        if not LIMITS.slowest <= pace <= LIMITS.fastest or (far and tells):
            speed = "fast" if pace > usual[script] or pace > LIMITS.fastest else "slow"
            others = f"; usual here: {usual[script]:.1f}" if tells else ""
            yield sample.warn("pace", f"too {speed} for its text: {pace:.1f} letters a second{others}")


def find_clipping(samples: Sequence[ReviewedSample], sounds: Sounds) -> Iterator[DataWarning]:
    for sample, what, sound in _clips_of(samples, sounds):
        if sound.clipped_share > LIMITS.clipped_share:
            yield sample.warn("clipping", f"{what} is clipped: {sound.clipped_share:.2%} of it at the highest value")


def find_noise(samples: Sequence[ReviewedSample], sounds: Sounds) -> Iterator[DataWarning]:
    for sample, what, sound in _clips_of(samples, sounds):
        if (distance := sound.level_dbfs - sound.noise_dbfs) < LIMITS.noise_db:
            yield sample.warn("noise", f"{what} is noisy: speech only {distance:.0f} dB above its quietest moments")


def find_odd_loudness(samples: Sequence[ReviewedSample], sounds: Sounds) -> Iterator[DataWarning]:
    levels = [sounds[clip.key].level_dbfs for sample in samples for clip in sample.targets]
    usual = median(levels) if len(levels) >= LIMITS.enough else None
    for sample, what, sound in _clips_of(samples, sounds):
        level = sound.level_dbfs
        far = usual is not None and abs(level - usual) > LIMITS.loudness_db
        if far or not LIMITS.quietest_dbfs <= level <= LIMITS.loudest_dbfs:
            kind = "loud" if level > (LIMITS.loudest_dbfs - 0.01 if usual is None else usual) else "quiet"
            others = f"; usual here: {usual:.0f}" if usual is not None else ""
            yield sample.warn("loudness", f"{what} is too {kind}: {level:.0f} dBFS{others}")


def find_silence(samples: Sequence[ReviewedSample], sounds: Sounds) -> Iterator[DataWarning]:
    for sample in samples:
        for clip in sample.targets:
            sound = sounds[clip.key]
            for seconds, where in ((sound.lead_seconds, "before"), (sound.tail_seconds, "after")):
                if seconds > LIMITS.silence_seconds:
                    yield sample.warn("silence", f"{seconds:.1f} s of silence {where} the speech of the target")


def find_cut_ends(samples: Sequence[ReviewedSample], sounds: Sounds) -> Iterator[DataWarning]:
    for sample in samples:
        for clip in sample.targets:
            if is_cut(sound := sounds[clip.key]):
                distance = sound.level_dbfs - sound.end_dbfs
                yield sample.warn("cut", f"the target ends in speech: only {distance:.0f} dB below it")


def is_cut(sound: Sound) -> bool:
    """Whether the clip ends before its speech has died away."""
    return sound.level_dbfs - sound.end_dbfs < LIMITS.cut_db


def find_low_rates(samples: Sequence[ReviewedSample], sounds: Sounds) -> Iterator[DataWarning]:
    for sample, what, sound in _clips_of(samples, sounds):
        if sound.rate < LIMITS.lowest_rate:
            yield sample.warn("bandwidth", f"{what} has {sound.rate} Hz, the sound of a telephone")


def _clips_of(samples: Sequence[ReviewedSample], sounds: Sounds) -> Iterator[tuple[ReviewedSample, str, Sound]]:
    """Every sample's clips, each once, with what they are there for."""
    for sample in samples:
        kinds: tuple[tuple[str, Sequence[Clip]], ...] = (("target", sample.targets), ("reference", sample.references))
        for what, clips in kinds:
            for clip in clips:
                yield sample, f"the {what}", sounds[clip.key]


SOUND_CHECKS = (
    find_odd_paces,
    find_clipping,
    find_noise,
    find_odd_loudness,
    find_silence,
    find_cut_ends,
    find_low_rates,
)
