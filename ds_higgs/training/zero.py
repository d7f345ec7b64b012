"""The DeepSpeed JSON that a configuration means."""

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from ds_higgs.config import Config, ZeroConfig
from ds_higgs.errors import UserError
from ds_higgs.job.logs import logger
from ds_higgs.training.optimizers import optimizer_keys

# Keys of the JSON that the configuration decides: `zero.extra` may not say otherwise behind its back.
OWNED_KEYS = {
    "train_batch_size": "data.batch_size and optim.gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "data.batch_size",
    "gradient_accumulation_steps": "optim.gradient_accumulation_steps",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule and optim.warmup_steps",
    "bf16": "zero.precision",
    "fp16": "zero.precision (bf16 or fp32; fp16 would need loss scaling)",
    "torch_autocast": "zero.precision",
    "data_types": "zero.fp32_reduction",
    "communication_data_type": "zero.fp32_reduction",
    "zero_allow_untested_optimizer": "optim.type",
}

MONITOR_KEYS = frozenset({"comet", "csv_monitor", "tensorboard", "wandb"})

# DeepSpeed (0.19.8) ignores an unknown top-level key in silence; these are the others that may be set, and their types.
EXTRA_KEYS: Mapping[str, tuple[type, ...]] = {
    "aio": (dict,),
    "comet": (dict,),
    "comms_logger": (dict,),
    "compile": (dict,),
    "csv_monitor": (dict,),
    "disable_allgather": (bool,),
    "dump_state": (bool,),
    "flops_profiler": (dict,),
    "gradient_predivide_factor": (int, float),
    "keep_in_fp32_modules": (list,),
    "memory_breakdown": (bool,),
    "prescale_gradients": (bool,),
    "seq_parallel_communication_data_type": (str,),
    "steps_per_print": (int, type(None)),
    "tensorboard": (dict,),
    "timers": (dict,),
    "wall_clock_breakdown": (bool,),
    "wandb": (dict,),
    "zero_force_ds_cpu_optimizer": (bool,),
    "zero_optimization": (dict,),
}
_TYPE_NAMES = {
    dict: "a mapping",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    str: "a text",
    type(None): "null",
}


def build_deepspeed_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed JSON of `config`: exactly what `deepspeed.initialize` is given.

    The learning-rate schedule is not in it: DeepSpeed's own ones start at 0 or are logarithmic, so the trainer passes
    its own scheduler. Micro-batches of one optimizer step are accumulated by the training step, which reduces once.

    Raises:
        UserError: where `zero.extra` sets a key that the configuration decides, or what DeepSpeed would refuse.
    """
    _check_extra(config.zero.extra)
    zero = config.zero
    built = {
        "train_micro_batch_size_per_gpu": 1 if config.data.max_tokens else config.data.batch_size,
        "gradient_accumulation_steps": config.optim.gradient_accumulation_steps,
        "gradient_clipping": config.optim.max_grad_norm,
        "steps_per_print": None,
        **optimizer_keys(config.optim),
        **_precision(zero),
        "zero_optimization": _zero_optimization(zero, muon=config.optim.type == "muon"),
        **_monitors(config),
    }
    if not zero.extra:
        return built
    built = merged(built, zero.extra)
    _check_as_deepspeed_does(built)
    return built


def splits_from_the_start(deepspeed_config: Mapping[str, Any]) -> bool:
    """Whether the base's weights are split over the ranks as they are read, so that no rank ever holds all of them."""
    zero = deepspeed_config["zero_optimization"]
    if zero["stage"] < 3:
        return False
    if zero.get("zero_quantized_nontrainable_weights"):
        # They are packed as they are split, which is before it is known what is frozen.
        logger.info("zero.extra has zero_quantized_nontrainable_weights: every GPU holds the whole base at the start")
        return False
    return True


def merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`base` with `extra` laid over it, sections merged key by key."""
    result = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def _precision(zero: ZeroConfig) -> dict[str, Any]:
    if zero.precision == "fp32":
        return {"bf16": {"enabled": False}}
    section: dict[str, Any] = {"bf16": {"enabled": True}}
    if zero.fp32_reduction:
        section["communication_data_type"] = "fp32"
        if zero.stage_number >= 2:
            # At stage 1 this would choose DeepSpeed's BF16_Optimizer, which cannot reduce once per step.
            section["data_types"] = {"grad_accum_dtype": "fp32"}
    return section


def _zero_optimization(zero: ZeroConfig, *, muon: bool) -> dict[str, Any]:
    section: dict[str, Any] = {
        "stage": zero.stage_number,
        "overlap_comm": zero.overlap_comm,
        "contiguous_gradients": True,
        "reduce_scatter": not (muon and zero.stage_number == 3),  # DeepSpeed refuses the two together
        "reduce_bucket_size": zero.reduce_bucket_size,
        "allgather_bucket_size": zero.allgather_bucket_size,
    }
    if zero.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return section


def _monitors(config: Config) -> dict[str, Any]:
    monitors: dict[str, Any] = {}
    output_dir = str(config.run.output_dir)
    if config.logging.tensorboard:
        monitors["tensorboard"] = {"enabled": True, "output_path": output_dir, "job_name": "tensorboard"}
    if config.logging.csv:
        monitors["csv_monitor"] = {"enabled": True, "output_path": output_dir, "job_name": "csv"}
    if config.logging.wandb is not None:
        monitors["wandb"] = {"enabled": True, "project": config.logging.wandb}
    if config.logging.comet is not None:
        monitors["comet"] = {"enabled": True, "project": config.logging.comet}
    return monitors


def _check_extra(extra: dict[str, Any]) -> None:
    problems = [f"zero.extra.{key}: set {OWNED_KEYS[key]} instead" for key in extra if key in OWNED_KEYS]
    problems += [_unknown_key(key) for key in extra if key not in OWNED_KEYS and key not in EXTRA_KEYS]
    problems += [_wrong_type(key, value) for key, value in extra.items() if not _has_its_type(key, value)]
    zero_section = extra.get("zero_optimization")
    problems += [
        f"zero.extra.zero_optimization.{key}: set zero.{key} instead"
        for key in (zero_section if isinstance(zero_section, dict) else ())
        if key in ZeroConfig.model_fields
    ]
    if problems:
        raise UserError.from_problems("zero.extra sets what it cannot", problems)


def _has_its_type(key: str, value: Any) -> bool:
    types = EXTRA_KEYS.get(key, (object,))
    return isinstance(value, types) and (not isinstance(value, bool) or bool in types or object in types)


def _wrong_type(key: str, value: Any) -> str:
    return f"zero.extra.{key}: found {value!r}, expected {' or '.join(_TYPE_NAMES[one] for one in EXTRA_KEYS[key])}"


def _check_as_deepspeed_does(built: dict[str, Any]) -> None:
    """Let DeepSpeed read the JSON now rather than once the model is loaded."""
    from deepspeed.runtime.config import DeepSpeedConfig  # takes seconds, and few configurations need it

    try:
        DeepSpeedConfig(copy.deepcopy(built))
    except Exception as error:  # it raises whatever its parts do: assertions, pydantic's errors, TypeError, ...
        raise UserError(f"zero.extra: DeepSpeed refuses it: {' '.join(str(error).split())}") from error


def _unknown_key(key: str) -> str:
    near = difflib.get_close_matches(key, sorted({*EXTRA_KEYS, *OWNED_KEYS}), n=1)
    return f"zero.extra.{key}: no DeepSpeed key that can be set here" + (f"; did you mean {near[0]}?" if near else "")
