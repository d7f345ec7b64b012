"""`ds-higgs download` against a local stand-in of the hub's HTTP interface, in a process of its own."""

import json
import shutil
from pathlib import Path

import pytest

from ds_higgs.data.codec.higgs import SEMANTIC_FOLDER
from ds_higgs.data.codec.opening import find_codec
from ds_higgs.hub import HIGGS_TOKENIZER, ORIGINAL_REVISION, PINNED_REVISIONS, RELEASED_NAMES
from ds_higgs.model.loading import resolve_base
from tests.support import launching
from tests.support.hub_stand_in import serve_hub

OLD, NEW = RELEASED_NAMES
CHUNK = 10 * 2**20  # the hub's client writes so many bytes at a time
CUT_AFTER = CHUNK + 1000
CODEC_CONFIG = {"ratios": [8, 5, 4, 2, 3], "sample_rate": 24000, "semantic_techer": "hubert_base_general"}


@pytest.fixture
def repositories(tiny_base, tmp_path) -> dict[tuple[str, str], Path]:
    """The base (without a codec of its own), boson's tokenizer and its semantic model, shaped as released."""
    base, codec, semantic = tmp_path / "hub" / "base", tmp_path / "hub" / "codec", tmp_path / "hub" / "semantic"
    shutil.copytree(tiny_base, base, ignore=shutil.ignore_patterns("codec"))
    for folder, weights in ((codec, "model.pth"), (semantic, "pytorch_model.bin")):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CODEC_CONFIG))
        (folder / weights).write_bytes(b"weights" * 1000)
    return {
        (NEW, ORIGINAL_REVISION): base,
        (HIGGS_TOKENIZER, PINNED_REVISIONS[HIGGS_TOKENIZER]): codec,
        ("bosonai/hubert_base", "main"): semantic,
    }


def download(url: str, home: Path, *arguments: str | Path):
    env = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "no_proxy": "*"}
    return launching.run(launching.ds_higgs("download", *arguments), env=env)


def test_one_folder_for_a_machine_without_network(repositories, tmp_path):
    """Under the old name, which this hub does not have; the weights break off once, and the rest is fetched later."""
    out = tmp_path / "base"
    with serve_hub(repositories, cut_after=CUT_AFTER) as hub:
        broken = download(hub.url, tmp_path / "home", "--out", out, "--base", OLD)
        assert broken.returncode == 2, broken.stdout[-4000:]
        assert "give the command again, it goes on" in broken.stdout
        done = download(hub.url, tmp_path / "home", "--out", out, "--base", OLD)
        assert done.returncode == 0, done.stdout[-4000:]
    assert f"GET /{NEW}/resolve/{ORIGINAL_REVISION}/model.safetensors bytes={CHUNK}-" in hub.requests
    assert f"complete: use it as model.base: {out}" in done.stdout
    assert resolve_base(str(out), None) == out
    source = find_codec(None, out)
    assert (source.folder, source.kind.name) == (out / "codec", "higgs")
    assert (out / "codec" / SEMANTIC_FOLDER / "pytorch_model.bin").is_file()
    served = repositories[NEW, ORIGINAL_REVISION] / "model.safetensors"
    assert (out / "model.safetensors").read_bytes() == served.read_bytes()
    gone = download("http://127.0.0.1:9", tmp_path / "home", "--out", out)
    assert gone.returncode == 2, "a folder that may be a part was taken for all of it"
    assert "cannot be downloaded" in gone.stdout
