"""Make the recordings that are kept here: of a voice that the base has never heard, and of sentences to judge by.

    python examples/small_base/make_recordings.py

`new_voice/` has 40 recordings to tune the base with, and 20 of sentences that nobody trains on, to be asked for without
a reference. `judged/` has these 20 by two voices of the base, each with a reference. Needs espeak-ng 1.51 or later on
the PATH.
"""

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from make_speech import Utterance, build_sample, require_espeak
from speech import LANGUAGES, NEW_SPEAKER, SPEAKERS, Language, Speaker, split_sentences

SEED = 0  # of make_speech.py: it decides which sentences are kept from training
NEW_VOICE_PER_LANGUAGE = 20
JUDGED_PER_LANGUAGE = 10
JUDGING_SPEAKERS = tuple(speaker for speaker in SPEAKERS if speaker.name in ("low_3", "high_2"))

Spoken = tuple[str, Language]


def judged_sentences() -> list[Spoken]:
    """Sentences that are in no training set, of every pattern."""
    return [
        (text, language) for language in LANGUAGES for text in split_sentences(language, SEED)[1][:JUDGED_PER_LANGUAGE]
    ]


def new_voice_sentences() -> list[Spoken]:
    """What the new voice says to be learned, of the base's training part: patterns in turn, the rarest words first."""
    chosen = []
    for language in LANGUAGES:
        patterns = split_sentences(language, SEED)[0]
        said: Counter[str] = Counter()
        for index in range(NEW_VOICE_PER_LANGUAGE):
            sentence = min(patterns[index % len(patterns)], key=lambda text: sum(said[word] for word in text.split()))
            said.update(sentence.split())
            chosen.append((sentence, language))
    return chosen


def read_out(name: str, sentences: Sequence[Spoken], speaker: Speaker, folder: Path) -> list[Utterance]:
    """The utterances `folder`/audio/NAME_NN.flac of `sentences` by `speaker`."""
    return [
        Utterance(folder / "audio" / f"{name}_{index:02d}.flac", text, language, speaker)
        for index, (text, language) in enumerate(sentences)
    ]


def pair(targets: Sequence[Utterance], references: Sequence[Utterance]) -> Iterator[dict]:
    """A sample for each target, with the next of `references` (round the circle) as its reference."""
    for index, target in enumerate(targets):
        yield build_sample(target, references[(index + 1) % len(references)])


def build_all(out: Path) -> tuple[list[Utterance], dict[Path, list[dict]]]:
    """Every utterance, and the samples of every manifest, below `out`."""
    learned = read_out("learned", new_voice_sentences(), NEW_SPEAKER, out / "new_voice")
    unheard = read_out("judged", judged_sentences(), NEW_SPEAKER, out / "new_voice")
    judged = [read_out(speaker.name, judged_sentences(), speaker, out / "judged") for speaker in JUDGING_SPEAKERS]
    manifests = {
        out / "new_voice" / "train.json": list(pair(learned, learned)),
        out / "new_voice" / "val.json": [build_sample(utterance) for utterance in unheard],
        out / "judged" / "judged.json": [sample for utterances in judged for sample in pair(utterances, utterances)],
    }
    return [*learned, *unheard, *itertools.chain(*judged)], manifests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: this one)")
    out = parser.parse_args().out
    require_espeak(parser)
    utterances, manifests = build_all(out)
    for utterance in utterances:
        utterance.write()
    for file, samples in manifests.items():
        file.write_text(json.dumps(samples, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        print(f"{file.name}: {len(samples)} samples")


if __name__ == "__main__":
    main()
