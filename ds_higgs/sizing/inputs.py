"""What an estimate of memory depends on: sizes of the model and of a micro-batch, and the settings of a run."""

from dataclasses import dataclass

from ds_higgs.model.parts import TARGETS

FP32 = 4  # bytes


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a HiggsAudioModel that memory depends on."""

    hidden: int
    intermediate: int
    num_layers: int
    query_width: int
    key_width: int
    num_heads: int
    text_vocab: int
    audio_vocab: int  # codebooks x codes, specials included

    @property
    def head_dim(self) -> int:
        return self.query_width // self.num_heads


@dataclass(frozen=True)
class BatchShape:
    """A micro-batch: samples, positions that hold a token or frame, those of its longest sample, frames, loss rows."""

    num_samples: int
    positions: int
    longest: int
    frames: int
    text_rows: int
    audio_rows: int

    @classmethod
    def typical(cls, num_samples: int, positions_per_sample: int) -> "BatchShape":
        """Voice cloning: three quarters are frames; a tenth of the positions predicts text, 45 in 100 predict audio."""
        positions = num_samples * positions_per_sample
        frames, text_rows, audio_rows = (round(share * positions) for share in (0.75, 0.10, 0.45))
        return cls(num_samples, positions, positions_per_sample, frames, text_rows, audio_rows)

    @property
    def grid_cells(self) -> int:
        """Of the right-padded grid that attention works on."""
        return self.num_samples * self.longest

    @property
    def padded_positions(self) -> int:
        """Of the model's own sequence, which is padded to multiples of 8."""
        return -(-self.longest // 8) * 8 * self.num_samples


@dataclass(frozen=True)
class Policy:
    """What a step keeps and where: everything of the configuration that memory depends on."""

    element_bytes: int = 2
    zero_stage: int = 2
    world_size: int = 1
    offload_optimizer: bool = False
    overlap_comm: bool = False
    reduce_bucket_elements: int = 50_000_000
    fp32_reduction: bool = True
    gradient_accumulation_steps: int = 1
    checkpoint_every: int | None = None
    lora_paths: frozenset[str] = frozenset(TARGETS)
    whole_paths: frozenset[str] = frozenset()  # whose own weights are trained
    trained_heads: int = 0  # weights of the text and audio heads among the trained ones
    lora_rank: int = 16
    lora_dropout: float = 0.05
    kernels: str = "torch"  # or "plain", "liger"
    grouped_lora: bool = True
    fused: bool = False  # the layers of `fused_layer`, which keep no masks
    varlen: bool = False  # attention without padding
    supervised_heads: bool = True
    keeps_text: bool = False  # the divergence from the base, on what predicts text
    keeps_audio: bool = False
    quantized: str | None = None  # or "nf4", "fp8"
    optimizer: str = "adamw"  # or "adamw_8bit", "muon"
    averaged: bool = False  # an average of the trained weights is kept
    async_saves: bool = False  # what is saved is copied first
    keeps_best: bool = False  # adapters/best is written
    cuda: bool = True
