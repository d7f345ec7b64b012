"""OmniVoice's token shards: codes train without their audio, and those of another codec are refused."""

import io
import json
import re
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from ds_higgs.commands.manifest import Codec, make_manifests
from ds_higgs.data.build import build_dataset
from ds_higgs.data.codec.opening import describe_codec
from ds_higgs.data.codes import codec_name
from ds_higgs.errors import UserError

from .audio_files import write_tone

NUM_CLIPS = 10


@pytest.fixture(scope="module")
def codes(codec_source, tmp_path_factory):
    """Recordings, by name, and what the tiny codec makes of them at the loudness at which OmniVoice encodes."""
    folder = tmp_path_factory.mktemp("recordings")
    waveforms = {}
    for number in range(NUM_CLIPS):
        file = write_tone(folder / f"clip-{number}.wav", 0.4 + 0.1 * number, pitch=150 + 20 * number, seed=number)
        waveform, _ = soundfile.read(file, dtype="float32")
        waveforms[file] = 0.9 * waveform / np.abs(waveform).max()
    encoded = codec_source.load().encode(list(waveforms.values()))
    return {file: one.numpy().astype(np.int16) for file, one in zip(waveforms, encoded, strict=True)}


def write_shards(out, codes, *, per_shard=4, **fields):
    """As omnivoice/scripts/extract_audio_tokens.py writes them: audios/*.tar, txts/*.jsonl and data.lst."""
    for folder in ("audios", "txts"):
        (out / folder).mkdir(parents=True)
    listed, names = [], list(codes)
    for number, start in enumerate(range(0, len(names), per_shard)):
        shard, texts = out / "audios" / f"shard-{number:06d}.tar", out / "txts" / f"shard-{number:06d}.jsonl"
        chosen = names[start : start + per_shard]
        with tarfile.open(shard, "w") as archive:
            for file in chosen:
                buffer = io.BytesIO()
                np.save(buffer, codes[file])
                member = tarfile.TarInfo(f"{file.stem}.npy")
                member.size = len(buffer.getvalue())
                archive.addfile(member, io.BytesIO(buffer.getvalue()))
        lines = [
            {"id": f.stem, "audio_path": str(f), "text": f"Clip {f.stem}.", "num_tokens": codes[f].shape[1], **fields}
            for f in chosen
        ]
        texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        listed.append(f"{shard} {texts} {len(chosen)} {sum(codes[f].shape[1] for f in chosen) / 25:.3f}\n")
    (out / "data.lst").write_text("".join(listed))
    return out


def make(source, out, codec, *, trust=False):
    out.parent.mkdir(exist_ok=True)
    return make_manifests(source, out, codec=Codec(str(codec.folder), trust=trust))


def assert_trains(dataset, codes):
    """Every clip's very codes, as target of one sample."""
    found = [dataset[index] for index in range(len(dataset))]
    targets = [sample.get_audio_codes(len(sample.audio_ids_start) - 1) for sample in found]
    assert len(targets) == len(codes)
    for wanted in codes.values():
        assert any(torch.equal(one, torch.from_numpy(wanted.astype(np.int64))) for one in targets)


def test_codes_train_without_their_audio(codes, codec_source, make_rules, tmp_path, caplog):
    shards = write_shards(tmp_path / "shards", codes, speaker="ana")
    with caplog.at_level("INFO", logger="ds_higgs"):
        make(shards, tmp_path / "set" / "train.jsonl", codec_source)
    (share,) = re.findall(r"([\d.]+) % of the codes of 8 clips, encoded again, are equal", caplog.text)
    assert float(share) > 99, "at the loudness at which they were encoded"
    shutil.copytree(tmp_path / "shards", tmp_path / "elsewhere" / "shards")
    shutil.copytree(tmp_path / "set", tmp_path / "elsewhere" / "set")
    shutil.rmtree(tmp_path / "shards")
    dataset = build_dataset(
        tmp_path / "elsewhere" / "set" / "train.jsonl", rules=make_rules(), cache_dir=tmp_path / "cache"
    )
    assert_trains(dataset, codes)
    assert all(len(dataset[index].audio_ids_start) == 2 for index in range(len(dataset))), "each has a reference"


def test_codes_in_a_table_train_too(codes, codec_source, make_rules, tmp_path):
    (tmp_path / "table").mkdir()
    columns = {
        "codes": [one.tolist() for one in codes.values()],
        "text": [f"Clip {file.stem}." for file in codes],
        "audio_path": [str(file) for file in codes],
    }
    pq.write_table(pa.table(columns), tmp_path / "table" / "train-00000.parquet")
    make(tmp_path / "table", tmp_path / "train.jsonl", codec_source)
    assert_trains(build_dataset(tmp_path / "train.jsonl", rules=make_rules(), cache_dir=tmp_path / "cache"), codes)


def test_a_foreign_codec_is_refused(codes, codec_source, make_rules, tmp_path):
    generator = np.random.default_rng(0)
    foreign = {file: generator.integers(0, 1024, one.shape, dtype=np.int16) for file, one in codes.items()}
    shards = write_shards(tmp_path / "foreign", foreign)
    with pytest.raises(UserError, match=r"0\.\d% of the codes of 8 clips are what .* makes of their recordings"):
        make(shards, tmp_path / "train.jsonl", codec_source)
    assert not (tmp_path / "train.jsonl").exists()


def test_codes_without_recordings_are_refused_unless_trusted(codes, codec_source, make_rules, tmp_path):
    shards = write_shards(tmp_path / "shards", codes)
    for texts in (shards / "txts").iterdir():
        texts.write_text(texts.read_text().replace(".wav", ".gone"))
    with pytest.raises(UserError, match=r"none of the recordings that they were made of is here.*--trust-codec"):
        make(shards, tmp_path / "train.jsonl", codec_source)
    make(shards / "data.lst", tmp_path / "train.jsonl", codec_source, trust=True)
    assert_trains(build_dataset(tmp_path / "train.jsonl", rules=make_rules(), cache_dir=tmp_path / "cache"), codes)


def test_a_run_with_another_codec_refuses_them(codes, codec_source, make_rules, tmp_path):
    make(write_shards(tmp_path / "shards", codes), tmp_path / "train.jsonl", codec_source)
    other = shutil.copytree(codec_source.folder, tmp_path / "codec")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "comment": "another"}))
    rules = make_rules(codec=describe_codec(other))
    with pytest.raises(UserError, match=f"codes of the codec {codec_name(codec_source)}"):
        build_dataset(tmp_path / "train.jsonl", rules=rules, cache_dir=tmp_path / "cache")
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    nobodys = tmp_path / "nobodys.jsonl"
    nobodys.write_text("".join(json.dumps({**line, "misc": None}) + "\n" for line in lines))
    with pytest.raises(UserError, match="codes, and not of which codec"):
        build_dataset(nobodys, rules=make_rules(), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((7, 5), np.int16), r"codes int16 \[7, 5\]"),
        (np.full((8, 5), 1024, np.int16), "from 1024 to 1024"),
        (np.zeros((8, 5), np.float32), "codes float32"),
        (np.zeros((8, 2), np.int16), "0.08"),
    ],
)
def test_what_is_no_clip_of_codes_is_told(codes, codec_source, make_rules, tmp_path, array, message):
    file = next(iter(codes))
    shards = write_shards(tmp_path / "shards", {file: array})
    make(shards, tmp_path / "train.jsonl", codec_source, trust=True)
    with pytest.raises(UserError, match=message):
        build_dataset(tmp_path / "train.jsonl", rules=make_rules(), cache_dir=tmp_path / "cache")
