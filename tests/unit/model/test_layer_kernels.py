"""Norm, SwiGLU and rotary embedding in torch, against the model's own operations: in fp64, forward and backward."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from ds_higgs.model import layer_kernels
from ds_higgs.model.layer_kernels import build_layer_kernels, torch_kernels

HEADS, HEAD_DIM = (4, 2), 6
KINDS = ["plain", "torch", "compiled"]


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often torch.compile made a graph of each function; its kernels are torch's own, without a C++ compiler."""
    counts: Counter = Counter()
    compile_graph = torch.compile

    def compiled(function, *, dynamic: bool, fullgraph: bool):
        assert (dynamic, fullgraph) == (True, True)

        def backend(graph, inputs):
            counts[function.__name__] += 1
            return graph.forward

        return compile_graph(function, dynamic=dynamic, fullgraph=fullgraph, backend=backend)

    monkeypatch.setattr(torch, "compile", compiled)
    torch._dynamo.reset()
    return counts


@pytest.fixture(params=KINDS)
def kernels(request, compilations):
    if request.param == "compiled":
        return torch_kernels(compiled=True)
    return build_layer_kernels(request.param, compiled=False)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


def assert_same(function, reference, inputs: list[torch.Tensor]) -> None:
    """Equal outputs, and equal gradients by `inputs` of a loss over them."""
    both = []
    for call in (function, reference):
        outputs = call(*inputs)
        loss = sum(((index + 1) * output).sin().sum() for index, output in enumerate(outputs))
        both.append([*outputs, *torch.autograd.grad(loss, inputs)])
    for found, expected in zip(*both, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [9, 1, 0])
def test_swiglu(kernels, rows: int):
    inputs = [random(rows, 5, seed=1), random(rows, 5, seed=2)]
    assert_same(lambda gate, up: [kernels.swiglu(gate, up)], lambda gate, up: [F.silu(gate) * up], inputs)


def angles(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines whose halves differ, so that a half taken for the other is noticed."""
    return random(rows, HEAD_DIM, seed=3).detach(), random(rows, HEAD_DIM, seed=4).detach()


@pytest.mark.parametrize("rows", [9, 1, 0])
def test_rotary_embedding(kernels, rows: int):
    cos, sin = angles(rows)
    assert_same(
        lambda query, key: kernels.rotate(query, key, cos, sin),
        lambda query, key: apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=1),
        [random(rows, heads, HEAD_DIM, seed=heads) for heads in HEADS],
    )


@pytest.mark.parametrize("rows", [9, 0])
def test_norm(kernels, rows: int):
    norm = LlamaRMSNorm(8, eps=1e-5).double()
    norm.weight = torch.nn.Parameter(random(8, seed=6).detach(), requires_grad=False)

    def reference(hidden):
        return [norm.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-5)]

    hidden = random(rows, 8)
    (found,), (expected,) = [kernels.norm(norm, hidden)], reference(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # the model's own norm is in fp32
    grads = [torch.autograd.grad(output.sin().sum(), hidden)[0] for output in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_the_comparison_notices_a_wrong_transpose(monkeypatch):
    monkeypatch.setattr(layer_kernels, "_rotate_back", layer_kernels._rotate)
    with pytest.raises(AssertionError):
        test_rotary_embedding(torch_kernels(), 9)


def test_the_comparison_notices_a_wrong_gradient(monkeypatch):
    monkeypatch.setattr(layer_kernels, "_swiglu_backward", lambda grad, gate, up: (grad * up, grad * gate))
    with pytest.raises(AssertionError):
        test_swiglu(torch_kernels(), 9)


def test_one_compilation_serves_every_number_of_rows(compilations):
    kernels = torch_kernels(compiled=True)
    for rows in (9, 40, 17, 300):
        test_swiglu(kernels, rows)
        test_rotary_embedding(kernels, rows)
    assert compilations["_swiglu"] == compilations["_swiglu_backward"] == 1
    assert compilations["_rotate"] <= 2  # queries and keys differ in heads
