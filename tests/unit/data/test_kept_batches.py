"""The batches of a manifest are what they were when old checkpoints were saved: digests kept in tests/golden."""

import hashlib
import json
import os
import random
from pathlib import Path

import pytest
import torch

from ds_higgs import setup
from ds_higgs.config.file import load_config
from ds_higgs.data.build import build_dataset
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.loader import StepLoader
from ds_higgs.data.order import EpochOrder
from ds_higgs.job.distributed import Ranks
from tests.support.launching import ROOT

from .audio_files import cloning_sample, text_sample, write_tone

GOLDEN = ROOT / "tests" / "golden" / "batches.json"
GROUP = 100  # manifests to a digest
NUM_CLIPS = 10


def digest_of(loaders, *, epochs: int = 2) -> bytes:
    """Everything in the batches of all ranks but the codes' values, which another CPU's codec may give differently."""
    digest = hashlib.sha256()
    for loader in loaders:
        for _ in range(epochs):
            for step in loader:
                for batch in step:
                    add_batch(digest, batch)
    return digest.digest()


def add_batch(digest, batch) -> None:
    digest.update(json.dumps([batch.sample_ids, batch.num_tokens]).encode())
    tensors = {**batch.model_inputs, "text": batch.labels.text, "audio": batch.labels.audio}
    for name, tensor in sorted(tensors.items()):
        if name in ("audio", "audio_in_ids", "audio_out_ids"):
            is_code = (tensor >= 0) & (tensor < 1024)
            tensor = torch.where(is_code, 0, tensor)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())


def check(name: str, found: str) -> None:
    """To be renewed on purpose only: DS_HIGGS_UPDATE_GOLDEN=1."""
    if os.environ.get("DS_HIGGS_UPDATE_GOLDEN"):
        kept = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps({**kept, name: found}, indent=1, sort_keys=True) + "\n")
    assert json.loads(GOLDEN.read_text())[name] == found


def test_the_examples_batches_are_what_they_were(tiny_base, tmp_path):
    config = load_config(
        ROOT / "examples" / "voice_cloning" / "config.yaml",
        {"model.base": str(tiny_base), "data.cache_dir": str(tmp_path), "data.prompt_form": "as_is"},
    )
    rules = setup.build_sample_rules(config.data, tiny_base)
    dataset = setup.build_dataset(config, config.data.train_manifest, rules, Ranks(0, 1, 0))
    loaders = [setup.build_train_loader(config, [dataset], rules, Ranks(rank, 2, rank)) for rank in range(2)]
    check("example", digest_of(loaders).hex())


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Clips that all the manifests share."""
    folder = tmp_path_factory.mktemp("kept")
    for number in range(NUM_CLIPS):
        write_tone(folder / f"{number}.wav", 0.25 + 0.19 * number, seed=number)
    return folder


def write_manifest(chance: random.Random, folder: Path) -> Path:
    """Cloning samples, with a speaker or without, and some of text alone."""

    def words() -> str:
        return " ".join(chance.choice(["one", "two", "seven", "eleven"]) for _ in range(chance.randint(1, 30)))

    samples = []
    for _ in range(chance.randint(1, 14)):
        reference, target = (f"{chance.randrange(NUM_CLIPS)}.wav" for _ in range(2))
        fields = {"speaker": chance.choice("ab")} if chance.random() < 0.5 else {}
        samples.append(
            cloning_sample(reference, target, words(), **fields)
            if chance.random() < 0.85
            else text_sample(words(), words())
        )
    samples.append(cloning_sample("0.wav", "1.wav"))
    manifest = folder / "train.jsonl"
    manifest.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return manifest


def digest_of_manifest(seed: int, place: Path, make_rules) -> bytes:
    chance = random.Random(seed)
    manifest = write_manifest(chance, place)
    rules = make_rules(
        prompt_form=chance.choice(["as_is", "boson", "mixed"]), reference_turn=chance.choice(["as_is", "assistant"])
    )
    dataset = build_dataset(manifest, rules=rules, cache_dir=place / "cache")
    longest = -(-int(dataset.lengths.max()) // 8) * 8
    by_count = chance.random() < 0.6
    batching = {"batch_size": chance.randint(1, 5)} if by_count else {"max_tokens": chance.randint(1, 4) * longest}
    world_size = chance.randint(1, 3)
    loaders = [
        StepLoader(
            EpochOrder(dataset, seed=seed, shuffle=seed % 10 > 0, **batching),
            BatchCollator(rules.layout),
            gradient_accumulation_steps=1 + seed % 2,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    return digest_of(loaders)


def digest_of_group(group: range, place: Path, make_rules) -> str:
    return hashlib.sha256(b"".join(digest_of_manifest(seed, place, make_rules) for seed in group)).hexdigest()


def test_the_batches_of_random_manifests_are_what_they_were(place, make_rules):
    check("0 to 39", digest_of_group(range(40), place, make_rules))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 2000, GROUP))
def test_the_batches_of_2000_random_manifests_are_what_they_were(first, place, make_rules):
    check(f"{first} to {first + GROUP - 1}", digest_of_group(range(first, first + GROUP), place, make_rules))
