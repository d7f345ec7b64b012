"""Learn the small base's codec from speech: principal components of log-mel frames, then residual codebooks.

python examples/small_base/learn_codec.py --speech outputs/small_base/speech --out outputs/small_base/codec
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import save_file
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA

from ds_higgs.data.codec.source import pad_to_hop
from ds_higgs.data.codec.spectral import MODEL_TYPE, WEIGHTS, SpectralFrames

FRAMES = SpectralFrames(
    sampling_rate=24_000, n_fft=1024, hop_length=240, num_mels=128, spectra=4, floor=3e-3, griffin_lim_iterations=60
)
NUM_CODEBOOKS = 8


def read_vectors(files: list[Path]) -> np.ndarray:
    """[frames, spectra * mels] of all files."""
    vectors = []
    for file in files:
        waveform = pad_to_hop(soundfile.read(file, dtype="float32")[0], FRAMES.hop_length * FRAMES.spectra)
        vectors.append(FRAMES.analyse(torch.from_numpy(waveform)[None])[0].numpy())
    return np.concatenate(vectors)


def learn_codebooks(points: np.ndarray, *, size: int, seed: int) -> np.ndarray:
    """[NUM_CODEBOOKS, size, dimensions]: each learned from what those before it leave of `points`."""
    residual, codebooks = points.copy(), []
    for index in range(NUM_CODEBOOKS):
        means = MiniBatchKMeans(size, batch_size=8192, n_init=1, max_iter=20, random_state=seed + index).fit(residual)
        codebooks.append(means.cluster_centers_.astype(np.float32))
        residual -= codebooks[-1][means.predict(residual)]
        print(f"codebook {index}: {(residual**2).sum() / (points**2).sum():.4f} of the variance is left", flush=True)
    return np.stack(codebooks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech", type=Path, required=True, help="folder that make_speech.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the codec")
    parser.add_argument("--train-files", type=int, default=3_000, help="of the training speech (default: 3000)")
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--codebook-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    files = sorted((options.speech / "train").glob("*.flac"))[: options.train_files]
    vectors = read_vectors(files + sorted((options.speech / "codec").glob("*.flac")))
    pca = PCA(options.components, random_state=options.seed).fit(vectors)
    print(f"{len(vectors)} frames; the components hold {pca.explained_variance_ratio_.sum():.4f} of the variance")
    codebooks = learn_codebooks(pca.transform(vectors), size=options.codebook_size, seed=options.seed)
    options.out.mkdir(parents=True)
    geometry = {"num_codebooks": NUM_CODEBOOKS, "codebook_size": options.codebook_size}
    config = {"model_type": MODEL_TYPE, **asdict(FRAMES), **geometry}
    (options.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    learned = {"mean": pca.mean_, "components": pca.components_, "codebooks": codebooks}
    save_file(
        {name: torch.tensor(value).bfloat16().contiguous() for name, value in learned.items()}, options.out / WEIGHTS
    )


if __name__ == "__main__":
    main()
