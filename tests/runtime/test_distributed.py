"""Several processes on the CPU, with both launchers, compared with one process on the same images.

A start takes seconds, so the tests share a few launches.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import train_bdd100k
from tests.helpers.faults import free_port, write_inputs
from tests.helpers.scripts import ONE_THREAD, log_of
from utils.model import checkpoint
from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.train.step import EagerSteps

REPOSITORY = Path(train_bdd100k.__file__).parent

Launch = Callable[..., Path]


@pytest.fixture(scope="module")
def launch(sam_file: Path, npy: Path) -> Launch:
    """A function that trains in `work_dir` under a launcher and returns the run's folder."""

    def launch(launcher: str, work_dir: Path, *flags: object, processes: int = 2) -> Path:
        command = [sys.executable, "-m", launcher, f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
        data = ["-i", npy / "train", "-model_type", "vit_tiny", "-checkpoint", sam_file, "-work_dir", work_dir]
        words = [*command, REPOSITORY / "train_bdd100k.py", *data, "--device", "cpu", "-num_workers", 0, *flags]
        environment = {**os.environ, **ONE_THREAD}
        done = subprocess.run(
            [str(word) for word in words], env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Best model:") == 1  # only the first process prints
        assert "broadcast_buffers" not in done.stderr  # PyTorch deprecated it
        (folder,) = work_dir.iterdir()  # only the first process makes a folder
        return folder

    return launch


def flat(state: dict[str, Tensor]) -> Tensor:
    """The weights in one vector, without the biases of keys.

    Such a bias adds a constant to all scores of a query. Softmax ignores it, so its gradient is rounding noise, which
    Adam turns into full steps.
    """
    return torch.cat([value.flatten().double() for key, value in state.items() if not key.endswith("k_proj.bias")])


# 20 steps. Seven images do not divide evenly: each epoch's second step has three images and a filler.
# With this seed, no logit is so near 0 that rounding moves a pixel into a mask: the IoU, a target, would jump.
COMMON = ["-batch_size", 1, "-num_epochs", 10, "-lr", "5e-5", "--seed", 7]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """COMMON with a cache of this module: features that other tests cached at other batch sizes round differently."""
    return [*COMMON, "--cache_embeddings", tmp_path_factory.mktemp("features")]


@pytest.fixture(scope="module")
def two_by_two(launch: Launch, common: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes x accumulation 2, launched as in the specification."""
    flags = ["--grad_acc_steps", 2, "--world_size", 2, "--distributed"]
    return launch("torch.distributed.launch", tmp_path_factory.mktemp("2x2"), *common, *flags)


@pytest.fixture(scope="module")
def four_by_one(launch: Launch, common: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    work_dir = tmp_path_factory.mktemp("4x1")
    return launch("torch.distributed.run", work_dir, *common, "--grad_acc_steps", 1, processes=4)


@pytest.fixture(scope="module")
def one_by_four(train: Callable[..., Path], common: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("1x4"), *common, "--grad_acc_steps", 4)


@pytest.mark.parametrize("layout", ["two_by_two", "four_by_one"])
@pytest.mark.slow
def test_several_processes_give_the_weights_of_one(
    layout: str, one_by_four: Path, sam_file: Path, request: pytest.FixtureRequest
) -> None:
    several, single = (
        flat(checkpoint.load_checkpoint(folder / checkpoint.LATEST)["model"])
        for folder in (request.getfixturevalue(layout), one_by_four)
    )
    start = torch.load(sam_file, weights_only=True)
    before = flat({key: value for key, value in start.items() if key.startswith("mask_decoder.")})
    difference, change = (several - single).norm().item(), (single - before).norm().item()
    print(f"relative to the weights {difference / single.norm().item():.1e}, to their change {difference / change:.1e}")
    assert difference < 1e-6 * single.norm().item()
    assert difference < 1e-4 * change


@pytest.mark.slow
def test_several_processes_show_the_validation_images_of_one(
    launch: Launch, train: Callable[..., Path], npy: Path, tmp_path: Path
) -> None:
    """The main process segments them alone, while the others wait."""
    flags = ["-batch_size", 1, "-num_epochs", 2, "--val_npy_path", npy / "val", "--cache_embeddings", "off"]
    one = train(tmp_path / "one", *flags, "--grad_acc_steps", 4)
    two = launch("torch.distributed.run", tmp_path / "two", *flags, "--grad_acc_steps", 2)
    for name in ("train_batch.jpg", "val_samples/epoch_001.jpg", "val_samples/epoch_002.jpg"):
        ours, theirs = (np.asarray(Image.open(folder / name)).astype(int) for folder in (one, two))
        assert ours.shape == theirs.shape and abs(ours - theirs).mean() < 2  # the weights are rounded differently
    assert len((two / "results.csv").read_text().splitlines()) == 3


@pytest.fixture(scope="module")
def semantic_flags(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Flags of a semantic run on a non-square frame with cached views."""
    folder = tmp_path_factory.mktemp("frame")
    flags = ["-i", write_inputs(folder, width=96) / "train", "--cache_embeddings", folder / "cache"]
    return [*flags, "--augment", "flip", "--prompt_mode", "semantic", "-batch_size", 1, "-num_epochs", 4, "-lr", "5e-5"]


@pytest.fixture(scope="module")
def one_semantic(
    semantic_flags: list[object], train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return train(tmp_path_factory.mktemp("one"), *semantic_flags, "--grad_acc_steps", 4)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.slow
def test_several_processes_give_the_semantic_weights_of_one(
    processes: int, one_semantic: Path, semantic_flags: list[object], launch: Launch, tmp_path: Path
) -> None:
    flags = [*semantic_flags, "--grad_acc_steps", 4 // processes]
    folder = launch("torch.distributed.run", tmp_path, *flags, processes=processes)
    states = [checkpoint.load_checkpoint(run / checkpoint.LATEST) for run in (folder, one_semantic)]
    assert states[0]["args"]["train_cache"] == "float16" and states[0]["info"].image_size == "64x96"
    several, single = (flat(state["model"]) for state in states)
    assert (several - single).norm() < 1e-6 * single.norm()


@pytest.mark.slow
def test_several_processes_train_selected_classes_as_one(
    semantic_flags: list[object], launch: Launch, train: Callable[..., Path], tmp_path: Path
) -> None:
    # Four of the seven images have pixels of these classes; their numbers differ.
    flags = [*semantic_flags, "-num_epochs", 2, "--classes", "road", "car", "sky"]
    one = train(tmp_path / "one", *flags, "--grad_acc_steps", 4)
    two = launch("torch.distributed.run", tmp_path / "two", *flags, "--grad_acc_steps", 2)
    states = [checkpoint.load_checkpoint(run / checkpoint.LATEST) for run in (two, one)]
    assert [state["classes"].names for state in states] == [("road", "car", "sky")] * 2
    several, single = (flat(state["model"]) for state in states)
    assert (several - single).norm() < 1e-6 * single.norm()


@pytest.mark.slow
def test_only_the_main_process_needs_the_run_and_its_flags_are_those_of_all(
    sam_file: Path, npy: Path, train: Callable[..., Path], tmp_path: Path
) -> None:
    """Two machines, by two working directories: the second has another run of the same name."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    flags = ["-batch_size", 1, "--grad_acc_steps", 4, "-num_epochs", 1, "--clip_grad_norm", 0.01]
    folder = train(ours / "work", *flags, "--cache_embeddings", "off")
    other = theirs / "work" / folder.name
    other.mkdir(parents=True)
    (other / checkpoint.LATEST).write_bytes(b"damaged")
    straight = shutil.copytree(folder, tmp_path / "straight" / folder.name)
    train(straight.parent, "--resume", straight, "-num_epochs", 2)

    script = [sys.executable, REPOSITORY / "train_bdd100k.py", "--resume", Path("work") / folder.name, "-num_epochs", 2]
    words = [str(word) for word in (*script, "--grad_acc_steps", 2, "--device", "cpu")]
    environment = {**os.environ, **ONE_THREAD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(words, cwd=where, env=environment | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
        for rank, where in enumerate((ours, theirs))
    ]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    assert len(log_of(folder)) == 2
    several, single = (flat(checkpoint.load_checkpoint(run / checkpoint.LATEST)["model"]) for run in (folder, straight))
    assert (several - single).norm() < 1e-6 * single.norm()


@pytest.mark.slow
def test_two_processes_log_what_one_does(two_by_two: Path, one_by_four: Path) -> None:
    several, single = log_of(two_by_two), log_of(one_by_four)
    assert [record["epoch"] for record in several] == list(range(10))  # each line once
    for ours, theirs in zip(several, single):
        assert ours["optimizer_steps"] == theirs["optimizer_steps"] == 2
        for key in ("train_loss", "dice", "bce", "iou", "ce"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


@pytest.mark.slow
def test_only_the_first_process_writes(two_by_two: Path, one_by_four: Path) -> None:
    assert {path.name for path in two_by_two.iterdir()} == {path.name for path in one_by_four.iterdir()}
    best = checkpoint.load_checkpoint(two_by_two / checkpoint.BEST)
    assert all(key.startswith("mask_decoder.") for key in best["model"])  # nothing of the wrapper in the names


@pytest.mark.parametrize("batch_size", [1, 3])  # three images: batches of two and one process, or one batch for both
@pytest.mark.slow
def test_evaluation_in_two_processes_equals_one_exactly(
    batch_size: int, launch: Launch, train: Callable[..., Path], npy: Path, tmp_path: Path
) -> None:
    # At this learning rate no weight changes, so both score the same decoder.
    flags = ["-batch_size", batch_size, "-num_epochs", 1, "-lr", "1e-30", "--val_npy_path", npy / "val"]
    (several,) = log_of(launch("torch.distributed.run", tmp_path / "2", *flags))
    (single,) = log_of(train(tmp_path / "1", *flags))
    assert several["val_miou"] == single["val_miou"] > 0


@pytest.mark.slow
def test_processes_stop_early_together(launch: Launch, npy: Path, tmp_path: Path) -> None:
    # No weight changes, so no validation is better than the first.
    flags = ["-num_epochs", 9, "-lr", "1e-30", "--val_npy_path", npy / "val", "--patience", 1]
    assert len(log_of(launch("torch.distributed.run", tmp_path, *flags))) == 2


@pytest.mark.slow
def test_two_processes_write_the_cache_that_one_reads(
    launch: Launch, train: Callable[..., Path], npy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    flags = ["--prompt_mode", "semantic", "--augment", "flip", "--cache_embeddings", cache]
    flags += ["-batch_size", 1, "-num_epochs", 2, "-lr", 5e-5]
    several = launch("torch.distributed.run", tmp_path / "2", *flags, "--grad_acc_steps", 2)
    assert len(list(cache.glob("train/*.safetensors"))) == 7 and (cache / "projection.safetensors").exists()
    single = train(tmp_path / "1", *flags, "--grad_acc_steps", 4)
    printed = capsys.readouterr().out
    assert "features are read from" in printed and "encoding" not in printed
    states = [flat(checkpoint.load_checkpoint(folder / checkpoint.LATEST)["model"]) for folder in (several, single)]
    assert (states[0] - states[1]).norm() < 1e-5 * states[1].norm()


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of a launcher with a single process, in which DDP works as in any group."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    yield
    distributed.cleanup()


def test_gradients_are_communicated_once_an_optimizer_step(
    group_of_one: None, train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []

    def hook(state, bucket):  # DDP rejects annotations that are strings
        events.append((bucket.index(), [id(parameter) for parameter in bucket.parameters()]))
        return default_hooks.allreduce_hook(None, bucket)  # type: ignore[arg-type]

    def wrap(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        wrapped: Any = real_wrap(model, device)
        wrapped.register_comm_hook(None, hook)
        return wrapped

    def step(steps: EagerSteps) -> bool:
        events.append("step")
        return real_step(steps)

    real_wrap, real_step = distributed.wrap, EagerSteps._step
    monkeypatch.setattr(distributed, "wrap", wrap)
    monkeypatch.setattr(EagerSteps, "_step", step)
    train(tmp_path, "-batch_size", 1, "--grad_acc_steps", 3, "-num_epochs", 2)  # groups of 3, 3 and 1 images

    buckets: list[list[Any]] = [[]]
    for event in events:
        if event == "step":
            buckets.append([])
        else:
            buckets[-1].append(event)
    assert len(buckets) == 7 and not buckets[-1]
    settled = buckets[1]  # the first also has the pass that fixes the buckets' layout
    assert sorted(index for index, _ in settled) == list(range(len(settled)))
    parameters = [parameter for _, some in settled for parameter in some]
    assert len(parameters) == len(set(parameters)) > 100
    assert buckets[0][-len(settled) :] == settled  # so a resumed run sums in the same order
    assert all(group == settled for group in buckets[1:-1])


def test_buffers_are_broadcast_once_an_optimizer_step(group_of_one: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    distributed.setup(requested=True, world_size=1, node_rank=None, init_method="env://", device=cpu)
    module = torch.nn.Linear(2, 1)
    module.register_buffer("constant", torch.ones(1))
    model = distributed.wrap(module, cpu)
    steps: list[int] = []
    broadcasts: list[int] = []
    monkeypatch.setattr(model, "_sync_buffers", lambda: broadcasts.append(steps[-1]))
    for step in range(6):
        steps.append(step)
        with distributed.sync_gradients(model, enabled=step % 3 == 2):
            model(torch.ones(1, 2)).sum().backward()
    assert broadcasts == [0, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are looked up in /proc")
@pytest.mark.slow
def test_no_thread_of_the_group_outlives_cleanup(group_of_one: None) -> None:
    """A thread that releases a tensor while Python exits can abort the process."""
    code = (
        "import time, torch; from pathlib import Path; from utils.runtime import distributed\n"
        "cpu = torch.device('cpu')\n"
        "distributed.setup(requested=True, world_size=1, node_rank=None, init_method='env://', device=cpu)\n"
        "distributed.wrap(torch.nn.Linear(2, 1), cpu)(torch.ones(1, 2)).sum().backward()\n"
        "names = lambda: ' '.join(path.read_text() for path in Path('/proc/self/task').glob('*/comm'))\n"
        "assert 'gloo' in names(), names()\n"
        "distributed.cleanup(); time.sleep(0.2)\n"  # an ended thread stays listed for a moment
        "assert 'gloo' not in names(), names()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_what_fails_in_the_main_process_fails_everywhere(group_of_one: None) -> None:
    def fail() -> None:
        raise UserError("no room")

    distributed.setup(requested=True, world_size=1, node_rank=None, init_method="env://", device=torch.device("cpu"))
    assert distributed.on_main(lambda: {"a": torch.ones(2)})["a"].sum() == 2
    with pytest.raises(UserError, match="no room"):
        distributed.on_main(fail)


CPU = torch.device("cpu")
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_PORT")
VARIABLES = (*NUMBERS, "MASTER_ADDR", "SLURM_NTASKS", "SLURM_NNODES", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@pytest.fixture
def launched_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that sets up with only these variables of a launcher."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def launched_with(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        distributed.setup(requested=False, world_size=None, node_rank=None, init_method="env://", device=CPU)

    yield launched_with
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    distributed.cleanup()


@pytest.mark.parametrize("empty", ["", " "])
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_an_empty_variable_is_an_unset_one(name: str, empty: str, launched_with: Callable[..., None]) -> None:
    launched_with(**{"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", name: empty})
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert (distributed.local_rank(), distributed.local_world_size()) == (0, 1)


def test_empty_variables_beside_a_launchers(launched_with: Callable[..., None]) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launched_with(RANK="0", WORLD_SIZE="1", LOCAL_RANK="", LOCAL_WORLD_SIZE="", GROUP_RANK="", **where)
    assert torch.distributed.is_initialized()
    assert (distributed.local_rank(), distributed.local_world_size()) == (0, 1)


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "²"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_variable_that_is_no_number_is_named(name: str, value: str, launched_with: Callable[..., None]) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with pytest.raises(UserError, match=f"^{name} is '.*' in the environment, which is no number; .*unset it"):
        launched_with(**{"RANK": "0", "WORLD_SIZE": "1", **where, name: value})
        # What the scripts ask first, for the device.
        distributed.local_rank(), distributed.local_world_size()


def test_a_rank_that_cannot_be(launched_with: Callable[..., None]) -> None:
    with pytest.raises(UserError, match="RANK is 2 and WORLD_SIZE 2"):
        launched_with(RANK="2", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
            "srun --ntasks=1 --ntasks-per-node=1 --cpus-per-task=$SLURM_CPUS_ON_NODE "
            "torchrun --standalone --nproc_per_node=2 train_bdd100k.py ...",
        ),
        (
            {"SLURM_NTASKS": "8", "SLURM_NNODES": "2"},
            "srun --ntasks=2 --ntasks-per-node=1 --cpus-per-task=$SLURM_CPUS_ON_NODE torchrun --nnodes=2 "
            "--rdzv_backend=c10d --rdzv_id=$SLURM_JOB_ID --rdzv_endpoint=$(scontrol show hostnames | head -n 1):29500 "
            "--nproc_per_node=4 train_bdd100k.py ...",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "torchrun --nproc_per_node=4 train_bdd100k.py ..."),
        ({"PMI_SIZE": "4"}, "torchrun --nproc_per_node=4 train_bdd100k.py ..."),
    ],
)
def test_tasks_without_a_launcher_are_warned_of_at_the_beginning_and_the_end(
    variables: dict[str, str],
    command: str,
    launched_with: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_bdd100k.py", "-i", "x"])
    launched_with(**variables)
    line = capsys.readouterr().err
    assert line.startswith("warning: ") and line.endswith(f"; to share it: {command}\n") and line.count("\n") == 1
    distributed.cleanup()
    assert capsys.readouterr().err == line
    with pytest.raises(UserError) as error:
        distributed.setup(requested=True, world_size=None, node_rank=None, init_method="env://", device=CPU)
    assert str(error.value) == f"distributed training needs a launcher: {command}"


@pytest.mark.parametrize("variables", [{"SLURM_NTASKS": "1"}, {"SLURM_NTASKS": ""}, {"SLURM_NTASKS": "2(x2)"}, {}])
def test_one_task_needs_no_launcher(
    variables: dict[str, str], launched_with: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    launched_with(**variables)
    distributed.cleanup()
    assert capsys.readouterr().err == ""


def test_a_launcher_under_slurm_is_one(launched_with: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launched_with(RANK="0", WORLD_SIZE="1", SLURM_NTASKS="2", **where)
    distributed.cleanup()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "expected"), [("cpu", []), ("cuda:1", ["cuda:1"])])
def test_a_card_is_the_one_for_all_that_names_none(
    name: str, expected: list[str], launched_with: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    device = torch.device(name)
    distributed.setup(requested=False, world_size=None, node_rank=None, init_method="env://", device=device)
    assert chosen == expected
