"""Every codec: codes do not depend on the batch, folders are told apart, misfits are refused."""

import hashlib
import json
import pickle
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers.modeling_utils

from ds_higgs import hub
from ds_higgs.data.codec import batched
from ds_higgs.data.codec.higgs import SEMANTIC_FOLDER, _check_complete, _semantic_model_from
from ds_higgs.data.codec.opening import describe_codec, find_codec, load_codec
from ds_higgs.data.codec.torchaudio_stand_in import provide_torchaudio, resample
from ds_higgs.errors import UserError
from ds_higgs.hub import HIGGS_TOKENIZER
from tests.support.in_process import fail_imports
from tests.support.launching import ROOT
from tests.support.released_shape import write_higgs_codec

from .audio_files import RATE, tone

SPECTRAL = ROOT / "examples" / "small_base" / "base" / "codec"
LENGTHS = (9600, 9601, 13440, 9600, 9599)  # samples; three of them are 10 frames long


@pytest.fixture(scope="module")
def higgs_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("higgs_tokenizer")
    write_higgs_codec(folder)
    return folder


# Those of the third are run where `higgs_folder` is made already.
HIGGS = pytest.param("higgs", marks=(pytest.mark.costly, pytest.mark.xdist_group("test_codec higgs_folder")))


@pytest.fixture(scope="module", params=["dac", "spectral", HIGGS])
def codec_folder(request, tiny_base):
    if request.param == "higgs":
        return request.getfixturevalue("higgs_folder")
    return tiny_base / "codec" if request.param == "dac" else SPECTRAL


@pytest.fixture(scope="module")
def codec(codec_folder):
    return load_codec(codec_folder)


def clips():
    return [tone(length / RATE, pitch=150 + 30 * index, seed=index) for index, length in enumerate(LENGTHS)]


def test_codes_of_a_clip_are_the_same_alone_and_in_any_batch(codec):
    alone = [codec.encode([clip])[0] for clip in clips()]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0]):
        together = codec.encode([clips()[index] for index in order])
        for index, codes in zip(order, together, strict=True):
            assert torch.equal(codes, alone[index])


def test_clips_of_equal_length_share_a_batch_on_an_accelerator(codec, monkeypatch):
    """Grouping as on a GPU, run on the CPU: the codes stay the same, and batches of several clips occur."""
    alone = codec.encode(clips())
    batch_sizes = []
    batches = batched._batches
    monkeypatch.setattr(batched, "_batches", lambda padded, **_: batches(padded, one_by_one=False))
    encode_batch = codec._encode_batch
    monkeypatch.setattr(codec, "_encode_batch", lambda batch: batch_sizes.append(batch.shape[0]) or encode_batch(batch))
    for first, second in zip(alone, codec.encode(clips()), strict=True):
        assert torch.equal(first, second)
    assert sorted(batch_sizes) == [1, 1, 3]


