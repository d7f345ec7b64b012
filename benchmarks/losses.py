"""The fused codebook cross-entropy against a loop over 8 codebooks, and the supervised text head against full logits.

python benchmarks/losses.py [--device cuda] [--frames 1500]
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import describe_run, memory_gib, peak_memory_gib, print_table, reset_peak_memory, time_calls, write_json

from ds_higgs.batch import IGNORE_INDEX
from ds_higgs.losses import audio_loss_sums, text_loss_sum

CODEBOOKS, CODES = 8, 1026


def codebook_cases(frames: int, device: torch.device) -> dict:
    """Loss functions of [frames, 8 x 1026] fp32 logits; every one shifts and takes the mean over the codebooks."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(frames, CODEBOOKS * CODES, generator=generator, device=device).requires_grad_()
    labels = torch.randint(0, CODES, (CODEBOOKS, frames), generator=generator, device=device)
    labels[:, : frames // 10] = IGNORE_INDEX
    shifted = labels[:, 1:]
    counts = (shifted != IGNORE_INDEX).sum(dim=1)

    def loop() -> torch.Tensor:
        per_codebook = logits.view(frames, CODEBOOKS, CODES)
        losses = [
            F.cross_entropy(per_codebook[:-1, index], labels[index, 1:], ignore_index=IGNORE_INDEX)
            for index in range(CODEBOOKS)
        ]
        return sum(losses) / CODEBOOKS

    def fused() -> torch.Tensor:
        return (audio_loss_sums(logits[:-1], shifted) / counts).mean()

    return {"loop over 8 codebooks": (loop, [logits]), "fused codebooks": (fused, [logits])}


def text_cases(positions: int, supervised: int, hidden: int, vocab: int, device: torch.device) -> dict:
    """Loss functions of [positions, hidden] hidden states of which `supervised` predict a text target."""
    generator = torch.Generator(device).manual_seed(0)
    states = torch.randn(positions, hidden, generator=generator, device=device).requires_grad_()
    head = torch.nn.Linear(hidden, vocab, bias=False, device=device).requires_grad_(False)
    head.weight.normal_(std=hidden**-0.5, generator=generator)
    rows = torch.arange(positions - supervised, positions, device=device)
    labels = torch.full((positions,), IGNORE_INDEX, device=device)
    labels[rows] = torch.randint(0, vocab, (supervised,), generator=generator, device=device)

    def full() -> torch.Tensor:
        return F.cross_entropy(head(states).float(), labels, ignore_index=IGNORE_INDEX)

    def supervised_only() -> torch.Tensor:
        return text_loss_sum(states.index_select(0, rows), labels[rows], head) / supervised

    return {"full text logits": (full, [states]), "supervised text head": (supervised_only, [states])}


def measure(cases: dict, *, calls: int, device: torch.device) -> list[dict]:
    """A row for each case: time and memory of forward and backward, ratios to the first case, errors against it."""
    rows, reference = [], None
    for name, (loss_function, leaves) in cases.items():

        def forward_backward(loss_function=loss_function, leaves=leaves):
            for leaf in leaves:
                leaf.grad = None
            loss = loss_function()
            loss.backward()
            return loss.detach()

        timing = time_calls(forward_backward, calls=calls, warmup=1, device=device)
        for leaf in leaves:
            leaf.grad = None
        reset_peak_memory(device)
        before = memory_gib(device)
        loss = forward_backward()
        row = {"case": name, **timing, "step_memory_gib": peak_memory_gib(device) - before}
        grads = torch.cat([leaf.grad.flatten() for leaf in leaves])
        reference = reference or (row, loss, grads)
        row["time_ratio"] = row["p50_s"] / reference[0]["p50_s"]
        row["loss_error"] = float((loss - reference[1]).abs() / reference[1])
        row["grad_error"] = float((grads - reference[2]).norm() / reference[2].norm())
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, default=1500)
    parser.add_argument("--positions", type=int, default=1840, help="of the text head's sequence")
    parser.add_argument("--supervised", type=int, default=90, help="of them with a text label")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/losses.json"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    codebooks = measure(codebook_cases(arguments.frames, device), calls=arguments.calls, device=device)
    text = measure(
        text_cases(arguments.positions, arguments.supervised, arguments.hidden, arguments.vocab, device),
        calls=arguments.calls,
        device=device,
    )
    print_table(codebooks)
    print_table(text)
    write_json(arguments.output, {"run": describe_run(device), "codebooks": codebooks, "text": text})


if __name__ == "__main__":
    main()
