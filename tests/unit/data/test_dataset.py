"""From manifest to samples and batches, against boson's own functions and the real model."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample

from ds_higgs.batch import IGNORE_INDEX
from ds_higgs.data.audio import Segment, decode
from ds_higgs.data.build import build_dataset
from ds_higgs.data.chatml import parse_sample
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.loader import StepLoader
from ds_higgs.data.manifest import problem_at
from ds_higgs.data.order import EpochOrder
from ds_higgs.data.problems import write_rejected
from ds_higgs.data.ranks import RankChannel
from ds_higgs.errors import UserError
from ds_higgs.job.stopping import Stopped
from ds_higgs.model.loading import load_model
from tests.support.rank_threads import RankThreads

from .audio_files import RATE, cloning_sample, text_sample, write_tone
from .conftest import write_mixed_manifest

NUM_CODEBOOKS = 8


def audio_paths(sample):
    contents = [item for message in sample["messages"] for item in message["content"] if isinstance(item, dict)]
    return [item["audio_url"] for item in contents if item["type"] == "audio"]


def test_samples_hold_bosons_tokens_and_the_codecs_codes(mixed_manifest, mixed_dataset, make_rules, codec_source):
    rules = make_rules()
    codec = codec_source.load()
    samples = json.loads(mixed_manifest.read_text())
    assert len(mixed_dataset) == len(samples)
    for index, data in enumerate(samples):
        found = mixed_dataset[index]
        tokens, labels, _, _ = prepare_chatml_sample(parse_sample(data), rules.tokenizer)
        assert found.input_ids.tolist() == tokens
        assert found.label_ids.tolist() == labels
        assert found.num_audios() == len(audio_paths(data))
        for place, name in enumerate(audio_paths(data)):
            waveform = decode(mixed_manifest.parent / name, Segment(), sampling_rate=codec.sampling_rate)
            assert torch.equal(found.get_audio_codes(place), codec.encode([waveform])[0])


def test_lengths_are_the_models_expanded_lengths(tiny_base, mixed_dataset, make_rules):
    model = load_model(tiny_base, dtype=torch.float32)
    collator = BatchCollator(make_rules().layout)
    batch = collator([mixed_dataset[index] for index in range(len(mixed_dataset))], ["id"] * len(mixed_dataset))
    with torch.no_grad():
        expanded = model(**batch.model_inputs).attention_mask
    assert expanded.sum(1).tolist() == mixed_dataset.lengths.tolist()
    assert batch.num_tokens == int(expanded.sum())


def test_the_number_of_targets_is_the_same_in_every_epoch(mixed_dataset, make_rules):
    """The stock collator can write into the samples' labels, and then masks their audio from the second epoch on."""
    loader = StepLoader(EpochOrder(mixed_dataset, batch_size=2), BatchCollator(make_rules().layout))
    counts = []
    for _ in range(3):
        batches = [batch for step in loader for batch in step]
        counts.append(
            (
                sum(int((batch.labels.audio != IGNORE_INDEX).sum()) for batch in batches),
                sum(int((batch.labels.text != IGNORE_INDEX).sum()) for batch in batches),
            )
        )
    frames = sum(mixed_dataset.count_targets(index)[1] for index in range(len(mixed_dataset)))
    segments = len(mixed_dataset) - 1  # each sample but the one of text has one target
    assert counts == [(NUM_CODEBOOKS * (frames + segments), counts[0][1])] * 3


def test_collating_a_sample_twice_gives_the_same_batch(mixed_dataset, make_rules):
    collator = BatchCollator(make_rules().layout)
    samples = [mixed_dataset[0], mixed_dataset[3]]
    first, second = collator(samples, ["a", "b"]), collator(samples, ["a", "b"])
    assert torch.equal(first.labels.audio, second.labels.audio)
    assert torch.equal(first.labels.text, second.labels.text)
    assert int((second.labels.audio != IGNORE_INDEX).sum()) > 0


@pytest.mark.parametrize("writes_into_labels", [False, True])
def test_samples_are_left_as_they_are_even_by_a_collator_that_writes_into_them(
    mixed_dataset, make_rules, writes_into_labels
):
    collator = BatchCollator(make_rules().layout)
    if writes_into_labels:
        collator._collate.mask_audio_out_token_label = True
    sample = mixed_dataset[0]
    before = sample.label_ids.clone()
    batch = collator([sample], ["a"])
    assert torch.equal(sample.label_ids, before)
    if not writes_into_labels:
        assert torch.equal(batch.labels.text[0, : len(before)], before)


