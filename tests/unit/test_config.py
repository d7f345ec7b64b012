"""Configuration: defaults, overrides, and every mistake in one message."""

import pytest
import yaml

from ds_higgs.cli.main import parse_overrides
from ds_higgs.config.file import SHORT_FLAGS, known_keys, load_config, nearest_key, parse_value, resolved, write_config
from ds_higgs.errors import UserError

MINIMAL = {"run.output_dir": "out", "model.base": "base", "data.train_manifest": "train.json"}


def test_defaults_that_users_rely_on():
    config = load_config(None, MINIMAL)
    assert (config.run.seed, config.run.epochs) == (0, 1)
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (16, 32, 0.05)
    assert config.lora.targets == ("attention", "text_ffn", "audio_ffn")
    assert (config.data.batch_size, config.optim.learning_rate, config.optim.max_grad_norm) == (2, 2e-4, 1.0)
    assert (config.optim.schedule, config.zero.stage, config.zero.precision) == ("cosine", 2, "bf16")
    assert (config.checkpoint.save_steps, config.checkpoint.keep_latest, config.checkpoint.resume) == (1000, 3, "auto")
    assert (config.eval.eval_steps, config.memory.supervised_text_head) == (500, True)


def whole(*parts, **values) -> dict:
    return MINIMAL | {"lora.targets": ["text_ffn"], "lora.modules_to_save": list(parts)} | values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (MINIMAL | {"lora.modules_to_save": ["audio_ffn", "attention"]}, "audio_ffn, attention: in lora.targets too"),
        (whole("text_ffn", **{"lora.targets": {"text_ffn": 4}}), "lora.modules_to_save: text_ffn: in lora.targets too"),
        (MINIMAL | {"lora.modules_to_save": ["audio_fn"]}, r"lora.modules_to_save.0: .* \(found 'audio_fn'\)"),
        (MINIMAL | {"lora.modules_to_save": "layers.("}, "lora.modules_to_save: .*is not a regular expression"),
        (MINIMAL | {"optim.whole_learning_rate": 1e-5}, "lora.modules_to_save trains whole, and there is none"),
        (whole("attention", **{"model.quantization": "nf4"}), "in 4 bits: leave out model.quantization"),
        (MINIMAL | {"train.mode": "full", "lora.modules_to_save": ["attention"]}, "has no LoRA|in lora.targets too"),
    ],
)
def test_parts_that_cannot_be_trained_whole_beside_lora_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        load_config(None, values)


def test_adapters_that_are_large_are_kept_as_checkpoints_are():
    assert load_config(None, MINIMAL | {"lora.modules_to_save": ["audio_head"]}).kept_adapters is None
    assert load_config(None, whole("attention", "audio_norms")).kept_adapters == 3
    assert load_config(None, whole() | {"lora.modules_to_save": r"layers\.0\..*"}).kept_adapters == 3
    assert load_config(None, whole("attention", **{"checkpoint.keep_adapters": 5})).kept_adapters == 5
    assert load_config(None, whole("audio_head", **{"model.quantization": "nf4"})).kept_adapters is None


def test_short_flags_are_keys():
    keys = {key for key, _, _ in known_keys()}
    assert set(SHORT_FLAGS.values()) <= keys
    typed = """--train_manifest train.json --output_dir out --base_ckpt BASE --batch_size 4 --lr 1e-4 --epochs 2
        --grad_accum 8 --warmup 10 --wd 0.1 --lora_r 8 --lora_alpha 16 --lora_dropout 0.1 --log_steps 5 --val_steps 7
        --save_steps 9"""
    overrides = parse_overrides(typed.split())
    config = load_config(None, overrides)
    assert config.optim.learning_rate == 1e-4
    assert config.optim.gradient_accumulation_steps == 8
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 16, 0.1)
    assert (config.logging.log_steps, config.eval.eval_steps, config.checkpoint.save_steps) == (5, 7, 9)


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "run: {output_dir: out}\nmodel: {base: b}\ndata: {train_manifest: t}\noptim: {learning_rate: 1.0e-5}\n"
    )
    overrides = parse_overrides(["--optim.learning_rate", "3e-5", "--zero.extra.wall_clock_breakdown=true"])
    config = load_config(path, overrides)
    assert config.optim.learning_rate == 3e-5
    assert config.zero.extra == {"wall_clock_breakdown": True}


