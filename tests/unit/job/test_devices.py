"""The device that is trained on: never the CPU beside a GPU that torch cannot use, unless it was asked for."""

import os

import pytest
import torch

from ds_higgs.errors import UserError
from ds_higgs.job import devices, distributed


@pytest.fixture
def with_gpu(monkeypatch, tmp_path):
    """A machine with a driver of CUDA 12 and one GPU, which torch does not see."""
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 2024\n")
    for name in ("nvidiactl", "nvidia-uvm", "nvidia0"):
        (tmp_path / name).touch()
    monkeypatch.setattr(devices, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(devices, "DEVICE_FOLDER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return tmp_path


@pytest.mark.parametrize(
    ("cuda", "why"), [("13.0", "CUDA 13.0, which needs 580"), (None, "for the CPU alone"), ("12.6", "finds none")]
)
def test_a_gpu_that_torch_cannot_use_is_refused(monkeypatch, with_gpu, cuda, why):
    monkeypatch.setattr("torch.version.cuda", cuda)
    with pytest.raises(UserError, match=why) as raised:
        distributed.init_process_group()
    assert "DS_ACCELERATOR=cpu" in str(raised.value)


@pytest.mark.parametrize("asked", [{"DS_ACCELERATOR": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""}])
def test_the_cpu_may_be_asked_for(monkeypatch, with_gpu, asked):
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    devices.check_gpu_is_used()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert not devices.uses_cuda()
    assert distributed.training_device(distributed.Ranks(0, 1, 0)) == torch.device("cpu")


def test_a_container_without_gpus_sees_its_hosts_driver(with_gpu):
    (with_gpu / "nvidia0").unlink()
    devices.check_gpu_is_used()


def test_the_allocator_is_the_users_where_he_has_chosen(monkeypatch):
    for name in devices.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    devices.prepare_allocator()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that it goes again
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    devices.prepare_allocator()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
