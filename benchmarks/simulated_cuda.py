"""A CUDA device that computes nothing: floats have shapes, integers have values, and what would happen is counted.

On a machine without a GPU, torch's FakeTensors on "cuda" show which operations a step would launch, where it would wait
for the device, and how much memory would be alive. Integer and boolean tensors carry their real values along on the
CPU, so that shapes that depend on data come out as in a real step. Importing this module loads the device, which has to
happen before torch is imported; a process that ran a backward pass on it can only be left by `os._exit`, because
autograd's thread for the device cannot be joined.
"""

import contextlib
import ctypes
import os
import subprocess
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def load_device() -> None:
    """Compile (once, with g++) and load a device guard for "cuda"."""
    source = Path(__file__).with_suffix(".cpp")
    torch_folder = Path(find_spec("torch").origin).parent
    library = Path(tempfile.gettempdir()) / f"simulated-cuda-{os.getuid()}-{zlib.crc32(str(torch_folder).encode())}.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include"]
        command += [f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib", "-o", str(unfinished), str(source)]
        subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
        unfinished.replace(library)
    ctypes.CDLL(str(library))


load_device()
import torch  # noqa: E402
import torch.nn.attention.varlen  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from simulated_work import H200, Account, Device, Work, bytes_moved, flash_backward_workspace, num_bytes  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402
from torch.utils.weak import WeakTensorKeyDictionary  # noqa: E402

aten = torch.ops.aten
flop_registry[aten.addmm_] = flop_registry[aten.addmm]


def declare_cuda_kernels() -> torch.library.Library:
    """Operations that have a kernel of their own on CUDA, which torch would take apart where there is none."""

    def has_shapes_alone(*args):
        raise NotImplementedError

    library = torch.library.Library("aten", "IMPL")
    for name in ("_fused_rms_norm", "_fused_rms_norm_backward", "silu_backward"):
        library.impl(name, has_shapes_alone, "CUDA")
    return library


CUDA_KERNELS = declare_cuda_kernels()  # they go when this does

# The host has to know their result, or the size of it.
WAITING = {
    aten.nonzero.default,
    aten._local_scalar_dense.default,
    aten.masked_select.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# Views and allocations that torch does not mark as views; nothing is launched for them.
WITHOUT_KERNEL = (
    *("aten.detach", "aten._unsafe_view", "aten.alias", "aten.lift_fresh", "aten.is_same_size", "aten.set_"),
    *("aten.empty", "aten.new_empty", "aten.sym_", "aten._reshape_alias", "aten.reshape", "prim.", "profiler."),
)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool)
VARLEN = torch.ops.torch_attn._varlen_attn.default
FLASH_BACKWARD = {
    aten._scaled_dot_product_flash_attention_backward.default,
    torch.ops.torch_attn._varlen_attn_backward.default,
}


class SimulatedCuda(TorchDispatchMode):
    """Runs operations on FakeTensors, keeps the values of integers, and fills `account`."""

    def __init__(self, device: Device = H200):
        super().__init__()
        self.device = device
        self.account = Account()
        self._values = WeakTensorKeyDictionary()
        self._aside = False

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device: of an integer tensor with its values, of another with its shape."""
        copied = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
        if tensor.dtype in INTEGERS:
            self._values[copied] = tensor
        return copied

    def value_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The tensor's values on the CPU; None where they are not known."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        return tensor.constant if tensor.constant is not None else self._values.get(tensor)

    @contextlib.contextmanager
    def real(self) -> Iterator[None]:
        """While open, operations are real ones, on the CPU, and are not counted."""
        with self.uncounted(), unset_fake_temporarily():
            yield

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """While open, operations have shapes alone, and are not counted."""
        before, self._aside = self._aside, True
        try:
            yield
        finally:
            self._aside = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._aside:
            return func(*args, **kwargs)
        if func in INDEXING:
            args = (args[0], [column for index in args[1] for column in self._indices_of(index)], *args[2:])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func in WAITING:
            return self._wait(func, args, kwargs, tensors)
        result = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self._keep_values(func, args, kwargs, tensors, results)
        if str(func).startswith(("aten._to_copy", "aten.copy_")) and _leaves_device(tensors, results):
            self.account.waits.append(_described(func))
        self._count(func, args, kwargs, tensors, results)
        return result

    def _indices_of(self, index: torch.Tensor | None) -> list[torch.Tensor | None]:
        """A mask as the positions where it is True, whose number the host waits for."""
        if index is None or index.dtype != torch.bool:
            return [index]
        self.account.waits.append(_described("index by a mask"))
        mask = self.value_of(index)
        assert mask is not None, "indexed by a mask without values"
        with self.real():
            columns = mask.nonzero().unbind(1)
        return [self.to_device(column) for column in columns]

    def _wait(self, func, args, kwargs, tensors):
        if any(tensor.device.type == "cuda" for tensor in tensors):
            self.account.waits.append(_described(func))
        assert all(self.value_of(tensor) is not None for tensor in tensors), f"{func}: depends on unknown values"
        result = self._really(func, args, kwargs)
        if not isinstance(result, torch.Tensor):
            return result
        copied = torch.empty(result.shape, dtype=result.dtype, device=tensors[0].device)
        self._values[copied] = result
        self._count(func, args, kwargs, tensors, [copied])
        return copied

    def _keep_values(self, func, args, kwargs, tensors, results) -> None:
        known = all(self.value_of(tensor) is not None for tensor in tensors)
        if not results or not known or not all(result.dtype in INTEGERS for result in results):
            return
        if str(func).startswith(("aten.empty", "aten.new_empty")):
            return
        values = [leaf for leaf in tree_leaves(self._really(func, args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for result, value in zip(results, values, strict=True):
            self._values[result] = value

    def _really(self, func, args, kwargs) -> Any:
        def on_cpu(leaf):
            if isinstance(leaf, torch.Tensor):
                return self.value_of(leaf)
            return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

        with self.real():
            args, kwargs = tree_map(on_cpu, (args, {k: v for k, v in kwargs.items() if k != "pin_memory"}))
            return func(*args, **kwargs)

    def _count(self, func, args, kwargs, tensors, results) -> None:
        for result in results:
            if result.device.type == "cuda":
                self.account.hold(result)
        if results and all(result.device.type == "cpu" for result in results):
            self.account.computed_on_cpu[str(func)] += 1
            return
        if func.is_view or str(func).startswith(WITHOUT_KERNEL) or not (results or tensors):
            return
        if func is VARLEN:
            self.account.attention["varlen"] += 1
        if func in FLASH_BACKWARD:
            self.account.peak = max(self.account.peak, self.account.alive + flash_backward_workspace(*args[1:3]))
        self._add_work(func, args, kwargs, tensors, results)

    def _with_lengths(self, leaf: Any) -> Any:
        """An int32 tensor as its values: FLOPs of variable-length attention depend on them."""
        known = self.value_of(leaf) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.int32 else None
        return leaf if known is None else known

    def _add_work(self, func, args, kwargs, tensors, results) -> None:
        formula, flops = flop_registry.get(func._overloadpacket), 0
        if formula is not None:
            args, kwargs = tree_map(self._with_lengths, (args, kwargs))
            with self.real():
                flops = formula(*args, **kwargs, out_val=results[0] if len(results) == 1 else tuple(results))
        self.launch(str(func), tensors, flops=flops, moved=bytes_moved(func, tensors, results))

    def launch(self, name: str, tensors: list[torch.Tensor], *, flops: int, moved: int) -> None:
        """Count a kernel; `tensors` are those whose shapes tell it from others of its name."""
        shapes = " ".join("x".join(map(str, tensor.shape)) for tensor in tensors if tensor.dim())
        work = self.account.work.get((name, shapes), Work())
        self.account.work[name, shapes] = work.plus(Work(1, flops, moved, self.device.seconds(flops, moved)))


def _leaves_device(tensors: list[torch.Tensor], results: list[torch.Tensor]) -> bool:
    return any(tensor.device.type == "cuda" for tensor in tensors) and results[0].device.type == "cpu"


def _described(func) -> str:
    """The operation and the line of ours, boson's or PEFT's that it comes from."""
    packages = ("/ds_higgs/", "/boson_multimodal/", "/transformers/", "/peft/", "/workload.py")
    for frame in reversed(traceback.extract_stack()):
        if any(package in frame.filename for package in packages):
            return f"{func} at {Path(frame.filename).name}:{frame.lineno}: {frame.line}"
    return str(func)


@contextlib.contextmanager
def simulated_cuda(device: Device = H200) -> Iterator[SimulatedCuda]:
    """While open, tensors are fake and "cuda" is there; operations inside the mode that it gives are counted."""
    mode = SimulatedCuda(device)
    with FakeTensorMode(allow_non_fake_inputs=True), _python_parts(mode):
        yield mode


@contextlib.contextmanager
def _python_parts(mode: SimulatedCuda) -> Iterator[None]:
    """What torch does before it dispatches and cannot do on a fake CUDA device: reading values, choosing attention."""
    stock = torch.Tensor.tolist, torch.tensor, F.scaled_dot_product_attention, torch.compile
    torch.Tensor.tolist = _tolist(mode, stock[0])
    torch.tensor = _tensor(mode, stock[1])
    F.scaled_dot_product_attention = _attention(mode, stock[2])
    torch.compile = _compile(mode)
    try:
        yield
    finally:
        torch.Tensor.tolist, torch.tensor, F.scaled_dot_product_attention, torch.compile = stock


def _tolist(mode: SimulatedCuda, stock: Callable) -> Callable:
    def tolist(tensor: torch.Tensor):
        if not isinstance(tensor, FakeTensor):
            return stock(tensor)
        if tensor.device.type == "cuda":
            mode.account.waits.append(_described("tolist"))
        with mode.real():
            return stock(mode.value_of(tensor))

    return tolist


def _tensor(mode: SimulatedCuda, stock: Callable) -> Callable:
    def number(item):
        if not isinstance(item, FakeTensor):
            return item
        mode.account.waits.append(_described("torch.tensor of a tensor"))
        with mode.real():
            return mode.value_of(item).item()

    def tensor(data, *, device=None, **kwargs):
        if isinstance(data, list | tuple):
            data = [number(item) for item in data]
        with mode.real():
            made = stock(data, **kwargs)
        on_device = device is not None and torch.device(device).type == "cuda"
        return mode.to_device(made) if on_device else made

    return tensor


def _compile(mode: SimulatedCuda) -> Callable:
    """Stands in for torch.compile: one launch that reads or writes each of a function's tensors once.

    `tests/unit/model/test_fused_layer.py` holds that this is what torch.compile makes of them.
    """

    def compile_function(function: Callable, **settings) -> Callable:
        def call(*args):
            with mode.uncounted():
                result = function(*args)
            tensors = {id(leaf): leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)}
            for tensor in tensors.values():
                mode.account.hold(tensor)
            moved = sum(num_bytes(tensor) for tensor in tensors.values())
            mode.launch(f"compiled.{function.__name__}", list(tensors.values()), flops=0, moved=moved)
            return result

        return call

    return compile_function


def _attention(mode: SimulatedCuda, stock: Callable) -> Callable:
    """The kernel that torch chooses on CUDA: flash without a mask in bf16, else the memory-efficient one.

    That one takes as many key as query heads; torch writes the scores out where there are fewer ("math").
    """

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if query.device.type != "cuda":
            return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
            mode.account.attention["flash"] += 1
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        mode.account.attention["efficient" if query.shape[1] == key.shape[1] else "math"] += 1
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, 1) if groups > 1 else states for states in (key, value))
        if attn_mask is not None:
            attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
        )[0]

    return attend