def test_three_mistakes_are_reported_together_with_the_nearest_key(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "run: {output_dir: out}\nmodel: {base: b}\ndata: {train_manifest: t, batch_sise: 2}\n"
        "optim: {learning_rate: -1}\nzero: {stage: 7}\n"
    )
    with pytest.raises(UserError) as error:
        load_config(path, {})
    message = str(error.value)
    assert str(path) in message
    assert "data.batch_sise: unknown key; did you mean data.batch_size?" in message
    assert "optim.learning_rate" in message
    assert "found -1" in message
    assert "zero.stage" in message
    assert message.count("\n  - ") == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a: [", "not valid YAML"), ("- a", "found a list"), ("", "found nothing"), ("a", "found a str")],
)
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path, text, expected):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=expected) as error:
        load_config(path, {})
    assert str(path) in str(error.value)


def test_missing_file_and_bytes_that_are_no_text(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.yaml", {})
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "bytes.yaml", {})


REPEATED = """run: {output_dir: out}
lora:
  rank: 4
model: {base: b}
data: {train_manifest: t}
"""
EXPLODING = "a1: &a1 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(2, 60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (REPEATED + "lora:\n  dropout: 0.1\n", r"config.yaml:6: lora is there already, in line 2"),
        (REPEATED + "optim:\n  eps: 1\n  'eps': 2\n", r"config.yaml:8: eps is there already, in line 7"),
        ("zero: &a\n  extra: {again: *a}\n", r"config.yaml:1: holds itself, by an alias"),
        (EXPLODING, r"stands for more than 100,000 values"),
        ("[" * 5000, "nested too deeply"),
        ("run: {seed: 0x_}", "holds a number that cannot be read"),
        (f"run: {{seed: {'9' * 5000}}}", "config.yaml:1: a number of 5000 digits"),
        ("run: {seed: !!int x}", "config.yaml:1: the tag !!int cannot be used here"),
        ("run: {seed: !!timestamp x}", "the tag !!timestamp cannot be used here"),
        ("a: !!python/object/apply:os.getpid []", "the tag !!python/object/apply:os.getpid cannot be used here"),
    ],
)
def test_yaml_that_would_mislead_or_fail_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path, {})


def test_aliases_and_merged_mappings_may_be_used(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(REPEATED + "eval: &every {eval_steps: 7}\nzero: {extra: {timers: {<<: *every, eval_steps: 8}}}\n")
    assert load_config(path, {}).zero.extra == {"timers": {"eval_steps": 8}}


def test_a_flag_that_repeats_a_key_inside_its_value_is_listed():
    with pytest.raises(UserError, match=r"--zero.extra.timers: the value:1: a is there already, in line 1"):
        parse_overrides(["--zero.extra.timers", "{a: 1, a: 2}"])


def test_a_date_is_a_name_and_numbers_are_read_without_a_dot(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "run: {output_dir: 2026-11-21}\nmodel: {base: b, revision: 12e7}\ndata: {train_manifest: t}\n"
        "optim: {learning_rate: 1e-5}\n"
        "zero: {reduce_bucket_size: 5e8, extra: {zero_optimization: {sub_group_size: 1e9}}}\n"
    )
    config = load_config(path, parse_overrides(["--run.epochs", "1e3"]))
    assert (config.run.output_dir.name, config.model.revision) == ("2026-11-21", "12e7")
    assert (config.optim.learning_rate, config.zero.reduce_bucket_size, config.run.epochs) == (1e-5, 500_000_000, 1000)
    assert config.zero.extra == {"zero_optimization": {"sub_group_size": 1e9}}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.seed", 2**70),
        ("run.epochs", 10**400),
        ("run.epochs", True),
        ("run.output_dir", True),
        ("run.output_dir", 10**60),
        ("run.output_dir", ""),
        ("run.output_dir", "x" * 300),
        ("data.cache_dir", "a\0b"),
        ("model.base", "\ud800"),
        ("model.base", "x/" * 3000),
        ("optim.learning_rate", float("inf")),
        ("optim.learning_rate", "1e999"),
        ("optim.learning_rate", True),
        ("optim.weight_decay", float("nan")),
        ("optim.max_grad_norm", "inf"),
        ("loss.codebook_weights", [float("inf")] * 8),
        ("loss.codebook_weights", "falling off"),
        ("data.max_audio_s", 1e306),
        ("lora.targets", "a{99999999999}"),
        ("lora.targets", []),
        ("zero.stage", True),
        ("zero.extra", {"timers": {"a": [float("inf")]}}),
    ],
)
def test_a_value_that_no_run_can_have_is_refused_by_its_key(key, value):
    with pytest.raises(UserError, match=key.replace(".", r"\.")) as error:
        load_config(None, {**MINIMAL, key: value})
    assert len(str(error.value)) < 1000
    assert "tuple[" not in str(error.value)


