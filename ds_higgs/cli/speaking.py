"""Flags of the commands that speak: where the model's parts are, and how codes are drawn."""

import argparse
from typing import TYPE_CHECKING

from ds_higgs.cli.arguments import count, count_or_zero, device, positive_or_zero, seconds, seed, share
from ds_higgs.errors import UserError

if TYPE_CHECKING:
    from ds_higgs.commands.generate import SpeechOptions


def add_place_flags(parser: argparse.ArgumentParser) -> None:
    """Revision, codec, device and precision of the model."""
    parser.add_argument("--revision", help="of a hub repository")
    parser.add_argument("--codec", help="audio codec, folder or hub id (the base checkpoint's own)")
    parser.add_argument("--device", type=device, help="such as cuda:1 or cpu (the GPU, where there is one)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="of the model (bf16 on a GPU, else fp32)")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Seed, sampling and length of the speech."""
    parser.add_argument("--seed", type=seed, default=0, help="the same seed gives the same speech (0)")
    parser.add_argument(
        "--sampler", choices=("boson", "vllm-omni"), default="boson", help="the rules of drawing codes (boson's)"
    )
    parser.add_argument(
        "--temperature", type=positive_or_zero, default=0.7, help="0 takes the likeliest code, always (0.7)"
    )
    parser.add_argument("--top-k", type=count, help="draw from so many likeliest codes (no limit)")
    parser.add_argument("--top-p", type=share, default=0.95, help="draw from the likeliest codes of this share (0.95)")
    parser.add_argument(
        "--ras-window", type=count_or_zero, default=7, help="frames of repetition-aware sampling; 0 switches it off (7)"
    )
    parser.add_argument("--ras-max-repeats", type=count, default=2, help="repeats allowed in that window (2)")
    parser.add_argument("--max-seconds", type=seconds, default=30.0, help="longest speech (30)")


def speech_options(arguments: argparse.Namespace) -> "SpeechOptions":
    """What the flags of `add_sampling_flags` say.

    Raises:
        UserError: a server's rules, and others beside them.
    """
    from ds_higgs.commands.generate import SpeechOptions
    from ds_higgs.model.generation import VLLM_OMNI, Sampling

    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        ras_window=arguments.ras_window or None,
        ras_max_repeats=arguments.ras_max_repeats,
    )
    if arguments.sampler == "vllm-omni":
        if sampling != Sampling():
            raise UserError("--sampler vllm-omni: it has a temperature and limits of its own; expected it without such")
        sampling = VLLM_OMNI
    return SpeechOptions(sampling, seed=arguments.seed, max_seconds=arguments.max_seconds)
