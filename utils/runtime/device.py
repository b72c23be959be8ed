"""The device, and the type in which autocast computes matrix products."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.runtime.errors import UserError

CUBLAS_WORKSPACES = (":4096:8", ":16:8")  # deterministic ones; the first takes about 24 MiB of GPU memory


@dataclass(frozen=True)
class Precision:
    """A device and its `amp_dtype`; None is float32 throughout."""

    device: torch.device
    amp_dtype: torch.dtype | None = None

    # 修改点 7: AMP 混合精度训练，autocast 只用于模型的前向计算，损失用 float32 计算
    def autocast(self) -> AbstractContextManager[Any]:
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """The loss scaler that fp16 needs for its narrow range; disabled (the identity) for other types."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)

    def images(self, stored: Tensor) -> Tensor:
        """Images on the device, B x H x W x 3 -> B x 3 x H x W, channels-last in memory."""
        return self.to_device(stored).permute(0, 3, 1, 2)

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def make_deterministic() -> None:
    """Make PyTorch use kernels that give the same bits on each run. Call it before the first work on a GPU.

    cuBLAS reads its workspace setting at the first matrix product. From now on, an operation without a deterministic
    kernel raises an error. No operation of the training step is affected: `interpolate_axis` replaces bilinear
    interpolation, whose backward kernel is not deterministic.

    Raises:
        UserError: the environment sets a cuBLAS workspace that is not deterministic.
    """
    asked = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
    if asked not in CUBLAS_WORKSPACES:
        raise UserError(
            f"--deterministic: CUBLAS_WORKSPACE_CONFIG is {asked}; unset it, or set it to "
            f"{' or '.join(CUBLAS_WORKSPACES)}"
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # it selects the kernel that was fastest this time


@contextmanager
def telling_out_of_memory(advice: str) -> Iterator[None]:
    """Turn out-of-memory errors of the GPU within the context into a `UserError` with `advice`."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise UserError(f"the GPU's memory is full; {advice}") from None


def resolve_precision(
    device_name: str | None, *, local_rank: int, local_world_size: int, use_amp: bool, amp_dtype: str
) -> Precision:
    """Turn the flags into a `Precision`.

    Args:
        device_name: "cpu", "cuda" or "cuda:N"; None is CUDA if available.
        local_rank: the card to use if the name has no number.
        local_world_size: processes on this machine; each needs its own card.
        amp_dtype: "auto" is bf16 if the hardware has it. Otherwise it is fp16 on a GPU (Turing, such as the 2080 Ti)
            and float32 on a CPU, where emulation would be many times slower.

    Raises:
        UserError: the device does not exist, would be shared by several processes, or cannot compute in the type.
    """
    if device_name is None:
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device: torch.device | None = torch.device(device_name)
    except RuntimeError:
        device = None
    wrong = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device_name}: not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if not torch.cuda.is_available():
            wrong = "PyTorch finds no CUDA device; use --device cpu"
        elif device.index is not None and local_world_size > 1:
            wrong = f"this machine runs {local_world_size} processes; use --device cuda to give each its own card"
        elif index >= torch.cuda.device_count():
            wrong = f"only {torch.cuda.device_count()} CUDA devices are available"
        if wrong:
            raise UserError(f"--device {device_name}: {wrong}")
        device = torch.device("cuda", index)

    if not use_amp:
        return Precision(device)
    if device.type == "cpu":
        # PyTorch has no public name for these, and none at all before 2.5; then float32 is always right.
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        has_bf16 = any(getattr(torch.cpu, check, bool)() for check in checks)
    else:
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        if amp_dtype == "bf16" and not has_bf16:
            raise UserError("--amp_dtype bf16: this card does not support bf16; use fp16")
    if amp_dtype == "auto" and not has_bf16:
        return Precision(device, None if device.type == "cpu" else torch.float16)
    return Precision(device, torch.float16 if amp_dtype == "fp16" else torch.bfloat16)
