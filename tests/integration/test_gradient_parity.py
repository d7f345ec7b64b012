"""DeepSpeed at every stage against plain torch on the whole batch: same gradient norms and updated weights."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

from ds_higgs.config import OptimConfig
from ds_higgs.model.tiny import write_tiny_base
from ds_higgs.training.keep_base import KeptBase
from ds_higgs.training.step_module import StepModule
from tests.support import launching
from tests.support.parity import (
    KEPT,
    ROUNDING,
    STEPS,
    add_gradients,
    build_model,
    micro_batches,
    parity_config,
    trainable,
)

PROGRAM = Path(__file__).parent / "workers" / "parity.py"
SCENARIOS = ("all audio", "rank 1 without audio")
# Else DeepSpeed leaves what is as small as a test's weights whole.
ALL_SPLIT = {"extra": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}


@dataclass(frozen=True)
class Setting:
    """One way to split and train a scenario; `repeated`: every micro-batch of a rank is the same one; train: LoRA's."""

    scenario: str
    accumulation: int
    zero: dict
    lora: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    optim: dict = field(default_factory=dict)
    repeated: bool = False
    keep: bool = False  # the divergence from the base is part of the loss

    @property
    def name(self) -> str:
        return str(self)

    @property
    def bf16(self) -> bool:
        return self.zero.get("precision") == "bf16"


def settings(ranks: int, *, every: bool = False) -> list[Setting]:
    """Stages, offload, accumulation and scenarios: every pair of their values, or `every` combination.

    Without audio on rank 1 up to stage 2.
    """
    found = []
    accumulations = (1, 2, 4) if every else (1, 4)
    for stage, offload, accumulation, scenario in product((0, 1, 2, 3), (False, True), accumulations, SCENARIOS):
        if ranks * accumulation > 8 or (offload and stage == 0) or (stage == 3 and scenario != "all audio"):
            continue
        if not every and stage < 3 and (scenario == "all audio") == (offload == (accumulation == 1)):
            continue
        found.append(Setting(scenario, accumulation, {"stage": stage, "offload_optimizer": offload}))
    for stage in (1, 2, 3):
        scenario = "all audio" if stage == 3 else "rank 1 without audio"
        found.append(Setting(scenario, 2, {"stage": stage, "overlap_comm": True}))
    return found


def settings_of_long_texts(accumulations: tuple[int, ...]) -> list[Setting]:
    """Ranks with other numbers of text chunks where every weight is split; the head frozen, trained, and with LoRA."""
    zero = {"stage": 3, **ALL_SPLIT}
    loras = [{}, {"modules_to_save": ["text_head"]}, {"targets": r"layers\.0\.mlp\.up_proj|.*text_lm_head"}]
    return [Setting("long texts", accumulation, zero, lora=lora) for accumulation in accumulations for lora in loras]


BF16_STAGE_3 = {"stage": 3, "precision": "bf16"}
RANKS = {"attention": 2, "audio_ffn": 6}
AUDIO_PATH, FULL = {"mode": "audio_path"}, {"mode": "full"}
# Nothing of it is in a batch without audio, so such a rank has no gradient at all.
AUDIO_FFN = {"mode": "full", "only": r"layers\.\d+\.audio_mlp\..*"}


# LoRA on one part, and others trained whole.
BESIDE_LORA = {
    "targets": ["attention"],
    "modules_to_save": ["audio_ffn", "audio_norms", "audio_head", "audio_embeddings"],
}
SLOWER = {"whole_learning_rate": 2e-3}


def settings_of_modes() -> list[Setting]:
    """Each way of training at the stages that differ most, without audio on rank 1 up to stage 2."""
    return [
        Setting("rank 1 without audio", 2, {"stage": 2}, train=FULL),
        Setting("rank 1 without audio", 1, {"stage": 0}, train=AUDIO_FFN),
        Setting("long texts", 1, {"stage": 3, **ALL_SPLIT}, train=FULL, optim={"layer_decay": 0.5}),
        Setting("rank 1 without audio", 1, {"stage": 2}, lora={"targets": RANKS}, optim={"loraplus_lr_ratio": 4}),
        Setting("rank 1 without audio", 2, {"stage": 2}, keep=True),
        Setting("rank 1 without audio", 2, {"stage": 2}, lora=BESIDE_LORA, optim=SLOWER, keep=True),
        Setting("all audio", 1, {"stage": 3, **ALL_SPLIT}, lora=BESIDE_LORA, optim=SLOWER),
    ]


