"""Preparing large manifests, and starting from what is prepared: time and private memory of two ranks.

python benchmarks/prepared.py [--samples 10000 100000 1000000] [--times 100] [--folder /big/disk]

Every sample has two clips of its own. Their codes are put into the code cache first: encoding is not measured here. The
audio files are stand-ins, of which each clip is a segment; looking at many real ones is measured by itself. With
`--times` the last manifest is then prepared so many times over, which takes its samples from the set that is there: a
large set without the hours of analysing it.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from measure import describe_run, print_table, write_json

from ds_higgs.data.audio_changes import look_at_files
from ds_higgs.data.build import Preparation
from ds_higgs.data.cache import CodeCache, clip_key
from ds_higgs.data.clip_files import EncodedClip
from ds_higgs.data.clips import AUDIO_FILE_SCHEMA, fingerprint_of
from ds_higgs.data.codec.opening import find_codec
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.loader import StepLoader
from ds_higgs.data.order import EpochOrder
from ds_higgs.data.rules import SampleRules, build_rules
from ds_higgs.files import hash_file
from ds_higgs.model.loading import load_tokenizer, read_model_config
from ds_higgs.model.tiny import write_tiny_base

NUM_FILES = 1000
FRAMES_PER_SECOND, CODEBOOKS = 25, 8
WORDS = ("quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "rests", "near", "warm", "grass", "home")
REFERENCE_S = 3.0
WRITTEN_AT_ONCE = 4096


def make_rules(base: Path) -> SampleRules:
    return build_rules(
        tokenizer=load_tokenizer(base), model_config=read_model_config(base), codec=find_codec(None, base)
    )


def write_stand_ins(folder: Path) -> list[str]:
    """Hashes of NUM_FILES files."""
    for number in range(NUM_FILES):
        (folder / f"{number:04d}.wav").write_bytes(f"stand-in {number}".encode())
    return [hash_file(folder / f"{number:04d}.wav") for number in range(NUM_FILES)]


def write_manifest(
    folder: Path, codec_identity: str, *, samples: int, targets_s: tuple[float, float] = (2.0, 8.0)
) -> Path:
    """The manifest, and the codes of all its clips in the cache below `folder`."""
    rng = np.random.default_rng(0)
    hashes = write_stand_ins(folder)
    cache = CodeCache(folder / "cache", codec_identity)
    manifest = folder / f"{samples}.jsonl"
    clips: dict[str, EncodedClip] = {}
    with open(manifest, "w") as file:
        for sample in range(samples):
            items = []
            for place, seconds in enumerate((REFERENCE_S, round(float(rng.uniform(*targets_s)), 2))):
                number, offset = (2 * sample + place) % NUM_FILES, float((2 * sample + place) // NUM_FILES)
                key = clip_key(hashes[number], offset=offset, duration=seconds, codec_identity=codec_identity)
                frames = int(np.ceil(seconds * FRAMES_PER_SECOND))
                codes = torch.from_numpy(rng.integers(0, 1024, (CODEBOOKS, frames), dtype=np.int16))
                clips[key] = EncodedClip(codes, seconds, hashes[number])
                items.append({"type": "audio", "audio_url": f"{number:04d}.wav", "offset": offset, "duration": seconds})
            file.write(json.dumps(chat(items, rng, speaker=f"s{sample % 997}")) + "\n")
            if len(clips) >= WRITTEN_AT_ONCE:
                cache.add(clips)
                clips = {}
    if clips:
        cache.add(clips)
    cache.tidy()
    return manifest


def chat(items: list[dict], rng: np.random.Generator, *, speaker: str) -> dict:
    said, asked = (" ".join(rng.choice(WORDS, 12)) for _ in range(2))
    reference, target = items
    return {
        "messages": [
            {"role": "system", "content": "You are a helpful assistant capable of generating speech."},
            {"role": "user", "content": [{"type": "text", "text": said}, reference, {"type": "text", "text": asked}]},
            {"role": "assistant", "content": [{"type": "text", "text": asked}, target]},
        ],
        "speaker": speaker,
    }


def prepare_row(folder: Path, base: Path, *, samples: int) -> dict:
    """Analysis of a manifest whose codes are there, writing the set included; CPU time, for a busy machine."""
    rules = make_rules(base)
    manifest = write_manifest(folder, rules.codec.identity, samples=samples)
    return time_preparation(folder, manifest, rules)


def repeated_row(folder: Path, base: Path, *, samples: int, times: int) -> dict:
    """The same for a manifest that says all of one that is prepared so many times."""
    manifest = folder / f"{samples * times}.jsonl"
    with open(manifest, "wb") as file:
        for _ in range(times):
            file.write((folder / f"{samples}.jsonl").read_bytes())
    return {**time_preparation(folder, manifest, make_rules(base)), "taken_from": samples}


def time_preparation(folder: Path, manifest: Path, rules: SampleRules) -> dict:
    before = set((folder / "cache" / "prepared").glob("[!.]*"))
    wall, cpu = time.perf_counter(), time.process_time()
    preparation = Preparation(manifest, rules=rules, cache_dir=folder / "cache")
    preparation.run(on_bad_sample="error", devices=["cpu"])
    samples = len(preparation.dataset())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert preparation.num_missing == 0
    [prepared] = set((folder / "cache" / "prepared").glob("[!.]*")) - before  # the draft, of another name, is there too
    sizes = {name: sum(file.stat().st_size for file in files) / samples for name, files in tables(manifest, prepared)}
    row = {"samples": samples, "taken_from": 0, "wall_s": wall, "cpu_s": cpu, "cpu_ms_a_sample": 1000 * cpu / samples}
    return row | sizes


def tables(manifest: Path, prepared: Path) -> list[tuple[str, list[Path]]]:
    """Files of each table."""
    return [
        ("clips_bytes", list((manifest.parent / "cache").glob("codes/*/clips-*.arrow"))),
        ("samples_bytes", list((prepared / "samples").glob("*.arrow"))),
        ("places_bytes", [prepared / "places.arrow"]),
        ("manifest_bytes", [manifest]),
    ]


def private_mib() -> float:
    """Anonymous memory of this process, in MiB: what is mapped from files, which processes share, is not in it."""
    return status_mib("RssAnon")


def status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def start(folder: Path, base: Path, *, samples: int, rank: int, ranks: int, limits: dict) -> dict:
    """In a process of its own: from the manifest to the first batch, and the memory that took, imports left out."""
    rules = make_rules(base)
    torch.set_num_threads(1)
    gc.collect()
    before, wall, cpu = private_mib(), time.perf_counter(), time.process_time()
    preparation = Preparation(folder / f"{samples}.jsonl", rules=rules, cache_dir=folder / "cache")
    preparation.run(on_bad_sample="error", devices=["cpu"])
    order = EpochOrder(preparation.dataset(), **limits)
    loader = StepLoader(order, BatchCollator(rules.layout), rank=rank, world_size=ranks, num_workers=2)
    steps = iter(loader)
    next(steps)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    gc.collect()
    after = private_mib()
    return {"rank": rank, "wall_s": wall, "cpu_s": cpu, "private_mib": after - before, "private_mib_in_all": after}


def start_rows(folder: Path, base: Path, *, samples: int, limits: dict) -> list[dict]:
    """Two processes at once, as the ranks of a job are."""
    command = [sys.executable, __file__, "--folder", str(folder), "--base", str(base), "--samples", str(samples)]
    command += ["--limits", json.dumps(limits)]
    ranks = [subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE) for rank in range(2)]
    rows = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
    return [{"samples": samples, "batches": str(limits), **row} for row in rows]


def throughput_row(folder: Path, base: Path, *, samples: int, count: int, workers: int) -> dict:
    """Samples a second from the tables to collated batches."""
    rules = make_rules(base)
    torch.set_num_threads(1)
    preparation = Preparation(folder / f"{samples}.jsonl", rules=rules, cache_dir=folder / "cache")
    preparation.run(on_bad_sample="error", devices=["cpu"])
    order = EpochOrder(preparation.dataset(), batch_size=8)
    loader = StepLoader(order, BatchCollator(rules.layout), num_workers=workers)
    done, wall, cpu = 0, time.perf_counter(), sum(os.times()[:4])
    for step in loader:
        done += sum(len(batch.sample_ids) for batch in step)
        if done >= count:
            break
    wall = time.perf_counter() - wall
    return {"samples": samples, "workers": workers, "read": done, "samples_per_second": done / wall,
            "cpu_s_of_rank": sum(os.times()[:4]) - cpu}  # fmt: skip


def measure_starts(results: dict[str, list[dict]], folder: Path, base: Path, *, samples: int) -> None:
    for limits in ({"batch_size": 8}, {"max_tokens": 8000}):
        results["start"] += start_rows(folder, base, samples=samples, limits=limits)
    results["read"].append(throughput_row(folder, base, samples=samples, count=min(samples, 20_000), workers=2))
    for name in ("prepare", "start", "read"):
        print_table(results[name])


def look_row(folder: Path, *, count: int) -> dict:
    """What a start spends on looking whether audio files have changed."""
    place = folder / "many"
    place.mkdir()
    rows = []
    for number in range(count):
        path = place / f"{number:07d}.wav"
        path.write_bytes(b"stand-in")
        rows.append((path.name, *fingerprint_of(path.stat()), "0" * 64))
    columns = {
        field.name: list(values) for field, values in zip(AUDIO_FILE_SCHEMA, zip(*rows, strict=True), strict=True)
    }

    files = pa.table(columns, schema=AUDIO_FILE_SCHEMA)
    wall, cpu = time.perf_counter(), time.process_time()
    found = look_at_files(files, place, folder / "cache")
    row = {"files": count, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    assert not found.changed
    shutil.rmtree(place)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--times", type=int, default=1, help="then the last manifest this many times over")
    parser.add_argument("--folder", type=Path, help="where the tables go; 6 GB a million samples")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/prepared.json"))
    for inner in ("--rank", "--base", "--limits"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        limits, rank = json.loads(arguments.limits), int(arguments.rank)
        row = start(
            arguments.folder, Path(arguments.base), samples=arguments.samples[0], rank=rank, ranks=2, limits=limits
        )
        print(json.dumps(row))
        return
    results: dict[str, list[dict]] = {"prepare": [], "start": [], "read": [], "look": []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        base = Path(scratch) / "base"
        write_tiny_base(base)
        for samples in arguments.samples:
            folder = Path(scratch) / str(samples)
            folder.mkdir()
            results["prepare"].append(prepare_row(folder, base, samples=samples))
            measure_starts(results, folder, base, samples=samples)
            if arguments.times > 1 and samples == arguments.samples[-1]:
                results["prepare"].append(repeated_row(folder, base, samples=samples, times=arguments.times))
                measure_starts(results, folder, base, samples=samples * arguments.times)
            write_json(arguments.output, {"run": describe_run(torch.device("cpu")), **results})
            shutil.rmtree(folder)
        results["look"].append(look_row(Path(scratch), count=100_000))
        print_table(results["look"])
    write_json(arguments.output, {"run": describe_run(torch.device("cpu")), **results})


if __name__ == "__main__":
    main()
