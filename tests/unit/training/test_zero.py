"""The DeepSpeed JSON says what the configuration says, and nothing behind its back."""

import importlib.util
import json

import deepspeed.runtime.config
import pytest

from ds_higgs.config import Config
from ds_higgs.errors import UserError
from ds_higgs.training.zero import OWNED_KEYS, build_deepspeed_config, merged, splits_from_the_start
from tests.support.launching import ROOT

_spec = importlib.util.spec_from_file_location("generate", ROOT / "ds_configs" / "generate.py")
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


def make_config(**sections):
    values = {"run": {"output_dir": "out"}, "model": {"base": "b"}, "data": {"train_manifest": "t.json"}}
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return Config.model_validate(values)


@pytest.mark.parametrize("name", generate.ZERO_SETTINGS)
def test_ready_files_are_what_zero_makes(name):
    assert (ROOT / "ds_configs" / name).read_text() == generate.render(name)


def test_default_is_zero_2_in_bf16_and_every_number_is_the_configs():
    config = make_config(
        data={"batch_size": 3},
        optim={
            "learning_rate": 1.25e-4,
            "weight_decay": 0.03,
            "betas": [0.8, 0.95],
            "eps": 1e-7,
            "max_grad_norm": 0.7,
            "gradient_accumulation_steps": 5,
        },
        zero={"reduce_bucket_size": 123, "allgather_bucket_size": 456, "overlap_comm": True},
    )
    built = build_deepspeed_config(config)
    assert built["train_micro_batch_size_per_gpu"] == 3
    assert built["gradient_accumulation_steps"] == 5
    assert built["gradient_clipping"] == 0.7
    adam = {"lr": 1.25e-4, "betas": [0.8, 0.95], "eps": 1e-7, "weight_decay": 0.03}
    assert built["optimizer"] == {"type": "AdamW", "params": {**adam, "torch_adam": True, "fused": True}}
    assert built["bf16"] == {"enabled": True}
    assert built["zero_optimization"]["stage"] == 2
    assert built["zero_optimization"]["reduce_bucket_size"] == 123
    assert built["zero_optimization"]["allgather_bucket_size"] == 456
    assert built["zero_optimization"]["overlap_comm"] is True
    assert built["communication_data_type"] == "fp32"
    assert built["data_types"] == {"grad_accum_dtype": "fp32"}
    json.dumps(built)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_deepspeed_accepts_it(stage, precision, monkeypatch):
    monkeypatch.setattr(deepspeed.runtime.config.dist, "is_initialized", lambda: False)
    built = build_deepspeed_config(make_config(zero={"stage": stage, "precision": precision}))
    parsed = deepspeed.runtime.config.DeepSpeedConfig(built)
    assert parsed.zero_optimization_stage == stage
    assert parsed.bfloat16_config.enabled == (precision == "bf16")


def test_extra_is_merged_last_and_deep():
    config = make_config(
        zero={"extra": {"wall_clock_breakdown": True, "zero_optimization": {"round_robin_gradients": True}}}
    )
    built = build_deepspeed_config(config)
    assert built["wall_clock_breakdown"] is True
    assert built["zero_optimization"]["round_robin_gradients"] is True
    assert built["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize("key", OWNED_KEYS)
def test_extra_may_not_overrule_the_configuration(key):
    with pytest.raises(UserError, match=rf"zero\.extra\.{key}: set "):
        build_deepspeed_config(make_config(zero={"extra": {key: 1}}))


def test_extra_may_not_overrule_a_zero_key_and_misspelt_ones_are_found():
    with pytest.raises(UserError, match=r"zero_optimization\.stage: set zero\.stage instead"):
        build_deepspeed_config(make_config(zero={"extra": {"zero_optimization": {"stage": 3}}}))
    with pytest.raises(UserError, match=r"wall_clock_breakdwn: .*did you mean wall_clock_breakdown"):
        build_deepspeed_config(make_config(zero={"extra": {"wall_clock_breakdwn": True}}))


def test_a_base_is_split_from_the_start_at_stage_3_and_else_it_is_told(caplog):
    def splits(**zero) -> bool:
        return splits_from_the_start(build_deepspeed_config(make_config(zero=zero)))

    assert [splits(stage=stage) for stage in (0, 1, 2, 3)] == [False, False, False, True]
    with caplog.at_level("INFO", logger="ds_higgs"):
        assert not splits(stage=3, extra={"zero_optimization": {"zero_quantized_nontrainable_weights": True}})
    assert "every GPU holds the whole base at the start" in caplog.text


def test_trackers_are_deepspeeds_monitors():
    built = build_deepspeed_config(make_config(logging={"csv": True, "wandb": "voices", "comet": "voices"}))
    assert built["tensorboard"] == {"enabled": True, "output_path": "out", "job_name": "tensorboard"}
    assert built["csv_monitor"] == {"enabled": True, "output_path": "out", "job_name": "csv"}
    assert built["wandb"] == built["comet"] == {"enabled": True, "project": "voices"}


def test_merged_leaves_its_arguments_alone():
    base, extra = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merged(base, extra) == {"a": {"b": 1, "c": 2}}
    assert base == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"zero_optimization": None}, "zero.extra.zero_optimization: found None, expected a mapping"),
        ({"tensorboard": 5, "wall_clock_breakdown": 1}, r"(?s)tensorboard: found 5.*breakdown: found 1, expected true"),
        ({"steps_per_print": True}, "steps_per_print: found True, expected a whole number or null"),
        ({"zero_optimization": {"sub_group_size": "x"}}, "DeepSpeed refuses it: .*sub_group_size"),
        ({"zero_optimization": {"sub_grup_size": 5}}, "DeepSpeed refuses it: .*sub_grup_size"),
        ({"flops_profiler": {"enabled": "x"}}, "DeepSpeed refuses it"),
    ],
)
def test_extra_that_deepspeed_would_refuse_once_the_model_is_loaded(extra, message):
    with pytest.raises(UserError, match=message):
        build_deepspeed_config(make_config(zero={"extra": extra}))