def every_setting_of_modes() -> list[Setting]:
    """Modes, stages, offload, accumulation and scenarios: every combination that can be trained."""
    found = []
    ways = [*({"train": mode} for mode in (AUDIO_PATH, FULL, AUDIO_FFN)), {"lora": BESIDE_LORA, "optim": SLOWER}]
    scenarios = (*SCENARIOS, "long texts")
    for way, stage, offload, accumulation, scenario in product(ways, (0, 1, 2, 3), (False, True), (1, 2), scenarios):
        if (offload and stage == 0) or (stage == 3 and scenario == "rank 1 without audio"):
            continue
        split = ALL_SPLIT if stage == 3 else {}
        found.append(Setting(scenario, accumulation, {"stage": stage, "offload_optimizer": offload, **split}, **way))
    return found


def settings_in_bf16(*modes: dict) -> list[Setting]:
    """Every stage in the default precision, for each of `modes`."""
    return [
        Setting("all audio", accumulation, {"stage": stage, "precision": "bf16"}, train=mode)
        for mode in modes
        for stage in (0, 1, 2, 3)
        for accumulation in (1, 4)
    ] + [Setting("all audio", 2, {"stage": 2, "precision": "bf16"}, keep=True)] * (modes == ({},))


@pytest.fixture(scope="module")
def small_base(tmp_path_factory) -> Path:
    """Two layers: the settings are many."""
    folder = tmp_path_factory.mktemp("small") / "base"
    write_tiny_base(folder, hidden_size=64, num_layers=2, intermediate_size=96)
    return folder


def clip_gradients(parameters: list[torch.Tensor], max_norm: float) -> float:
    """Scale gradients to a norm of `max_norm` at most; the norm before, summed up in double.

    torch's own clipping is no reference: on a CPU its fp32 norm of some 10^5 numbers is 1e-5 too small.
    """
    norm = math.sqrt(sum(parameter.grad.double().square().sum().item() for parameter in parameters))
    for parameter in parameters:
        parameter.grad.mul_(min(1.0, max_norm / norm))
    return norm


@pytest.fixture(scope="module")
def plain(small_base):
    """One process, the whole batch, torch's own AdamW on fp32 weights, which bf16 ones follow."""

    @cache
    def train(scenario: str, bf16: bool, trained: str, keep: KeptBase | None) -> dict:
        precision = "bf16" if bf16 else "fp32"
        config = parity_config(small_base, **json.loads(trained), keep=keep is not None, precision=precision)
        module = StepModule(build_model(config))
        masters = {name: weight.float() for name, weight in trainable(module.peft_model).items()}
        optim = config.optim
        settings = {"lr": optim.learning_rate, "eps": optim.eps, "weight_decay": optim.weight_decay}
        groups = [{"params": [one], "lr": rate(name, optim)} for name, one in masters.items()]
        optimizer = torch.optim.AdamW(groups, **settings)
        batches = micro_batches(small_base, scenario, count=2)
        losses, norms = [], []
        for _ in range(STEPS):
            losses.append(add_gradients(module, batches, masters, keep))
            norms.append(clip_gradients(list(masters.values()), optim.max_grad_norm))
            optimizer.step()
            module.peft_model.load_state_dict(masters, strict=False)
        after = add_gradients(module, batches, masters)
        return {"grad_norms": norms, "losses": losses, "loss_after": after, "weights": masters}

    return lambda setting: train(
        setting.scenario,
        setting.bf16,
        json.dumps({"train": setting.train, "lora": setting.lora, "optim": setting.optim}),
        KEPT if setting.keep else None,
    )


