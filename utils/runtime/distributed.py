"""Every call into `torch.distributed` lives here; with one process each function is the identity."""

from __future__ import annotations

import atexit
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Imported before there is a group: its functions keep the group of that moment as a default argument. DDP would import
# it later, and `cleanup` could not end the group's threads, which can abort the process as Python ends.
import torch.distributed.nn.functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.runtime.errors import LostPeerError, UserError

Result = TypeVar("Result")

LAUNCH_HINT = "python -m torch.distributed.launch --nproc_per_node=4 train_bdd100k.py ... --world_size 4 --distributed"


# 修改点 9: 初始化分布式训练，rank 和 world_size 取自启动器的环境变量
def setup(
    *, requested: bool, world_size: int | None, node_rank: int | None, init_method: str, device: torch.device
) -> None:
    """Join the launcher's process group; without a launcher, stay a single process.

    Args:
        requested: `--distributed` was given, so a launcher is required.
        world_size, node_rank: the user's values, checked against the launcher's.
        device: this process's own; the CPU takes gloo, a GPU NCCL.

    Raises:
        UserError: the launcher is missing or contradicts the flags, or the processes do not meet.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where streams, events and pinned memory are that name no device
    if not _launched():
        if requested or (world_size or 1) > 1:
            raise UserError(f"distributed training needs a launcher: {_launch_by_tasks() or LAUNCH_HINT}")
        if node_rank or init_method != "env://":
            flag = f"--node_rank {node_rank}" if node_rank else f"--init_method {init_method}"
            raise UserError(f"{flag} is for several processes, which need a launcher: {LAUNCH_HINT}")
        _warn_of_tasks()
        return
    actual, own = _number("WORLD_SIZE") or 0, _number("RANK") or 0
    if own >= actual:
        raise UserError(
            f"RANK is {own} and WORLD_SIZE {actual} in the environment, but a rank is below the number of "
            "processes; start with torchrun, or unset both to run a single process"
        )
    _number("MASTER_PORT")
    if world_size is not None and world_size != actual:
        raise UserError(f"--world_size {world_size}, but the launcher started {actual} processes; make them agree")
    # GROUP_RANK is the launcher's name for the rank of this machine.
    actual_node = _number("GROUP_RANK") or 0
    if node_rank is not None and node_rank != actual_node:
        raise UserError(f"--node_rank {node_rank}, but the launcher calls this node {actual_node}; make them agree")
    global _launcher
    _launcher = os.getppid() if actual > 1 else None  # the parent of a single process may be a shell, which may end
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store, number, size = next(dist.rendezvous(init_method, own, actual))
        # On a single machine torchrun keeps its store when it restarts workers: they would find addresses of ended
        # ones. With several machines the restart counts differ, and a c10d rendezvous makes a new store.
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group(backend, store=store, rank=number, world_size=size)
        if backend == "gloo":
            atexit.register(cleanup)  # after a failure too
    except (ValueError, RuntimeError) as error:  # a variable is missing, no such method, nobody answers
        reason = " ".join(str(error).split())
        raise UserError(
            f"the processes cannot meet by --init_method {init_method} ({reason}); leave that flag out and "
            "start with torchrun, or unset RANK and WORLD_SIZE to run a single process"
        ) from None


_launcher: int | None = None  # its process id


def launcher_has_ended() -> bool:
    """Whether the launcher of several processes has ended, so that nothing restarts them."""
    return _launcher is not None and os.getppid() != _launcher


def _launched() -> bool:
    return None not in (_number("RANK"), _number("WORLD_SIZE"))


def _number(name: str) -> int | None:
    """The value of a launcher's variable; an empty one counts as unset.

    Raises:
        UserError: it is no number.
    """
    text = os.environ.get(name, "").strip()
    if text and not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name} is {text!r} in the environment, which is no number; start with torchrun, or unset it")
    return int(text) if text else None


# Programs that start tasks but set no variables for PyTorch, by the variable with the number of tasks.
_TASK_STARTERS = {"SLURM_NTASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


def _started_tasks() -> tuple[str, int] | None:
    """The variable with a number of tasks above one, and the number."""
    for name in _TASK_STARTERS:
        text = os.environ.get(name, "")
        if text.isdecimal() and int(text) > 1:
            return name, int(text)
    return None


def _launch_by_tasks() -> str | None:
    """The command that starts a process for each task with a launcher."""
    tasks = _started_tasks()
    if tasks is None:
        return None
    name, count = tasks
    script = f"{Path(sys.argv[0]).name} ..."
    if name != "SLURM_NTASKS":
        return f"torchrun --nproc_per_node={count} {script}"
    nodes = os.environ.get("SLURM_NNODES", "")
    num_nodes = int(nodes) if nodes.isdecimal() and int(nodes) else 1
    launcher = "--standalone"
    if num_nodes > 1:
        launcher = (
            f"--nnodes={num_nodes} --rdzv_backend=c10d --rdzv_id=$SLURM_JOB_ID "
            "--rdzv_endpoint=$(scontrol show hostnames | head -n 1):29500"
        )
    return (
        f"srun --ntasks={num_nodes} --ntasks-per-node=1 --cpus-per-task=$SLURM_CPUS_ON_NODE torchrun {launcher} "
        f"--nproc_per_node={max(1, count // num_nodes)} {script}"
    )


def _warn_of_tasks() -> None:
    """Warn if several tasks run without a launcher: each does the whole work."""
    tasks = _started_tasks()
    if tasks:
        name, count = tasks
        print(
            f"warning: {name} is {count}, but no launcher started this process: each task that "
            f"{_TASK_STARTERS[name]} starts does the whole work by itself; to share it: {_launch_by_tasks()}",
            file=sys.stderr,
            flush=True,
        )


def cleanup() -> None:
    """Leave the group after success. After a failure, NCCL could wait for ended processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
    elif not _launched():
        _warn_of_tasks()  # again, as readers look at the end of a log


