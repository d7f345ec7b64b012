"""Peak memory of exporting whole weights: a random model, from what a run hands out and from a ZeRO-3 checkpoint.

python benchmarks/export.py            # 4 GB in bf16; needs 25 GB of disk in the folder of temporary files
python benchmarks/export.py --layers 1 # quick
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from math import ceil, prod
from pathlib import Path

import torch
from measure import GIB, describe_run, peak_memory_gib, print_table, reset_peak_memory, write_json

from ds_higgs.adapters.whole import WholeInfo, write_whole
from ds_higgs.checkpoint.marker import MARKER_NAME, FileRecord, Marker, encode_marker
from ds_higgs.checkpoint.saving import STATE_NAME
from ds_higgs.config import Config
from ds_higgs.config.file import resolved
from ds_higgs.files import hash_file
from ds_higgs.model.loading import HiggsAudioConfig, build_meta_model, released_model_config
from ds_higgs.model.trained import TrainMode, make_trainable, trained_shapes
from ds_higgs.model.weight_files import Shapes, write_weights

RANKS = 2
BLOCK = torch.randn(1 << 24)  # repeated: what is written does not matter here, and numbers take long to draw


def model_config(num_layers: int) -> HiggsAudioConfig:
    """The released model's vocabularies, two thirds of its width: the largest tensor is the token embedding."""
    config = released_model_config()
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 2048, 5504, num_layers
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 16, 4, 128
    config.audio_ffn_hidden_size, config.audio_ffn_intermediate_size = 2048, 5504
    config.audio_dual_ffn_layers = list(range(num_layers))
    return config


def random_tensors(shapes: Shapes) -> Iterator[tuple[str, torch.Tensor]]:
    for name, shape in shapes.items():
        yield name, random_flat(prod(shape)).view(tuple(shape))


def random_flat(size: int) -> torch.Tensor:
    return BLOCK.repeat(ceil(size / len(BLOCK)))[:size]


def write_base(folder: Path, config: HiggsAudioConfig) -> Shapes:
    """A base checkpoint without tokenizer, which an export in the original format does not read."""
    shapes = {name: tuple(weight.shape) for name, weight in build_meta_model(config).state_dict().items()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    write_weights(folder, random_tensors(shapes), shapes=shapes, dtype=torch.bfloat16)
    return shapes


def shapes_trained_by(config: HiggsAudioConfig, mode: TrainMode) -> Shapes:
    return trained_shapes(make_trainable(build_meta_model(config), mode=mode, only=None, lora={}))


def write_handed_out(folder: Path, base: Path, config: HiggsAudioConfig) -> None:
    """Every weight, as a run of mode full hands it out."""
    folder.mkdir()
    shapes = shapes_trained_by(config, "full")
    info = WholeInfo(mode="full", base=str(base), revision=None)
    write_whole(folder, info, random_tensors(shapes), shapes=shapes, dtype=torch.bfloat16)


def write_checkpoint(folder: Path, base: Path, config: HiggsAudioConfig) -> None:
    """The parts of a ZeRO-3 checkpoint of mode audio_path that an export reads: fp32 masters in equal shares."""
    folder.mkdir(parents=True)
    shapes = {f"peft_model.{name}": shape for name, shape in shapes_trained_by(config, "audio_path").items()}
    share = sum(ceil(prod(shape) / RANKS) for shape in shapes.values())
    for rank in range(RANKS):
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        state = {"optimizer_state_dict": {"fp32_flat_groups": [random_flat(share)]}}
        torch.save(state, folder / f"{name}_optim_states.pt")
        torch.save({"param_shapes": [dict(shapes)]}, folder / f"{name}_model_states.pt")
    write_state(folder, base)
    files = {path.name: FileRecord(path.stat().st_size, hash_file(path)) for path in folder.iterdir()}
    trained = [(name, list(shape)) for name, shape in shapes.items()]
    marker = Marker(1, RANKS, 3, "bf16", trained, fixed={}, validation_loss=None, versions={}, files=files)
    (folder / MARKER_NAME).write_bytes(encode_marker(marker))


def write_state(folder: Path, base: Path) -> None:
    run = {"output_dir": "unused"}
    values = {"run": run, "model": {"base": str(base)}, "data": {"train_manifest": "unused"}}
    config = Config.model_validate({**values, "train": {"mode": "audio_path"}})
    position = {"step": 1, "samples_seen": 1, "audio_targets_seen": 1}
    (folder / STATE_NAME).write_text(json.dumps({"position": position, "config": resolved(config)}))


def measure_export(source: Path, out: Path) -> Mapping[str, float]:
    """Peak of resident memory above that of the interpreter with everything imported, and seconds."""
    from ds_higgs.commands.export import export

    device = torch.device("cpu")
    reset_peak_memory(device)
    before, start = peak_memory_gib(device), time.perf_counter()
    export(source, out, merge=True)
    return {
        "above_interpreter_gib": peak_memory_gib(device) - before,
        "interpreter_gib": before,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=19)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "export.json")
    parser.add_argument("--child", type=Path, nargs=2, metavar=("SOURCE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure_export(*arguments.child)))
        return
    config = model_config(arguments.layers)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes = write_base(folder / "base", config)
        size = 2 * sum(prod(shape) for shape in shapes.values())
        for kind, write in (("run, mode full", write_handed_out), ("ZeRO-3 checkpoint, audio_path", write_checkpoint)):
            source, out = folder / "checkpoints" / kind, folder / "out"
            source.parent.mkdir(exist_ok=True)
            write(source, folder / "base", config)
            command = [sys.executable, __file__, "--child", str(source), str(out)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"from": kind, "model_gib": size / GIB, **json.loads(done.stdout.splitlines()[-1])})
            subprocess.run(["rm", "-rf", str(source), str(out)], check=True)
    print_table(rows)
    write_json(arguments.output, {"run": describe_run(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