def test_reference_turns_before_start_index_are_not_learned(mixed_dataset, make_rules):
    masked = len(mixed_dataset) - 1
    sample = mixed_dataset[masked]
    assert sample.num_audios() == 3
    batch = BatchCollator(make_rules().layout)([sample], ["id"])
    first_segment, second_segment = batch.model_inputs["audio_out_ids_start"].tolist()
    assert (batch.labels.audio[:, first_segment:second_segment] == IGNORE_INDEX).all()
    target_frames = sample.get_audio_codes(2).shape[1]
    assert int((batch.labels.audio[:, second_segment:] != IGNORE_INDEX).sum()) == 8 * (target_frames + 1)


def test_every_segment_of_audio_labels_begins_masked(mixed_dataset, make_rules):
    batch = BatchCollator(make_rules().layout)([mixed_dataset[index] for index in range(5)], ["id"] * 5)
    starts = batch.model_inputs["audio_out_ids_start"]
    assert len(starts) == 5
    assert (batch.labels.audio[:, starts] == IGNORE_INDEX).all()


def test_without_any_audio_the_codes_keep_their_codebook_axis(mixed_dataset, make_rules, tiny_base):
    text_only = len(mixed_dataset) - 2
    batch = BatchCollator(make_rules().layout)([mixed_dataset[text_only]], ["id"])
    assert batch.labels.audio.shape == (NUM_CODEBOOKS, 0)
    assert batch.model_inputs["audio_out_ids"].shape == (NUM_CODEBOOKS, 0)
    assert batch.model_inputs["audio_in_ids"].shape == (NUM_CODEBOOKS, 0)
    with torch.no_grad():
        outputs = load_model(tiny_base, dtype=torch.float32)(**batch.model_inputs)
    assert int(outputs.attention_mask.sum()) == batch.num_tokens == mixed_dataset.lengths[text_only]


def test_ranks_build_the_same_dataset_together(mixed_manifest, make_rules, tmp_path, mixed_dataset):
    threads = RankThreads(2)

    def build(rank):
        ranks = RankChannel(rank, 2, threads.gather_of(rank))
        return build_dataset(mixed_manifest, rules=make_rules(), cache_dir=tmp_path, ranks=ranks)

    for dataset in threads.run(build):
        assert len(dataset) == len(mixed_dataset)
        np.testing.assert_array_equal(dataset.lengths, mixed_dataset.lengths)
        for index in range(len(dataset)):
            assert dataset.sample_id(index) == mixed_dataset.sample_id(index)
            assert torch.equal(dataset[index].input_ids, mixed_dataset[index].input_ids)
            assert torch.equal(dataset[index].audio_ids_concat, mixed_dataset[index].audio_ids_concat)


@pytest.mark.parametrize("phase", ["analysis", "encoding"])
def test_one_rank_that_is_asked_to_stop_ends_the_preparation_of_all(mixed_manifest, make_rules, tmp_path, phase):
    """Rank 1 is asked; what rank 0 has encoded by then stays, and no data set comes out on either."""
    threads = RankThreads(2)

    def build(rank):
        asked = phase == "analysis"

        def stop_here():
            nonlocal asked
            threads.wait()
            if asked:
                raise Stopped
            asked = True  # in the next phase

        ranks = RankChannel(
            rank, 2, threads.gather_of(rank), stop_requested=lambda: rank == 1 and asked, stop_here=stop_here
        )
        with pytest.raises(Stopped):
            build_dataset(mixed_manifest, rules=make_rules(), cache_dir=tmp_path, ranks=ranks)

    threads.run(build)
    assert any(tmp_path.glob("codes/*/units/*.arrow")) == (phase == "encoding")


@pytest.fixture
def manifest_with_bad_samples(tmp_path):
    manifest = write_mixed_manifest(tmp_path / "data", num_cloning=3)
    folder = manifest.parent
    write_tone(folder / "short.wav", 0.02)
    write_tone(folder / "silent.wav").write_bytes(b"RIFF")
    samples = json.loads(manifest.read_text())
    samples[1:1] = [
        {"messages": [{"role": "robot", "content": "x"}]},
        cloning_sample("reference0.wav", "absent.wav"),
        cloning_sample("silent.wav", "short.wav"),
    ]
    manifest.write_text(json.dumps(samples))
    return manifest


def test_all_problems_are_reported_at_once(manifest_with_bad_samples, make_rules, tmp_path):
    with pytest.raises(UserError) as caught:
        build_dataset(manifest_with_bad_samples, rules=make_rules(), cache_dir=tmp_path / "cache")
    title, *lines = str(caught.value).splitlines()
    assert "train.json: 3 samples have problems" in title
    assert [line.split(": ")[0].strip(" -") for line in lines] == ["train.json:1", "train.json:2"] + [
        "train.json:3"
    ] * 2
    folder = manifest_with_bad_samples.parent
    assert "unknown role 'robot'" in lines[0]
    assert f": target audio {folder}/absent.wav: file not found" in lines[1]
    assert f": reference audio {folder}/silent.wav: the audio cannot be opened" in lines[2]
    assert f": target audio {folder}/short.wav: too short: 0.020 s" in lines[3]


