"""Which optimizer a run has: what DeepSpeed is told of it, and what is refused before anything is loaded."""

import pytest
import torch

from ds_higgs.checkpoint.resharding import check_can_be_split
from ds_higgs.config import OptimConfig
from ds_higgs.config.file import load_config
from ds_higgs.errors import UserError
from ds_higgs.job import preflight
from ds_higgs.training.optimizers import check_optimizer, optimizer_keys
from ds_higgs.training.zero import build_deepspeed_config

MINIMAL = {"run.output_dir": "out", "model.base": "base", "data.train_manifest": "train.json"}
MUON = {**MINIMAL, "optim.type": "muon", "optim.max_grad_norm": 0, "train.mode": "full"}


def test_8_bits_say_all_that_is_in_the_way(monkeypatch):
    monkeypatch.setattr(preflight, "is_installed", lambda package: False)
    check_optimizer(OptimConfig(), device_type="cpu")
    with pytest.raises(UserError, match=r"found cpu\n.*bitsandbytes is not installed"):
        check_optimizer(OptimConfig(type="adamw_8bit"), device_type="cpu")
    monkeypatch.setattr(preflight, "is_installed", lambda package: True)
    check_optimizer(OptimConfig(type="adamw_8bit"), device_type="cuda")


def test_deepspeed_is_told_of_both_of_muons_rates():
    muon = OptimConfig(type="muon", max_grad_norm=0, learning_rate=1e-2, adam_learning_rate=1e-4, muon_momentum=0.9)
    parameters = optimizer_keys(muon)["optimizer"]["params"]
    assert (parameters["muon_lr"], parameters["adam_lr"], parameters["momentum"]) == (1e-2, 1e-4, 0.9)
    one_rate = optimizer_keys(OptimConfig(type="muon", max_grad_norm=0, learning_rate=1e-2))["optimizer"]["params"]
    assert one_rate["muon_lr"] == one_rate["adam_lr"] == 1e-2
    built = [build_deepspeed_config(load_config(None, {**MUON, "zero.stage": stage})) for stage in (2, 3)]
    assert [one["zero_optimization"]["reduce_scatter"] for one in built] == [True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.max_grad_norm": 1.0}, "optim: type muon needs max_grad_norm 0"),
        ({"optim.layer_decay": 0.9}, "optim: type muon has one rate for all layers"),
        ({"train.mode": "lora"}, "optim: type muon is for train.mode audio_path and full"),
        ({"optim.type": "adamw", "optim.adam_learning_rate": 1e-4}, "optim: adam_learning_rate is for type muon"),
        ({"optim.type": "adamw_8bit", "zero.offload_optimizer": True}, "zero: offload_optimizer has the moments on"),
    ],
)
def test_what_cannot_go_together_is_refused(changes, message):
    load_config(None, MUON)
    with pytest.raises(UserError, match=message):
        load_config(None, {**MUON, **changes})


def test_a_state_that_is_not_one_number_a_weight_is_not_split_anew(tmp_path):
    def shard(*keys):
        return {
            "base_optimizer_state": {"state": {0: {"step": torch.tensor(3.0), **dict.fromkeys(keys, torch.ones(4))}}}
        }

    files = [tmp_path / "rank-0.pt", tmp_path / "rank-1.pt"]
    check_can_be_split(shard("exp_avg", "exp_avg_sq", "average"), files)
    for keys in (("momentum_buffer",), ("state1", "state2", "absmax1")):
        with pytest.raises(UserError, match=f"{keys[0]}.* cannot be split anew; expected 2 ranks"):
            check_can_be_split(shard(*keys), files)