def test_codes_have_the_shape_that_the_cache_and_the_model_expect(codec):
    for clip, codes in zip(clips(), codec.encode(clips()), strict=True):
        assert codes.dtype == torch.int64
        assert codes.shape == (8, -(-len(clip) // codec.hop_length))
        assert 0 <= int(codes.min()) <= int(codes.max()) < codec.codebook_size
        assert len(codes.unique()) > 8, "the codec tells nothing apart"
    audio = codec.decode(codec.encode(clips())[2])
    assert audio.dtype == np.float32
    assert audio.ndim == 1
    assert abs(len(audio) - LENGTHS[2]) <= codec.hop_length


def test_the_codes_are_those_of_bosons_own_encode(codec):
    if not hasattr(codec, "_tokenizer"):
        pytest.skip("of the Higgs tokenizer alone")
    assert torch.equal(codec.encode(clips())[2], codec._tokenizer.encode(clips()[2], sr=RATE))


def test_a_codec_is_described_without_its_weights(codec_folder, codec):
    source = describe_codec(codec_folder)
    assert (source.sampling_rate, source.hop_length) == (24000, 960)
    assert (source.num_codebooks, source.codebook_size) == (8, 256 if codec_folder == SPECTRAL else 1024)
    assert source.identity == describe_codec(codec_folder).identity == codec.identity


def test_other_weights_are_another_identity(tiny_base, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_base / "codec" / name).read_bytes())
    same = describe_codec(tmp_path).identity
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert same == describe_codec(tiny_base / "codec").identity != describe_codec(tmp_path).identity


@pytest.fixture
def described_as_released(tmp_path) -> Path:
    """A folder that can be described as boson's tokenizer, with its semantic model: nothing in it can be loaded."""
    config = {"ratios": [8, 5, 4, 2, 3], "sample_rate": 24000, "semantic_techer": "hubert_base_general"}
    semantic = tmp_path / "codec" / SEMANTIC_FOLDER
    semantic.mkdir(parents=True)
    for folder, weights in ((semantic.parent, "model.pth"), (semantic, "model.safetensors")):
        (folder / "config.json").write_text(json.dumps(config))
        (folder / weights).write_bytes(weights.encode())
    return semantic.parent


def test_other_weights_of_the_semantic_model_are_another_identity(described_as_released, monkeypatch):
    """Codes follow them, too; what versions before called the codec is known, for a line on the codes they left."""
    source = describe_codec(described_as_released)
    semantic = described_as_released / SEMANTIC_FOLDER
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: semantic.with_name("fetched"))
    semantic.rename(semantic.with_name("fetched"))
    assert describe_codec(described_as_released) == source, "the same files, from the hub"
    (semantic.with_name("fetched") / "model.safetensors").write_bytes(b"others")
    other = describe_codec(described_as_released)
    assert other.identity != source.identity
    assert other.former_identity == source.former_identity not in (None, source.identity, other.identity)


def test_a_semantic_model_that_cannot_be_had_is_named(described_as_released, monkeypatch):
    shutil.rmtree(described_as_released / SEMANTIC_FOLDER)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError, match=r"semantic model bosonai/hubert_base: .*no network.*ds-higgs download"):
        describe_codec(described_as_released)


def test_the_identity_of_a_codec_without_one_stays_what_it_was(tiny_base):
    """Caches of before are found again."""
    folder = tiny_base / "codec"
    digest = hashlib.sha256(b"ds_higgs codes 1\n")
    for name in ("config.json", "model.safetensors"):
        digest.update(hashlib.sha256((folder / name).read_bytes()).hexdigest().encode())
    source = describe_codec(folder)
    assert (source.identity, source.former_identity) == (digest.hexdigest(), None)


def test_the_base_checkpoints_own_codec_is_the_default(tiny_base, tmp_path, monkeypatch):
    assert find_codec(None, tiny_base).folder == tiny_base / "codec"
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: asked.append(name) or tiny_base)
    with pytest.raises(UserError):
        find_codec(None, tmp_path)
    assert asked == [HIGGS_TOKENIZER]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "there is no config.json"),
        ({"config.json": "{"}, "config.json: cannot be read as JSON"),
        ({"config.json": "[]"}, "expected a JSON object"),
        ({"config.json": '{"model_type": "mimi"}'}, "not an audio codec; expected"),
        ({"config.json": '{"model_type": "dac"}'}, "has no model.safetensors"),
        ({"config.json": '{"model_type": "dac"}', "model.safetensors": ""}, "config.json: .*sampling_rate"),
    ],
)
def test_what_is_no_codec_is_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        find_codec(str(tmp_path))


def test_a_misfit_to_the_base_checkpoint_is_refused(codec_source):
    with pytest.raises(UserError, match="8 codebooks x 1024 codes; the base checkpoint expects 12 x 1024"):
        codec_source.check_fits(num_codebooks=12, codebook_size=1024)