@contextmanager
def telling_lost_peers() -> Iterator[None]:
    """A context that turns the end of another process, which a collective notices, into one line.

    gloo notices it at once. NCCL may raise an error, end this process by its watchdog, or wait for the launcher's
    signal.

    Raises:
        LostPeerError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:  # a DDP backward pass raises no narrower type
        reason = " ".join(str(error).split())
        if world_size() == 1 or not (isinstance(error, dist.DistError) or _LOST.search(reason)):
            raise
        raise LostPeerError(
            f"process {rank()} of {world_size()} lost the connection to another one, which has ended: "
            f"see what that one or its machine says ({reason.split('. ')[0]})"
        ) from error


# The words of gloo's errors, and the name in NCCL's.
_LOST = re.compile(r"Connection closed by peer|Connection reset by peer|Broken pipe|Socket closed|gloo|NCCL")


def rank() -> int:
    """This process's rank among all; known before `setup`."""
    if dist.is_initialized():
        return dist.get_rank()
    return (_number("RANK") or 0) if _launched() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_shared() -> bool:
    """Whether a launcher's processes, or its only one, are a group: `wrap` gives DDP."""
    return dist.is_initialized()


def local_rank() -> int:
    """The rank among this machine's processes, and the index of the GPU to use; known before `setup`."""
    return (_number("LOCAL_RANK") or 0) if _launched() else 0


def local_world_size() -> int:
    """How many processes were started on this machine; known before `setup`."""
    # A launcher without this variable has started at least the lower ranks.
    return (_number("LOCAL_WORLD_SIZE") or local_rank() + 1) if _launched() else 1


def launch_command() -> str:
    """The command that starts this script in as many processes again, up to its flags."""
    if not _launched():
        return f"python {shlex.quote(sys.argv[0])}"
    if "GROUP_WORLD_SIZE" not in os.environ:  # not torchrun, so its words are unknown
        return f"<the launcher and its flags> {shlex.quote(sys.argv[0])}"
    words = [f"torchrun --nproc_per_node={local_world_size()}"]
    if (nodes := _number("GROUP_WORLD_SIZE") or 1) > 1:
        words += [f"--nnodes={nodes}", f"--node_rank={_number('GROUP_RANK')}"]
        words += [f"--master_addr={os.environ.get('MASTER_ADDR')}"]
    if port := _number("MASTER_PORT"):
        words += [f"--master_port={port}"]
    if restarts := _number("TORCHELASTIC_MAX_RESTARTS"):
        words += [f"--max_restarts={restarts}"]
    return " ".join([*words, shlex.quote(sys.argv[0])])


def command_line() -> str:
    """The command that started this script; the launcher's part as `launch_command` has it."""
    flags = [word for word in sys.argv[1:] if not word.replace("_", "-").startswith("--local-rank=")]
    return " ".join([launch_command(), *map(shlex.quote, flags)])


def is_main() -> bool:
    """Whether this is the process that writes and prints; known before `setup`."""
    return rank() == 0


def say(message: str) -> None:
    """Print a message in the main process only."""
    if is_main():
        print(message, flush=True)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather(value: Any) -> list[Any]:
    """Every process's value (a small picklable object), in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """The main process's value (a picklable object), everywhere."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def on_main(function: Callable[[], Result]) -> Result:
    """Call `function` in the main process only, and return its result (a picklable object) everywhere.

    Raises:
        UserError: the main process's, raised everywhere, so that no process waits for one that has stopped.
    """
    if not dist.is_initialized():
        return function()
    outcome: Any = None
    if is_main():
        try:
            outcome = function()
        except UserError as error:
            outcome = error
    outcome = broadcast(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


# 修改点 10: 用 DDP 包装模型，冻结的编码器不参与梯度同步
def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap in DDP if there is a group. DDP ignores frozen parameters."""
    if not dist.is_initialized():
        return model
    # DDP broadcasts buffers once an optimizer step. Ours are constants of a few MB, and the argument that turns this
    # off is deprecated.
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


# 修改点 12: DDP 与梯度累积配合，只在每组的最后一步同步梯度
def sync_gradients(model: nn.Module, enabled: bool) -> AbstractContextManager[None]:
    """Context of a forward and backward pass that communicates gradients only if `enabled`."""
    if enabled or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
