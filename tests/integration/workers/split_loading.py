"""What every rank of test_split_loading runs: a base that is split as it is read, against the whole one.

    torchrun --nproc_per_node 2 tests/integration/workers/split_loading.py CASE,... BASE [START ...]

Each case ends with status 0 when it holds and raises otherwise.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from ds_higgs.config import Config
from ds_higgs.job import distributed
from ds_higgs.job.process_exit import run_and_exit
from ds_higgs.losses import LossWeights
from ds_higgs.model.loading import load_model
from ds_higgs.model.split_weights import gathered, is_split, whole_shape
from ds_higgs.training.engine import build_engine, build_trained_model
from ds_higgs.training.memory_plan import choose_memory_settings
from ds_higgs.training.train_step import train_step
from ds_higgs.training.zero import build_deepspeed_config
from tests.support.parity import micro_batches, parity_config
from tests.support.tensor_bytes import TensorBytes

Json = Mapping[str, Any]
FULL = {"mode": "full"}
LORA = {"dropout": 0.1, "modules_to_save": ("audio_head", "text_head")}
BF16 = torch.bfloat16.itemsize


def a_rank_holds_its_share_and_one_weight(base: Path) -> None:
    """While it loads; and all of it the other way, so that it is counted."""
    whole, split = (peak_of_loading(base, split_by) for split_by in (None, deepspeed_config(configured(base, FULL))))
    sizes = [parameter.numel() for parameter in load_model(base, dtype=torch.bfloat16).parameters()]
    share, largest = BF16 * sum(sizes) // distributed.world_size(), max(sizes)
    mapped = torch.float32.itemsize * largest * distributed.is_main_rank()  # of its file, by the rank that reads
    allowed = share + BF16 * largest + mapped + 1024 * len(sizes)
    print(f"peak {split:,}, allowed {allowed:,}, whole {whole:,}")
    assert split <= allowed < whole


def peak_of_loading(base: Path, split_by: Json | None) -> int:
    with TensorBytes() as counted:
        load_model(base, dtype=torch.bfloat16, split_by=split_by)
    return counted.peak


def full_has_the_bases_weights(base: Path) -> None:
    check_weights(base, train=FULL)


def lora_has_the_bases_weights(base: Path) -> None:
    check_weights(base, lora={**LORA, "dora": True})


def a_warm_start_has_the_sources_weights(base: Path, *starts: Path) -> None:
    for start in starts:
        check_weights(base, train=FULL, start=start)


def full_learns_the_same(base: Path) -> None:
    check_training(base, train=FULL)


def lora_learns_the_same(base: Path) -> None:
    check_training(base, lora=LORA)


def check_weights(base: Path, *, start: Path | None = None, **chosen: Any) -> None:
    """To the bit, and no base's weight is whole on a rank."""
    config = configured(base, **chosen)
    expected = {name: one.detach().clone() for name, one in build(config, None, start).named_parameters()}
    model = build(config, deepspeed_config(config), start)
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    of_base = {name for name in found if "lora_" not in name and "modules_to_save" not in name}
    for name, parameter in found.items():
        if name in of_base and not replaced_by_peft(name, start):
            assert is_split(parameter), name
            assert parameter.numel() == 0, name
            share = -(-expected[name].numel() // distributed.world_size())
            assert parameter.ds_tensor.numel() == share, name
        assert whole_shape(parameter) == expected[name].shape, name
        with gathered([parameter]):
            assert torch.equal(parameter, expected[name]), name
            assert parameter.dtype == expected[name].dtype == torch.bfloat16, name


def replaced_by_peft(name: str, start: Path | None) -> bool:
    """Whether an adapter has brought this one whole: DeepSpeed splits it with LoRA's."""
    return start is not None and "audio_lm_head" in name


def check_training(base: Path, **chosen: Any) -> None:
    config = configured(base, **chosen)
    assert learned(config, deepspeed_config(config)) == learned(config, None)


def learned(config: Config, split_by: Json | None) -> tuple[list[float], dict[str, list[float]]]:
    """Losses of two steps, and the masters after them."""
    ranks = distributed.read_ranks()
    base = Path(config.model.base)
    model = build(config, split_by, None)
    engine = build_engine(config, model, deepspeed_config=deepspeed_config(config), total_steps=2, ranks=ranks)
    weights = LossWeights.build(text=1.0, audio=1.0, codebooks=None, num_codebooks=8)
    own = micro_batches(base, "all audio", count=ranks.world_size)[ranks.rank]
    losses = [train_step(engine, [own], weights).loss for _ in range(2)]
    trained = [(name, one) for name, one in engine.module.named_parameters() if one.requires_grad]
    masters = {name: safe_get_full_fp32_param(one).flatten().tolist() for name, one in trained}
    engine.destroy()
    return losses, masters


def build(config: Config, split_by: Json | None, start: Path | None) -> nn.Module:
    settings = choose_memory_settings(config, device_type="cpu")
    return build_trained_model(config, Path(config.model.base), settings, start=start, split_by=split_by)


def configured(base: Path, train: Json | None = None, lora: Json | None = None) -> Config:
    split_all = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return parity_config(base, train=train, lora=lora, stage=3, precision="bf16", extra=split_all)


def deepspeed_config(config: Config) -> dict[str, Any]:
    return build_deepspeed_config(config)


def main() -> None:
    cases, *folders = sys.argv[1:]
    distributed.init_process_group()
    for case in cases.split(","):
        globals()[case](*map(Path, folders))
    distributed.destroy_process_group()


if __name__ == "__main__":
    run_and_exit(main)