def test_missing_packages_are_named_with_their_remedy(higgs_folder, monkeypatch):
    fail_imports(monkeypatch, of="boson_multimodal.audio_processing", lacking="audiotools")
    with pytest.raises(UserError, match=r"needs audiotools; install it: pip install --no-deps"):
        load_codec(higgs_folder)


def test_missing_weights_are_refused_but_for_huberts(tmp_path):
    layers = {name: torch.nn.Linear(2, 2) for name in ("encoder", "fc_prior", "semantic_model")}
    tokenizer = torch.nn.ModuleDict(layers)
    torch.save(torch.nn.ModuleDict({"encoder": layers["encoder"]}).state_dict(), tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"2 tensors are missing, the first is fc_prior\.weight"):
        _check_complete(tmp_path, tokenizer)


def test_the_semantic_model_comes_without_remote_code_from_the_folder_or_the_hub(tmp_path, monkeypatch):
    loaded, asked = [], []
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", lambda name, **rest: loaded.append((name, rest)))
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: asked.append(name) or "snapshot")
    for folder in (tmp_path, None):
        boson = types.SimpleNamespace(AutoModel="its own")
        with _semantic_model_from(boson, folder):
            boson.AutoModel.from_pretrained("bosonai/hubert_base", trust_remote_code=True)
        assert boson.AutoModel == "its own"
    assert loaded == [(tmp_path, {"trust_remote_code": False}), (Path("snapshot"), {"trust_remote_code": False})]
    assert asked == ["bosonai/hubert_base"]


def test_the_stand_in_resamples_as_a_sinc_filter_does():
    julius = pytest.importorskip("julius")
    waveform = torch.from_numpy(np.stack([tone(0.5), tone(0.5, pitch=440)]))
    found = resample(waveform[:, None], 24000, 16000)
    assert found.shape == (2, 1, 8000)
    expected = julius.resample_frac(waveform, 24000, 16000, zeros=6, rolloff=0.99)
    torch.testing.assert_close(found[:, 0, 50:-50], expected[:, 50:-50], atol=1e-3, rtol=0)
    assert torch.equal(resample(waveform, 24000, 24000), waveform)


def test_a_working_torchaudio_is_left_alone(monkeypatch):
    own = types.ModuleType("torchaudio")
    monkeypatch.setitem(sys.modules, "torchaudio", own)
    provide_torchaudio()
    assert sys.modules["torchaudio"] is own


def test_codecs_loaded_in_threads_leave_new_models_their_initial_weights(codec_source):
    """transformers switches initialisation off while it loads, for the whole process; two at once left it off."""
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: codec_source.load(), range(16)))
    assert transformers.modeling_utils._init_weights


@pytest.fixture
def codec_copy(tiny_base, tmp_path):
    return Path(shutil.copytree(tiny_base / "codec", tmp_path / "codec"))


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_weights_that_are_cut_off_are_found_before_they_are_loaded(codec_copy, share):
    weights = codec_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(share * weights.stat().st_size)])
    with pytest.raises(UserError, match=r"model.safetensors: the audio codec's weights cannot be read"):
        describe_codec(codec_copy)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("downsampling_ratios", "", "config.json: not the config of an audio codec"),
        ("sampling_rate", "x", "config.json: the audio codec's sampling_rate is 'x'"),
        ("n_codebooks", -8, "config.json: the audio codec's num_codebooks is -8"),
        ("codebook_dim", 1e300, "codec: the audio codec cannot be loaded"),
        ("decoder_hidden_size", 1, "codec: the audio codec cannot be loaded"),
    ],
)
def test_a_config_that_makes_no_codec_is_refused(codec_copy, key, value, message):
    file = codec_copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=message):
        load_codec(codec_copy)


def test_a_codecs_source_can_be_sent_to_another_process(codec_source):
    assert pickle.loads(pickle.dumps(codec_source)) == codec_source