def test_the_shortest_clip_is_not_longer_than_the_longest():
    with pytest.raises(UserError, match="min_audio_s 5 is above max_audio_s 4"):
        load_config(None, {**MINIMAL, "data.min_audio_s": 5, "data.max_audio_s": 4})


@pytest.mark.parametrize(
    ("key", "value"),
    [("optim.gradient_accumulation_steps", 2), ("data.max_tokens", 4000), ("data.max_tokens", "auto")],
)
def test_the_size_of_a_step_is_said_once(key, value):
    with pytest.raises(UserError, match=r"global_batch_size and .* are both set"):
        load_config(None, {**MINIMAL, "optim.global_batch_size": 16, key: value})


def test_missing_keys_say_what_they_are():
    with pytest.raises(UserError) as error:
        load_config(None, {"run.output_dir": "out"})
    assert "model: missing (needs model.base)" in str(error.value)
    assert "data: nothing to train on: expected train_manifest, or several sources in train" in str(error.value)


def test_wrong_flags_are_all_listed():
    with pytest.raises(UserError) as error:
        parse_overrides(["--optim.lr", "1", "word", "--data.batch_size"])
    message = str(error.value)
    assert "--optim.lr: unknown flag; did you mean --optim." in message
    assert "word: expected a flag" in message
    assert "--data.batch_size: expected a value" in message


def test_the_launchers_local_rank_is_ignored():
    assert parse_overrides(["--local_rank=3", "--lr", "1"]) == {"optim.learning_rate": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2026-11-21", "2026-11-21"),
        ("0.0001", 1e-4),
        ("3", 3),
        ("true", True),
        ("null", None),
        ("[a, b]", ["a", "b"]),
        ("a: b: c", "a: b: c"),
        ("x", "x"),
    ],
)
def test_values_are_read_as_yaml_reads_them(text, value):
    assert parse_value(text) == value


def test_resolved_file_reproduces_the_configuration(tmp_path):
    config = load_config(None, {**MINIMAL, "run.output_dir": str(tmp_path), "loss.codebook_weights": [1] * 8})
    write_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml", {})
    assert resolved(again) == resolved(config)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["train_manifest"].startswith("/")


def test_nothing_to_learn_is_refused():
    with pytest.raises(UserError, match="nothing would be learned"):
        load_config(None, {**MINIMAL, "loss.text_weight": 0, "loss.audio_weight": 0})


def test_stage_0_cannot_offload():
    with pytest.raises(UserError, match="stage 0 does not split the optimizer"):
        load_config(None, {**MINIMAL, "zero.stage": 0, "zero.offload_optimizer": True})


def test_nearest_key_knows_the_section_or_the_name():
    assert nearest_key("optim.learning_rte") == "optim.learning_rate"
    assert nearest_key("learning_rate") == "optim.learning_rate"
    assert nearest_key("qqqqqqqq") is None


