"""The memory estimate: against counted tensor bytes of real steps, and the released model's known numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel

from ds_higgs.batch import Batch
from ds_higgs.commands.estimate import run_estimate
from ds_higgs.config import Config
from ds_higgs.errors import UserError
from ds_higgs.hub import RELEASED_REPOSITORY
from ds_higgs.job import distributed
from ds_higgs.job.distributed import Ranks
from ds_higgs.losses import LossWeights, build_targets
from ds_higgs.model.lora import count_parameters
from ds_higgs.model.parts import TARGETS
from ds_higgs.model.patches import apply_patches
from ds_higgs.model.tiny import build_tiny_config
from ds_higgs.model.tiny_tokenizer import build_tiny_tokenizer
from ds_higgs.model.trained import TrainMode, make_trainable
from ds_higgs.model.whole_modules import release_originals
from ds_higgs.sizing import activations
from ds_higgs.sizing.estimator import (
    CHECKPOINTING_CHOICES,
    USABLE_SHARE,
    Estimator,
)
from ds_higgs.sizing.inputs import BatchShape
from ds_higgs.sizing.memory import GIB, estimate_memory, total_bytes
from ds_higgs.sizing.shape import model_shape
from ds_higgs.training.memory_plan import (
    build_estimator,
    build_policy,
    choose_memory_settings,
    decide_checkpointing,
    resolve_checkpointing,
)
from ds_higgs.training.step_module import StepModule
from tests.support.batches import Sample, make_batch
from tests.support.tensor_bytes import TensorBytes

SAMPLES = [
    Sample("a sentence of some length to be spoken " * 2, (60,), (150,)),
    Sample("another one, somewhat shorter", (40,), (120,)),
    Sample("and a third", (55,), (135,)),
]


def expanded_shape(batch: Batch, text_rows: int, audio_rows: int) -> BatchShape:
    """Every sample has two placeholders; a segment gains two specials and seven frames of the delay pattern."""
    tokens = batch.model_inputs["attention_mask"].sum(dim=1).tolist()
    frames = [sum((*sample.reference_frames, *sample.target_frames)) + 2 * 9 for sample in SAMPLES]
    lengths = [text - 2 + audio for text, audio in zip(tokens, frames, strict=True)]
    return BatchShape(len(lengths), sum(lengths), max(lengths), sum(frames), text_rows, audio_rows)


def measure_and_estimate(
    *,
    hidden_size: int,
    num_layers: int,
    checkpoint_every: int | None,
    dtype: torch.dtype,
    dropout: float = 0.0,
    mode: TrainMode = "lora",
    whole: tuple[str, ...] = (),
) -> tuple[int, int]:
    """Counted peak of two training steps, and the estimate of it; whole: parts trained so in place of LoRA."""
    tokenizer = build_tiny_tokenizer()
    config = build_tiny_config(
        tokenizer,
        whisper=False,
        hidden_size=hidden_size,
        num_layers=num_layers,
        intermediate_size=3 * hidden_size,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
    )
    batch = make_batch(SAMPLES, tokenizer, config)
    with TensorBytes() as counted:
        model = HiggsAudioModel(config).to(dtype)
        targets = [path for path in TARGETS if path not in whole]
        lora = {"rank": 16, "alpha": 32, "dropout": dropout, "targets": targets, "modules_to_save": whole}
        trained = make_trainable(model, mode=mode, only=None, lora=lora)
        if mode == "lora":
            release_originals(trained)
        apply_patches(model, packed_rows=True, kernels="torch", activation_checkpointing=checkpoint_every)
        module = StepModule(trained)
        labels = build_targets(batch, placeholder_ids=module.placeholder_ids)
        weights = LossWeights.build(text=1.0, audio=1.0, codebooks=None, num_codebooks=8)
        weights_to_train = [weight for weight in trained.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights_to_train, lr=1e-4, fused=True)  # as in training
        for _ in range(2):
            module(batch.model_inputs, labels, weights.scales(labels.counts()).float()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    counts = count_parameters(trained)
    shape = expanded_shape(batch, len(labels.text_labels), len(labels.audio_frames))
    config_of_run = released_config(
        train={"mode": mode},
        zero={"stage": 0, "precision": "fp32" if dtype == torch.float32 else "bf16"},
        lora={} if mode != "lora" else {"dropout": dropout},
    )
    policy = build_policy(config_of_run, counts, world_size=1, cuda=False)
    policy = replace(policy, checkpoint_every=checkpoint_every)
    terms = estimate_memory(
        model_shape(config),
        shape,
        policy,
        frozen=counts["total"] - counts["trainable"],
        trainable=counts["trainable"],
    )
    if dtype != torch.float32:  # this test's optimizer keeps no fp32 state
        terms |= {"master weights": 0, "Adam moments": 2 * dtype.itemsize * counts["trainable"]}
    return counted.peak, total_bytes(terms)


@pytest.mark.parametrize("checkpoint_every", [None, 1])
@pytest.mark.parametrize(("hidden_size", "num_layers"), [(64, 6), (128, 4), (256, 3)])
def test_estimate_is_within_ten_per_cent_of_counted_bytes(hidden_size: int, num_layers: int, checkpoint_every):
    measured, estimated = measure_and_estimate(
        hidden_size=hidden_size,
        num_layers=num_layers,
        checkpoint_every=checkpoint_every,
        dropout=0.05,
        dtype=torch.float32,
    )
    assert estimated == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize(
    ("checkpoint_every", "dropout", "dtype"),
    [(2, 0.05, torch.float32), (None, 0.0, torch.float32), (None, 0.05, torch.bfloat16), (1, 0.0, torch.bfloat16)],
)
def test_other_policies_too(checkpoint_every, dropout: float, dtype: torch.dtype):
    measured, estimated = measure_and_estimate(
        hidden_size=128, num_layers=4, checkpoint_every=checkpoint_every, dropout=dropout, dtype=dtype
    )
    assert estimated == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize("checkpoint_every", [None, 1])
@pytest.mark.parametrize("whole", [("audio_ffn",), ("attention", "text_ffn")], ids=str)
def test_parts_that_are_trained_whole_beside_lora_too(whole: tuple[str, ...], checkpoint_every):
    settings = {"hidden_size": 128, "num_layers": 4, "dropout": 0.05, "dtype": torch.bfloat16}
    measured, estimated = measure_and_estimate(whole=whole, checkpoint_every=checkpoint_every, **settings)
    assert estimated == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoint_every", [None, 1])
@pytest.mark.parametrize("mode", ["audio_path", "full"])
def test_weights_that_are_trained_themselves_too(mode: TrainMode, checkpoint_every, dtype: torch.dtype):
    settings = {"hidden_size": 128, "num_layers": 4, "checkpoint_every": checkpoint_every, "dtype": dtype}
    measured, estimated = measure_and_estimate(mode=mode, **settings)
    assert estimated == pytest.approx(measured, rel=0.10)


def test_the_comparison_notices_a_forgotten_term(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(activations._Step, "inputs", lambda *args, **kwargs: 0)
    settings = {"hidden_size": 128, "num_layers": 4, "checkpoint_every": None, "dropout": 0.05}
    measured, estimated = measure_and_estimate(**settings, dtype=torch.float32)
    assert estimated != pytest.approx(measured, rel=0.10)


def released_config(**sections) -> Config:
    values = {"run": {"output_dir": "out"}, "model": {"base": RELEASED_REPOSITORY}, "data": {"train_manifest": "m"}}
    return Config.model_validate({**values, **sections})


def test_released_model_is_known_without_weights_or_network(capsys: pytest.CaptureFixture):
    run_estimate(released_config(), world_size=8, positions=500, card_gib=[24, 141])
    printed = capsys.readouterr().out
    assert "5,771,283,456 parameters" in printed
    assert "trained: 39,452,672 (attention 9,175,040, text_ffn 15,138,816, audio_ffn 15,138,816)" in printed
    assert "A card of 24 GiB" in printed
    assert "not one sample" not in printed
    assert "CPU memory" not in printed


def test_a_card_too_small_is_said_to_hold_nothing_and_copies_take_the_cpus_memory(capsys: pytest.CaptureFixture):
    run_estimate(released_config(checkpoint={"async": True}), world_size=1, positions=500, card_gib=[8])
    printed = capsys.readouterr().out
    assert printed.count("not one sample") == len(CHECKPOINTING_CHOICES)
    assert f"copy of a checkpoint {14 * 39_452_672 / GIB:>10.3f} GiB" in printed


@pytest.fixture(scope="module")
def released() -> Estimator:
    """Of the released model on 8 GPUs."""
    return build_estimator(released_config(), world_size=8)


def test_states_by_zero_stage_world_size_offload_and_quantization(released: Estimator):
    batch = BatchShape.typical(2, 500)
    trained, frozen = 39_452_672, 5_771_283_456

    def terms(**changes) -> dict[str, int]:
        policy = replace(released.policy, **changes)
        return replace(released, policy=policy).terms(batch, checkpoint_every=1)

    assert terms(zero_stage=2)["frozen weights"] == 2 * frozen
    assert terms(zero_stage=3)["frozen weights"] == 2 * frozen // 8
    assert terms(zero_stage=2)["Adam moments"] == 8 * trained // 8
    assert terms(zero_stage=0)["Adam moments"] == 8 * trained
    assert terms(zero_stage=2)["master weights"] == 4 * trained // 8
    assert terms(offload_optimizer=True)["Adam moments"] == 0
    assert terms(zero_stage=0, optimizer="adamw_8bit")["Adam moments"] == trained * 65 // 32  # 2 + 2 * 4 / 256 bytes
    assert "averaged weights" not in terms()
    assert terms(zero_stage=2, averaged=True)["averaged weights"] == 4 * trained // 8
    assert terms(zero_stage=0, averaged=True)["averaged weights"] == 4 * trained
    assert terms(averaged=True, offload_optimizer=True)["averaged weights"] == 0
    assert terms()["gradients"] == 0  # at the peak: they come as activations go
    assert terms(gradient_accumulation_steps=4)["gradients"] == 4 * trained  # the earlier micro-batches' sums
    assert terms()["communication buckets"] == 2 * 50_000_000
    assert terms(overlap_comm=True)["communication buckets"] == 4 * 50_000_000
    assert terms(zero_stage=3)["communication buckets"] == 4 * 50_000_000
    assert terms(quantized="nf4")["frozen weights"] < 0.4 * terms()["frozen weights"]
    in_layers = released.counts["quantizable"]  # a byte for each direction, beside the weight
    assert terms(quantized="fp8")["frozen weights"] == terms()["frozen weights"] + 2 * in_layers
    full = terms(supervised_heads=False)["working space"]
    assert full >= 1000 * 128256 * 3 * 4


def test_the_largest_batch_fits_and_one_more_does_not(released: Estimator):
    for every in CHECKPOINTING_CHOICES:
        largest = released.largest_batch(500, checkpoint_every=every, memory_bytes=24 * GIB)
        for samples, fits in ((largest, True), (largest + 1, False)):
            batch = BatchShape.typical(samples, 500)
            size = total_bytes(released.terms(batch, checkpoint_every=every))
            assert (size <= USABLE_SHARE * 24 * GIB) == fits


def test_auto_checkpointing_is_the_fastest_that_fits(released: Estimator):
    batch = BatchShape.typical(2, 1500)
    chosen = [released.choose_checkpointing(batch, memory_bytes=gib * GIB) for gib in (141, 28, 24, 14, 4)]
    assert chosen[0] is None
    assert chosen[-1] == 1
    order = [CHECKPOINTING_CHOICES.index(every) for every in chosen]
    assert order == sorted(order)


@pytest.mark.parametrize(("policy", "expected"), [("none", None), ("full", 1), (3, 3)])
def test_a_policy_that_is_set_stays(policy, expected):
    config = released_config(memory={"activation_checkpointing": policy})
    assert resolve_checkpointing(config, longest=1500, world_size=1, memory_bytes=1, cuda=True) == expected


def test_a_base_without_a_higgs_config_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    config = released_config(model={"base": str(tmp_path)})
    with pytest.raises(UserError, match="model_type is 'llama'"):
        build_estimator(config, world_size=1)


@pytest.mark.parametrize(("memory_gib", "expected"), [(1000, None), (0.001, 1)])
def test_a_run_takes_the_policy_that_fits_its_device(tiny_base: Path, monkeypatch, memory_gib: float, expected):
    monkeypatch.setattr(distributed, "memory_bytes", lambda device: int(memory_gib * GIB))
    config = released_config(model={"base": str(tiny_base)})
    settings = choose_memory_settings(config, device_type="cpu")
    decided = decide_checkpointing(config, settings, longest=300, ranks=Ranks(rank=0, world_size=1, local_rank=0))
    assert decided == replace(settings, activation_checkpointing=expected)
