"""Which device and which type the flags come to, on machines that are only pretended."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.runtime import distributed
from utils.runtime.device import Precision, make_deterministic, resolve_precision
from utils.runtime.errors import UserError

TURING, AMPERE = (7, 5), (8, 0)
CPU = torch.device("cpu")


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = AMPERE, count: int = 4) -> None:
    """`count` cards of a compute capability; 0 for a machine without CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def pretend_cpu(monkeypatch: pytest.MonkeyPatch, *, avx512: bool, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)


def resolve(
    device: str | None = None,
    *,
    local_rank: int = 0,
    local_world_size: int = 1,
    use_amp: bool = False,
    amp_dtype: str = "auto",
) -> Precision:
    return resolve_precision(
        device, local_rank=local_rank, local_world_size=local_world_size, use_amp=use_amp, amp_dtype=amp_dtype
    )


def test_without_a_name_cuda_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, count=0)
    assert resolve().device == CPU
    pretend_cuda(monkeypatch)
    assert resolve().device == torch.device("cuda", 0)
    assert resolve("cpu").device == CPU


@pytest.mark.parametrize(
    ("name", "local_rank", "index"), [("cuda", 0, 0), ("cuda", 3, 3), (None, 2, 2), ("cuda:1", 0, 1)]
)
def test_the_card(monkeypatch: pytest.MonkeyPatch, name: str | None, local_rank: int, index: int) -> None:
    pretend_cuda(monkeypatch)
    assert resolve(name, local_rank=local_rank, local_world_size=local_rank + 1).device == torch.device("cuda", index)


@pytest.mark.parametrize(
    ("name", "cards", "said"),
    [
        ("cuda", 0, "--device cuda: PyTorch finds no CUDA device; use --device cpu"),
        ("cuda:4", 4, "--device cuda:4: only 4 CUDA devices are available"),
        ("gpu", 4, "--device gpu: not supported; use cpu, cuda or cuda:N"),
        ("mps", 4, "--device mps: not supported; use cpu, cuda or cuda:N"),
    ],
)
def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch, name: str, cards: int, said: str) -> None:
    pretend_cuda(monkeypatch, count=cards)
    with pytest.raises(UserError) as error:
        resolve(name)
    assert str(error.value) == said


def test_more_processes_than_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, count=2)
    with pytest.raises(UserError, match="only 2 CUDA devices are available"):
        resolve("cuda", local_rank=2, local_world_size=3)


@pytest.mark.parametrize("local_rank", [0, 1])
def test_several_processes_do_not_take_one_card(monkeypatch: pytest.MonkeyPatch, local_rank: int) -> None:
    pretend_cuda(monkeypatch)
    with pytest.raises(UserError) as error:
        resolve("cuda:1", local_rank=local_rank, local_world_size=2)
    said = "--device cuda:1: this machine runs 2 processes; "
    assert str(error.value) == said + "use --device cuda to give each its own card"


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "4"}, 1),  # left over: nothing else says that there is a launcher
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, 4),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, 1),  # two machines
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 2),  # a launcher that does not say
    ],
)
def test_processes_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], processes: int
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.local_world_size() == processes


@pytest.mark.parametrize(
    ("capability", "amp_dtype", "expected"),
    [
        (TURING, "auto", torch.float16),
        (TURING, "fp16", torch.float16),
        (AMPERE, "auto", torch.bfloat16),
        (AMPERE, "fp16", torch.float16),
        (AMPERE, "bf16", torch.bfloat16),
    ],
)
def test_type_on_a_card(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], amp_dtype: str, expected: torch.dtype
) -> None:
    pretend_cuda(monkeypatch, capability)
    assert resolve("cuda", use_amp=True, amp_dtype=amp_dtype).amp_dtype == expected
    assert resolve("cuda", use_amp=False, amp_dtype=amp_dtype).amp_dtype is None


def test_turing_cannot_compute_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, TURING)
    with pytest.raises(UserError, match="--amp_dtype bf16: this card does not support bf16; use fp16"):
        resolve("cuda", use_amp=True, amp_dtype="bf16")


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"), [(False, False, None), (True, False, torch.bfloat16), (False, True, torch.bfloat16)]
)
def test_type_on_a_cpu(monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, expected: torch.dtype | None) -> None:
    """ "auto" takes float32 rather than a type that the processor would emulate; what is asked for is done."""
    pretend_cpu(monkeypatch, avx512=avx512, amx=amx)
    assert resolve("cpu", use_amp=True).amp_dtype == expected
    assert resolve("cpu", use_amp=True, amp_dtype="bf16").amp_dtype == torch.bfloat16
    assert resolve("cpu", use_amp=True, amp_dtype="fp16").amp_dtype == torch.float16


@pytest.mark.parametrize(
    ("amp_dtype", "computed_in", "scaled"),
    [(None, torch.float32, False), (torch.bfloat16, torch.bfloat16, False), (torch.float16, torch.float16, True)],
)
def test_what_autocast_and_the_scaler_do(amp_dtype: torch.dtype | None, computed_in: torch.dtype, scaled: bool) -> None:
    """Only fp16, whose range is narrow, has its loss scaled."""
    precision = Precision(CPU, amp_dtype)
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == computed_in
    assert precision.grad_scaler().is_enabled() == scaled


def test_images_become_channels_first() -> None:
    stored = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3)
    images = Precision(CPU).images(stored)
    assert images.shape == (2, 3, 4, 4)
    assert torch.equal(images[1, 2, 3, 0], stored[1, 3, 0, 2])


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `make_deterministic` sets is the whole process's: undone after the test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    cudnn.deterministic, cudnn.benchmark = before[1:]


@pytest.mark.usefixtures("restored")
def test_deterministic_sets_all_there_is_to_set_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cudnn.benchmark = True
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.cuda.is_initialized()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the user's choice, as good
    make_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match=r"--deterministic: CUBLAS_WORKSPACE_CONFIG is :0:0; unset it, or set it to"):
        make_deterministic()


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("mode", ["box", "semantic"])
@pytest.mark.slow
def test_training_goes_through_with_deterministic_and_gives_the_same(
    mode: str, train: Callable[..., Path], tmp_path: Path
) -> None:
    """On a CPU the same figures as without; neither hangs on what Python's and NumPy's own generators hold."""
    figures = []
    for number, switch in enumerate(([], ["--deterministic"])):
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002
        flags = ["--prompt_mode", mode, "-num_epochs", 1, "-batch_size", 4, "--grad_acc_steps", 1]
        folder = train(tmp_path / str(number), *switch, *flags)
        record = json.loads((folder / "log.jsonl").read_text())
        figures.append({key: value for key, value in record.items() if key not in ("seconds", "images_per_second")})
        assert torch.are_deterministic_algorithms_enabled() == bool(switch)
    assert figures[0] == figures[1]


def test_nothing_but_pytorch_and_seeded_generators_is_random() -> None:
    """`--seed` reaches PyTorch and `numpy.random.default_rng` alone."""
    root = Path(__file__).resolve().parents[2]
    sources = [*root.glob("*.py"), *root.glob("utils/**/*.py"), *root.glob("segment_anything/**/*.py")]
    unseeded = re.compile(r"^\s*(import random|from random )|np\.random\.(?!default_rng\(.|Generator)", re.MULTILINE)
    assert [path.name for path in sources if unseeded.search(path.read_text())] == []
