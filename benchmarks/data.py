"""Encoding, reading the code cache through workers, padding of batches, and planning a large epoch.

python benchmarks/data.py [--device cuda] [--only encode read padding planning]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import prepared
import torch
import transformers
from measure import describe_run, memory_gib, peak_memory_gib, print_table, reset_peak_memory, write_json

from ds_higgs.data.build import build_dataset
from ds_higgs.data.codec.opening import load_codec
from ds_higgs.data.codec.source import AudioCodec
from ds_higgs.data.codec.torchaudio_stand_in import provide_torchaudio
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.data.loader import StepLoader
from ds_higgs.data.order import EpochOrder
from ds_higgs.data.sampling import padding_share, plan_epoch
from ds_higgs.model.tiny import write_tiny_base

RATE = 24000
FRAMES_PER_SECOND = 25
CODEBOOKS = 8


def encode_rows(base: Path, *, clips: int, seconds: float, device: torch.device) -> list[dict]:
    """Seconds of audio encoded in a second, for both codecs. The Higgs tokenizer has its full size, weights random."""
    rng = np.random.default_rng(0)
    waveforms = [(0.1 * rng.normal(size=round(seconds * RATE))).astype(np.float32) for _ in range(clips)]
    rows = []
    for name, load in {"DAC of the tiny base": load_dac, "Higgs tokenizer, random weights": load_random_higgs}.items():
        codec = load(base, device)
        codec.encode(waveforms[:1])
        start = time.perf_counter()
        codec.encode(waveforms)
        took = time.perf_counter() - start
        rows.append({"codec": name, "clips": clips, "clip_s": seconds, "took_s": took,
                     "times_real_time": clips * seconds / took})  # fmt: skip
    return rows


def load_dac(base: Path, device: torch.device) -> AudioCodec:
    return load_codec(base / "codec", device=device)


def load_random_higgs(base: Path, device: torch.device) -> AudioCodec:
    """Boson's tokenizer as released in size: HuBERT base inside, 24 kHz, 8 codebooks of 1024."""
    provide_torchaudio()
    from boson_multimodal.audio_processing import higgs_audio_tokenizer

    def random_hubert(*_, **__):
        return transformers.HubertModel(transformers.HubertConfig())

    transformers.AutoModel.from_pretrained = random_hubert
    config = {"D": 256, "ratios": [8, 5, 4, 2, 3], "sample_rate": RATE, "bins": 1024, "n_q": CODEBOOKS,
              "target_bandwidths": [0.5, 1, 1.5, 2], "semantic_techer": "hubert_base_general"}  # fmt: skip
    folder = base / "higgs_tokenizer"
    folder.mkdir(exist_ok=True)
    tokenizer = higgs_audio_tokenizer.HiggsAudioTokenizer(**config, device="cpu")
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tokenizer.state_dict(), folder / "model.pth")
    return load_codec(folder, device=device)


def random_dataset(base: Path, *, samples: int, seconds: float) -> HiggsDataset:
    """Samples of a 3 s reference and a target of `seconds`, about 60 tokens of text; their codes are in the cache."""
    rules = prepared.make_rules(base)
    folder = base / "audio"
    folder.mkdir()
    manifest = prepared.write_manifest(folder, rules.codec.identity, samples=samples, targets_s=(seconds, seconds))
    return build_dataset(manifest, rules=rules, cache_dir=folder / "cache")


def read_rows(base: Path, *, samples: int, seconds: float, workers: tuple[int, ...]) -> list[dict]:
    """Samples in a second from the cache to collated batches, the start of the workers included."""
    dataset = random_dataset(base, samples=samples, seconds=seconds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what each worker has, and each rank under torchrun
    rows = []
    for number in workers:
        loader = StepLoader(EpochOrder(dataset, batch_size=8), BatchCollator(dataset.layout), num_workers=number)
        start = time.perf_counter()
        count = sum(len(batch.sample_ids) for step in loader for batch in step)
        took = time.perf_counter() - start
        assert count == samples
        rows.append({"workers": number, "samples": samples, "target_s": seconds, "batch_size": 8, "took_s": took,
                     "samples_per_second": count / took})  # fmt: skip
    torch.set_num_threads(threads)
    return rows


def log_normal_lengths(count: int) -> np.ndarray:
    """Positions of samples of 2 to 30 s, log-normal about 7 s, with 100 of text and reference."""
    seconds = np.clip(np.random.default_rng(0).lognormal(np.log(7), 0.6, count), 2, 30)
    return (100 + FRAMES_PER_SECOND * seconds).astype(np.int32)


def padding_rows(*, samples: int, max_tokens: int) -> list[dict]:
    """Share of computed positions that hold no token, and how even the batches are."""
    lengths = log_normal_lengths(samples)
    batch_size = round(max_tokens / float(lengths.mean()))
    plans = {
        f"token budget {max_tokens}, grouped": plan_epoch(lengths, seed=0, epoch=0, max_tokens=max_tokens),
        f"batch size {batch_size}, grouped": plan_epoch(lengths, seed=0, epoch=0, batch_size=batch_size),
        f"batch size {batch_size}, random": plan_epoch(lengths, seed=0, epoch=0, batch_size=batch_size, shuffle=False),
    }
    rows = []
    for name, plan in plans.items():
        tokens = np.add.reduceat(lengths[plan.samples], np.concatenate([[0], plan.ends[:-1]]))
        row = {"batches": name, "micro_batches": len(plan), "padding_share": padding_share(plan, lengths)}
        rows.append(row | {"tokens_mean": float(tokens.mean()), "tokens_std": float(tokens.std())})
    return rows


def planning_rows(*, samples: int) -> list[dict]:
    """Time and memory to plan one epoch; the lengths themselves are there before."""
    lengths = log_normal_lengths(samples)
    cpu = torch.device("cpu")
    rows = []
    for name, limits in {"token budget 8000": {"max_tokens": 8000}, "batch size 8": {"batch_size": 8}}.items():
        reset_peak_memory(cpu)
        before = memory_gib(cpu)
        start = time.perf_counter()
        plan = plan_epoch(lengths, seed=0, epoch=0, **limits)
        took = time.perf_counter() - start
        rows.append({"batches": name, "samples": samples, "micro_batches": len(plan), "took_s": took,
                     "memory_mib": 1024 * (peak_memory_gib(cpu) - before)})  # fmt: skip
    return rows


def main() -> None:
    parts = ("encode", "read", "padding", "planning")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="for the codecs")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--clips", type=int, default=4, help="to encode")
    parser.add_argument("--clip-seconds", type=float, default=10.0)
    parser.add_argument("--samples", type=int, default=4000, help="to read")
    parser.add_argument("--planned", type=int, default=1_000_000, help="samples to plan")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/data.json"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        write_tiny_base(base)
        benchmarks = {
            "planning": lambda: planning_rows(samples=arguments.planned),
            "padding": lambda: padding_rows(samples=100_000, max_tokens=8000),
            "read": lambda: read_rows(base, samples=arguments.samples, seconds=20.0, workers=(0, 1, 2)),
            "encode": lambda: encode_rows(
                base, clips=arguments.clips, seconds=arguments.clip_seconds, device=device
            ),
        }  # fmt: skip
        results = {}
        for name, benchmark in benchmarks.items():
            if name in arguments.only:
                results[name] = benchmark()
                print(f"\n{name}")
                print_table(results[name])
    write_json(arguments.output, {"run": describe_run(device), **results})


if __name__ == "__main__":
    main()
