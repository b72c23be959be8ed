"""Where the model runs and in what: the device, and the type that autocast takes its matrix products in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.runtime.errors import UserError

CUBLAS_WORKSPACES = (":4096:8", ":16:8")  # those with which it is deterministic; the first costs some 24 MiB of a GPU


@dataclass(frozen=True)
class Precision:
    """`amp_dtype` None is float32 throughout."""

    device: torch.device
    amp_dtype: torch.dtype | None = None

    # 修改点 7: AMP 混合精度训练，autocast 只用于模型的前向计算，损失用 float32 计算
    def autocast(self) -> AbstractContextManager[Any]:
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """The loss scaler that fp16 needs for its narrow range; disabled, and so the identity, for the others."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)

    def images(self, batch: dict[str, Any]) -> Tensor:
        """The batch's images on the device, B x 3 x H x W; stored as B x H x W x 3, they are channels-last there."""
        return self.to_device(batch["image"]).permute(0, 3, 1, 2)

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def make_deterministic() -> None:
    """Have PyTorch take kernels that give the same bits on each run; call it before the first work on a GPU.

    cuBLAS reads its workspace setting when its handle is made, with the first matrix product. An operation that has no
    deterministic kernel raises an error from now on. With PyTorch 2.14 the training step has none of those: bilinear
    interpolation, whose backward kernel is one, is replaced by indexing, and `gather`, convolutions, attention and
    indexing have deterministic forms.

    Raises:
        UserError: the environment asks cuBLAS for a workspace with which it is not deterministic.
    """
    asked = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
    if asked not in CUBLAS_WORKSPACES:
        raise UserError(
            f"--deterministic: CUBLAS_WORKSPACE_CONFIG is {asked}; unset it, or set it to "
            f"{' or '.join(CUBLAS_WORKSPACES)}"
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # which takes the kernel that was fastest this time


@contextmanager
def telling_out_of_memory(advice: str) -> Iterator[None]:
    """A context in which a full GPU is one line with `advice`, which flags to change, and no traceback."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise UserError(f"the GPU's memory is full; {advice}") from None


def resolve_precision(
    device_name: str | None, *, local_rank: int, local_world_size: int, use_amp: bool, amp_dtype: str
) -> Precision:
    """Turn the flags into a `Precision`.

    Args:
        device_name: "cpu", "cuda" or "cuda:N"; None is CUDA where there is one.
        local_rank: the card to take where the name has no number.
        local_world_size: processes on this machine; of several, each must take a card of its own.
        amp_dtype: "auto" is bf16 where the hardware has it; elsewhere fp16 on a GPU (Turing, such as the 2080 Ti), and
            on a CPU, which would emulate either many times slower, float32.

    Raises:
        UserError: the device does not exist here, is one for several processes, or cannot compute in the type.
    """
    if device_name is None:
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device_name)
    except RuntimeError:
        raise UserError(f"--device {device_name}: not a device; use cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device_name}: PyTorch finds no CUDA here; use --device cpu")
        if device.index is not None and local_world_size > 1:
            raise UserError(
                f"--device {device_name}: {local_world_size} processes were started on this machine; "
                "give --device cuda: each process takes its own card"
            )
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(f"--device {device_name}: there are only {torch.cuda.device_count()} CUDA devices here")
        device = torch.device("cuda", index)
    elif device.type != "cpu":
        raise UserError(f"--device {device_name}: not supported; use cpu, cuda or cuda:N")

    if not use_amp:
        return Precision(device)
    if device.type == "cpu":
        # PyTorch has no public name for these; where it has none at all (before 2.5), float32 is never wrong.
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        has_bf16 = any(getattr(torch.cpu, check, bool)() for check in checks)
    else:
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        if amp_dtype == "bf16" and not has_bf16:
            raise UserError("--amp_dtype bf16: this card cannot compute in bf16; use fp16")
    if amp_dtype == "auto" and not has_bf16:
        return Precision(device, None if device.type == "cpu" else torch.float16)
    return Precision(device, torch.float16 if amp_dtype == "fp16" else torch.bfloat16)
