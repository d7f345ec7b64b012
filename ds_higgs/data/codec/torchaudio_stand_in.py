"""The one function of torchaudio that boson's audio tokenizer calls, for machines on which torchaudio cannot be had.

torchaudio's wheels need CUDA libraries, so beside a CPU build of torch they cannot be imported. Boson's tokenizer uses
`torchaudio.functional.resample` alone (24 kHz to HuBERT's 16 kHz). Where `import torchaudio` works, that one is used.
Its own kernel is computed here, because codes must not depend on the machine: `julius.resample_frac` normalises it,
pads otherwise and returns a sample less at some lengths (up to 3.5e-4 of full scale off on speech).
"""

import importlib.machinery
import math
import sys
from types import ModuleType

import torch
import torch.nn.functional as F

ZERO_CROSSINGS = 6  # torchaudio's defaults: lowpass_filter_width and rolloff
ROLLOFF = 0.99


def provide_torchaudio() -> None:
    """Make `import torchaudio` work: the real one, else a module with `functional.resample` alone."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):  # OSError: it is installed and its libraries cannot be loaded
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            del sys.modules[name]
        package, functional = _new_module("torchaudio"), _new_module("torchaudio.functional")
        functional.resample = resample  # type: ignore[attr-defined]
        package.functional = functional  # type: ignore[attr-defined]
        sys.modules |= {"torchaudio": package, "torchaudio.functional": functional}


def resample(waveform: torch.Tensor, orig_freq: int, new_freq: int) -> torch.Tensor:
    """Windowed-sinc resampling of [..., samples], equal to torchaudio.functional.resample with its defaults."""
    divisor = math.gcd(int(orig_freq), int(new_freq))
    old, new = int(orig_freq) // divisor, int(new_freq) // divisor
    if old == new:
        return waveform
    kernels, width = _sinc_kernels(old, new)
    length = waveform.shape[-1]
    flat = F.pad(waveform.reshape(-1, 1, length), (width, width + old))
    # One kernel per output phase; a stride of `old` input samples gives `new` output samples.
    phases = F.conv1d(flat, kernels.to(waveform), stride=old)
    resampled = phases.transpose(1, 2).reshape(flat.shape[0], -1)[:, : math.ceil(new * length / old)]
    return resampled.reshape(*waveform.shape[:-1], -1)


def _sinc_kernels(old: int, new: int) -> tuple[torch.Tensor, int]:
    """[new, 1, old + 2 * width] Hann-windowed sinc kernels, and the width on either side."""
    cutoff = min(old, new) * ROLLOFF
    width = math.ceil(ZERO_CROSSINGS * old / cutoff)
    taps = torch.arange(-width, width + old, dtype=torch.float64)[None, None] / old
    phases = torch.arange(0, -new, -1, dtype=torch.float64)[:, None, None] / new
    time = ((phases + taps) * cutoff).clamp(-ZERO_CROSSINGS, ZERO_CROSSINGS)
    window = torch.cos(time * math.pi / ZERO_CROSSINGS / 2) ** 2
    return torch.sinc(time) * window * (cutoff / old), width


def _new_module(name: str) -> ModuleType:
    module = ModuleType(name, __doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)  # transformers asks for it
    return module