@pytest.mark.parametrize("as_raw_audio", [False, True])
def test_what_decoding_finds_names_the_audio_and_what_it_is_for(make_rules, tmp_path, as_raw_audio):
    """Silence and the like are found after the headers, clip by clip, and told for every sample that has the clip."""
    good, silent = write_tone(tmp_path / "good.wav", 0.3), tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros(RATE), RATE)
    samples = [cloning_sample(good.name, silent.name), cloning_sample(silent.name, good.name)]
    if as_raw_audio:
        item = {"type": "audio", "raw_audio": base64.b64encode(silent.read_bytes()).decode()}
        samples[0]["messages"][2]["content"] = samples[1]["messages"][1]["content"][1] = item
    samples.append(cloning_sample(silent.name, silent.name, start_index=2))
    manifest = tmp_path / "train.json"
    manifest.write_text(json.dumps(samples))
    with pytest.raises(UserError) as caught:
        build_dataset(manifest, rules=make_rules(), cache_dir=tmp_path / "cache")
    name = "(`raw_audio`, number 1 of the sample)" if as_raw_audio else silent
    reason = "the audio is silent (all samples equal)"
    assert str(caught.value).splitlines()[1:] == [
        f"  - train.json:0: target audio {name}: {reason}",
        f"  - train.json:1: reference audio {name}: {reason}",
        f"  - train.json:2: reference audio {silent}: {reason}",
        f"  - train.json:2: target audio {silent}: {reason}",
    ]


def test_skipping_leaves_out_and_lists_exactly_the_bad_samples(manifest_with_bad_samples, make_rules, tmp_path):
    rejected = tmp_path / "run" / "rejected.jsonl"
    for _ in range(2):  # a second start does not list them twice
        dataset = build_dataset(
            manifest_with_bad_samples, rules=make_rules(), cache_dir=tmp_path / "cache", on_bad_sample="skip"
        )
        write_rejected(rejected, dataset.manifest, dataset.rejected)
        write_rejected(rejected, tmp_path / "other.json", [])
        kept = [dataset.sample_id(index) for index in range(len(dataset))]
        assert kept == [f"train.json:{index}" for index in (0, 4, 5, 6, 7)]
    lines = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert [(line["number"], len(line["reasons"])) for line in lines] == [(1, 1), (2, 1), (3, 2)]


def test_damaged_lines_of_rejected_samples_are_dropped_with_a_warning(tmp_path, caplog):
    rejected, manifest = tmp_path / "rejected.jsonl", tmp_path / "a\u2028b.json"
    found = problem_at(tmp_path / "other\u2028.json", 3, "silent")
    write_rejected(rejected, Path(found.file), [found])
    whole = rejected.read_bytes()
    rejected.write_bytes(whole + b'{"file": "cut off\n[]\n{}\n3\n\xff\n' + b"[" * 5000 + b"\n")
    write_rejected(rejected, manifest, [problem_at(manifest, 1, "a"), problem_at(manifest, 1, "b")])
    first, second = rejected.read_text("utf-8").removesuffix("\n").split("\n")
    assert first.encode() + b"\n" == whole
    assert json.loads(second)["reasons"] == ["a", "b"]
    assert f"{rejected}:2: dropped a damaged line" in caplog.text
    assert len(caplog.records) == 6


def test_a_sample_over_the_token_budget_is_a_problem(mixed_manifest, mixed_dataset, make_rules, tmp_path):
    longest = int(mixed_dataset.lengths.max())
    rules = make_rules(max_tokens=longest - 1)
    with pytest.raises(UserError, match=f"takes {longest} positions .expected at most {longest - 1}"):
        build_dataset(mixed_manifest, rules=rules, cache_dir=tmp_path)


@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
def test_a_manifest_without_audio_to_learn_is_refused(make_rules, tmp_path, on_bad_sample):
    manifest = tmp_path / "train.json"
    manifest.write_text(json.dumps([text_sample(), text_sample()]))
    with pytest.raises(UserError, match=r"no audio to learn in any of 2 samples; .*`ds-higgs manifest`"):
        build_dataset(manifest, rules=make_rules(), cache_dir=tmp_path / "cache", on_bad_sample=on_bad_sample)


def test_no_samples_at_all_is_an_error(make_rules, tmp_path):
    manifest = tmp_path / "train.json"
    manifest.write_text("[]")
    with pytest.raises(UserError, match="holds no samples"):
        build_dataset(manifest, rules=make_rules(), cache_dir=tmp_path / "cache")
