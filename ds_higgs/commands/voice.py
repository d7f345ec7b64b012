"""A model that can speak: base checkpoint, adapter, tokenizer and codec, loaded for inference."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ds_higgs.adapters.applying import put_on
from ds_higgs.adapters.opening import Adapter
from ds_higgs.data.audio import Segment, decode
from ds_higgs.data.build import OnBadSample, build_dataset
from ds_higgs.data.codec.source import AudioCodec
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.rules import SampleRules
from ds_higgs.errors import UserError
from ds_higgs.job.devices import uses_cuda
from ds_higgs.job.logs import phase
from ds_higgs.model.loading import HiggsAudioModel, load_model


@dataclass(frozen=True)
class Voice:
    """Everything that speaking takes, and how manifests were read in its training.

    model: in evaluation mode, with the adapter's layers in place.
    """

    model: HiggsAudioModel
    rules: SampleRules
    codec: AudioCodec
    collator: BatchCollator
    on_bad_sample: OnBadSample
    cache_dir: Path

    @classmethod
    def load(
        cls,
        base: Path,
        adapter: Adapter | None,
        *,
        rules: SampleRules,
        on_bad_sample: OnBadSample,
        cache_dir: Path,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        lora_scale: float = 1.0,
    ) -> "Voice":
        """Load a base checkpoint with an adapter on it (None: without).

        Args:
            rules: for manifests that will be read; they name the codec too.
            cache_dir: of codes.
            device, dtype: None: the GPU in bf16 where there is one, else the CPU in fp32.
            lora_scale: how much of the adapter; see `put_on`.

        Raises:
            UserError: for what is missing or does not fit.
        """
        device = device or ("cuda" if uses_cuda() else "cpu")
        dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        with phase("loading the model"):
            model = load_model(base, dtype=dtype)
            if adapter is not None:
                model = put_on(model, adapter, scale=lora_scale)
            model = model.eval().to(device)
        with phase("loading the audio codec"):
            codec = rules.codec.load(device)
        return cls(
            model=model,
            rules=rules,
            codec=codec,
            collator=BatchCollator(rules.layout),
            on_bad_sample=on_bad_sample,
            cache_dir=cache_dir,
        )

    def encode(self, file: Path) -> torch.Tensor:
        """The codes of an audio file: [codebooks, frames].

        Raises:
            UserError: if the file cannot be used.
        """
        try:
            waveform = decode(file, Segment(), sampling_rate=self.codec.sampling_rate)
        except (BadSampleError, OSError) as error:
            raise UserError(f"{file}: {error}") from error
        return self.codec.encode([waveform])[0]

    def read_manifest(self, manifest: Path, *, needs_audio: bool = True) -> HiggsDataset:
        """The samples of a manifest, their audio encoded where the code cache lacks it.

        Args:
            needs_audio: whether a manifest of text alone is refused.
        """
        return build_dataset(
            manifest,
            rules=self.rules,
            cache_dir=self.cache_dir,
            on_bad_sample=self.on_bad_sample,
            device=str(self.model.device),
            needs_audio=needs_audio,
        )