def rate(name: str, optim: OptimConfig) -> float:
    """Of a weight of the model of two layers."""
    height = {"layers.0.": 2, "layers.1.": 1, "embed_tokens.": 3, "audio_codebook_embeddings.": 3}
    layers = next((value for part, value in height.items() if part in name), 0)
    own = (optim.whole_learning_rate if "modules_to_save" in name else None) or optim.learning_rate
    return own * optim.layer_decay**layers * (optim.loraplus_lr_ratio if "lora_B" in name else 1)


def train(ranks: int, chosen: list[Setting], base: Path, folder: Path) -> dict[str, dict]:
    """What the ranks found in every setting, by its name."""
    (folder / "settings.json").write_text(json.dumps([{"name": one.name, **asdict(one)} for one in chosen]))
    output = folder / "results.pt"
    done = launching.run_ranks(ranks, PROGRAM, base, output, folder / "settings.json")
    assert done.returncode == 0, done.stdout[-4000:]
    return torch.load(output, weights_only=True)


def settings_of_four(ranks: int) -> list[Setting]:
    """1 x 4 and 4 x 1 micro-batches, beside 2 x 2."""
    plain_stage = {"stage": 2, "offload_optimizer": False}
    return [s for s in settings(ranks, every=True) if s.zero == plain_stage and ranks * s.accumulation == 4]


@pytest.mark.parametrize(
    ("ranks", "chosen"),
    [
        pytest.param(1, settings_of_four(1), id="1"),
        pytest.param(2, settings(2) + settings_of_long_texts((2,)) + settings_of_modes(), id="2"),
        pytest.param(4, settings_of_four(4), id="4", marks=pytest.mark.slow),
        pytest.param(2, settings(2, every=True) + settings_of_long_texts((1, 2)), id="2-every", marks=pytest.mark.slow),
        pytest.param(2, every_setting_of_modes(), id="2-modes", marks=pytest.mark.slow),
    ],
)
def test_every_split_gives_the_gradient_of_the_whole_batch(ranks, chosen, small_base, plain, tmp_path):
    results = train(ranks, chosen, small_base, tmp_path)
    for setting in chosen:
        found, expected = results[setting.name], plain(setting)
        assert found["losses"] == pytest.approx(expected["losses"], rel=ROUNDING), setting.name
        assert found["loss_after"] == pytest.approx(expected["loss_after"], rel=ROUNDING), setting.name
        assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=ROUNDING), setting.name
        for name, weight in expected["weights"].items():
            other = found["weights"][name]
            torch.testing.assert_close(other, weight, rtol=1e-5, atol=1e-5, msg=f"{setting.name}: {name}")
        assert found["fresh"], setting.name


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param([*settings_in_bf16({}), Setting("all audio", 4, BF16_STAGE_3, train=FULL)], id="LoRA"),
        pytest.param(settings_in_bf16(AUDIO_PATH, FULL), id="modes", marks=pytest.mark.slow),
    ],
)
def test_bf16_updates_are_those_of_plain_torch(chosen, small_base, plain, tmp_path):
    """To bf16's rounding, over all stages; and to the bit for a micro-batch that comes eight times instead of once.

    The eight gradients sum to eight times one, which is exact in fp32, and not where they are summed in bf16.
    """
    once = Setting("all audio", 1, {"stage": 2, "precision": "bf16"})
    eight_times = replace(once, accumulation=8, repeated=True)
    results = train(2, [*chosen, once, eight_times], small_base, tmp_path)
    for setting in chosen:
        initial = trainable(build_model(parity_config(small_base, train=setting.train, precision="bf16")))
        found, expected = results[setting.name], plain(setting)
        assert found["fresh"], setting.name
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4), setting.name
        assert found["loss_after"] == pytest.approx(expected["loss_after"], rel=1e-4), setting.name
        assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=5e-3), setting.name
        for name, weight in expected["weights"].items():
            error = (found["weights"][name] - weight).norm() / (weight - initial[name].float()).norm()
            assert error < 2e-2, f"{setting.name}: {name}: {error:.2g} of the update"
    for name, weight in results[once.name]["weights"].items():
        assert torch.equal(results[eight_times.name]["weights"][name], weight), name