def test_samples_need_prompts():
    with pytest.raises(UserError, match=r"num_audio_samples needs data\.val_manifest"):
        load_config(None, {**MINIMAL, "eval.num_audio_samples": 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval.patience": 3}, "patience needs best_by"),
        ({"eval.best_by": "audio_loss"}, "best_by needs data.val_manifest"),
        ({"eval.best_by": "stop_rate", "data.val_manifest": "v"}, "best_by stop_rate needs num_audio_samples"),
        ({"eval.weights": "ema"}, r"eval: weights ema needs optim\.ema_decay"),
        ({"eval.best_by": "word_error_rate", "eval.num_audio_samples": 2}, "best_by word_error_rate needs asr"),
        ({"eval.best_by": "speaker_similarity", "eval.num_audio_samples": 2}, "needs speaker_model"),
        ({"eval.asr": "openai/whisper-small"}, "asr needs num_audio_samples"),
        ({"eval.speaker_model": "m"}, "speaker_model needs num_audio_samples"),
        ({"eval.language": "arabic"}, "language needs asr"),
    ],
)
def test_the_best_needs_something_to_be_measured_by(changes, message):
    with pytest.raises(UserError, match=message):
        load_config(None, {**MINIMAL, **changes})


def test_a_key_in_the_configuration_is_refused_without_showing_it():
    extra = {"comet": {"enabled": True, "api_key": "hunter2"}, "wandb": {"token": ""}, "tokens_per_batch": 5}
    with pytest.raises(UserError, match=r"zero\.extra\.comet\.api_key: looks like a key") as error:
        load_config(None, {**MINIMAL, "zero.extra": extra})
    assert "hunter2" not in str(error.value)
    assert "wandb" not in str(error.value).replace("WANDB_API_KEY", "")


SOURCES = [{"manifest": "new.jsonl", "weight": 0.9}, {"manifest": "old.jsonl", "weight": 0.1, "name": "replay"}]


def load_mixture(sources, **others):
    values = {"run.output_dir": "out", "model.base": "base", "run.max_steps": 10, "data.train": sources}
    return load_config(None, {**values, **others})


def test_a_mixture_replaces_the_manifest(tmp_path):
    config = load_mixture(SOURCES, **{"data.val": [{"manifest": "val.json"}]})
    assert [source.title for source in config.data.train_sources] == ["new", "replay"]
    assert [str(path) for path in config.data.manifests] == ["new.jsonl", "old.jsonl", "val.json"]
    write_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml", {})
    assert again == load_config(None, flat(resolved(config)))
    assert again.data.train[1].manifest.is_absolute()
    assert again.data.train[1].weight == 0.1


def flat(values):
    return {f"{section}.{key}": value for section, part in values.items() for key, value in part.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.train": [*SOURCES, {"manifest": "c.json"}]},
            "data.train: some sources have a weight and some have none",
        ),
        ({"data.train": [SOURCES[0]] * 2}, "data.train: two sources are named new: give each a name of its own"),
        ({"data.train": [{"manifest": "a", "weight": 0}]}, r"data.train.0.weight: .*greater than 0 \(found 0\)"),
        ({"data.train": [{"manifest": "a", "wieght": 1}]}, r"data.train.0.wieght: unknown key$"),
        (
            {"data.val_manifest": ["a.json", "b.json"]},
            "data.val_manifest: it is one manifest: expected several as a list of sources in data.val",
        ),
        ({"data.train": []}, "data: nothing to train on: expected train_manifest, or several sources in train"),
        ({"data.train_manifest": "a"}, "data: train_manifest and train are both set: expected one of them"),
        ({"run.max_steps": None}, "data: no source of data.train has epochs, so the run has no end: expected run.max"),
        ({"data.val": [{"manifest": "a", "weight": 0}]}, "data.val: no source has a weight above 0"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message) as error:
        load_mixture(**{"sources": SOURCES, **changes})
    assert len(str(error.value)) < 600
