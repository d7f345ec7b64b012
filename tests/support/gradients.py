"""Compares the losses and gradients of two models in fp32."""

import torch

Training = tuple[torch.Tensor, dict[str, torch.Tensor | None]]


def assert_same_training(expected: Training, found: Training) -> None:
    """Equal losses, and equal gradients: together, and one by one, where small ones have fewer digits in fp32."""
    (expected_loss, expected_grads), (loss, grads) = expected, found
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert grads.keys() == expected_grads.keys()
    assert [name for name in grads if grads[name] is None] == [n for n in grads if expected_grads[n] is None]
    norms = {name: grad.norm() for name, grad in expected_grads.items() if grad is not None}
    errors = {name: (grads[name] - expected_grads[name]).norm() for name in norms}
    assert _norm(errors) < 1.5e-6 * _norm(norms)
    for name, error in errors.items():
        assert error < 5e-6 * norms[name].clamp(min=1e-6), f"{name}: error {error:.2g} of {norms[name]:.2g}"


def _norm(norms: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(norms.values())).norm()
