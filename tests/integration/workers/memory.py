"""What every rank of test_memory runs: two steps with DeepSpeed, their bytes counted and compared with the estimate.

torchrun --nproc_per_node 2 tests/integration/workers/memory.py BASE MODE STAGE
"""

import sys
from pathlib import Path

from ds_higgs.config import Config
from ds_higgs.job import distributed
from ds_higgs.job.process_exit import run_and_exit
from ds_higgs.losses import LossWeights
from ds_higgs.model.loading import load_tokenizer, read_model_config
from ds_higgs.sizing.inputs import BatchShape
from ds_higgs.sizing.memory import total_bytes
from ds_higgs.training.engine import build_engine, build_trained_model
from ds_higgs.training.memory_plan import build_estimator, choose_memory_settings
from ds_higgs.training.train_step import train_step
from ds_higgs.training.zero import build_deepspeed_config
from tests.support.batches import Sample, make_batch
from tests.support.tensor_bytes import TensorBytes

SAMPLE = Sample("hello", (8,), (12,))
BUCKET = 100_000  # a small part of the weights, as at the released shapes


def main() -> None:
    base, mode, stage = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    config = Config.model_validate(
        {
            "run": {"output_dir": "unused"},
            "model": {"base": str(base)},
            "train": {"mode": mode},
            "data": {"train_manifest": "unused", "batch_size": 1},
            "zero": {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
            "memory": {"activation_checkpointing": "full"},
            "logging": {"tensorboard": False},
        }
    )
    ranks = distributed.init_process_group()
    settings = choose_memory_settings(config, device_type="cpu")
    batch = make_batch([SAMPLE], load_tokenizer(base), read_model_config(base))
    weights = LossWeights.build(text=1.0, audio=1.0, codebooks=None, num_codebooks=8)
    with TensorBytes() as counted:
        model = build_trained_model(config, base, settings)
        deepspeed_config = build_deepspeed_config(config)
        engine = build_engine(config, model, deepspeed_config=deepspeed_config, total_steps=2, ranks=ranks)
        counted.peak = 0  # of the start: what loading takes is gone
        for _ in range(2):
            train_step(engine, [batch], weights)
    estimator = build_estimator(config, world_size=ranks.world_size, cuda=False)
    shape = BatchShape.typical(1, batch.num_tokens)
    estimated = total_bytes(estimator.terms(shape, checkpoint_every=1))
    # Ranks differ in what they reduce; the estimate is the fullest one's.
    peak = max(int(one) for one in distributed.gather_bytes(str(counted.peak).encode()))
    print(f"{mode}, ZeRO-{stage}: counted {peak:,}, estimated {estimated:,}, {estimated / peak:.3f}")
    assert abs(estimated / peak - 1) < 0.05
    distributed.destroy_process_group()


if __name__ == "__main__":
    run_and_exit(main)
