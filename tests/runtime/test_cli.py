"""The command lines: the specification's flags, frozen, and what a user gets to read when something is wrong."""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import infer_bdd100k
import pre_bdd100k
import train_bdd100k
from segment_anything.build_sam import CONFIGS
from utils.cache.keys import DTYPES
from utils.data.datasets import BoxPromptDataset, NpyFolder
from utils.data.loaders import Loader
from utils.model.segmenter import SEGMENTERS
from utils.runtime import choices, cli
from utils.runtime.errors import Interrupted, LostPeerError, UserError

ROOT = Path(train_bdd100k.__file__).parent

REQUIRED: dict[ModuleType, list[str]] = {
    pre_bdd100k: ["--bdd100k_root", "data"],
    train_bdd100k: ["-i", "data"],
    infer_bdd100k: [],
}

# Every flag of the specification that takes a value: script, name, default, a text and what it is parsed to.
FLAGS: list[tuple[ModuleType, str, Any, str, Any]] = [
    (pre_bdd100k, "bdd100k_root", Path("data"), "x", Path("x")),
    (pre_bdd100k, "output_path", Path("data/bdd100k_npy"), "x", Path("x")),
    (pre_bdd100k, "image_size", 1024, "256", 256),
    (pre_bdd100k, "splits", ["train", "val"], "test", ["test"]),
    (train_bdd100k, "tr_npy_path", Path("data"), "x", Path("x")),
    (train_bdd100k, "task_name", "BDD100K-SAM-MaskDecoder", "x", "x"),
    (train_bdd100k, "model_type", "vit_b", "vit_h", "vit_h"),
    (train_bdd100k, "checkpoint", Path("work_dir/SAM/sam_vit_b_01ec64.pth"), "x", Path("x")),
    (train_bdd100k, "work_dir", Path("work_dir"), "./x", Path("x")),
    (train_bdd100k, "batch_size", 4, "2", 2),
    (train_bdd100k, "num_epochs", 100, "3", 3),
    (train_bdd100k, "lr", 5e-5, "1e-4", 1e-4),
    (train_bdd100k, "weight_decay", 0.01, "0", 0.0),
    (train_bdd100k, "num_workers", 4, "0", 0),
    (train_bdd100k, "grad_acc_steps", 4, "8", 8),
    (train_bdd100k, "bbox_shift", 20, "0", 0),
    (train_bdd100k, "world_size", None, "4", 4),
    (train_bdd100k, "node_rank", None, "0", 0),
    (train_bdd100k, "init_method", "env://", "tcp://localhost:29500", "tcp://localhost:29500"),
    (train_bdd100k, "resume", None, "x", Path("x")),
    (train_bdd100k, "device", None, "cuda:0", "cuda:0"),
    (infer_bdd100k, "val_npy_path", Path("data/bdd100k_npy/val"), "x", Path("x")),
    (infer_bdd100k, "model_checkpoint", None, "x", Path("x")),
    (infer_bdd100k, "sam_checkpoint", Path("work_dir/SAM/sam_vit_b_01ec64.pth"), "x", Path("x")),
    (infer_bdd100k, "model_type", "vit_b", "vit_l", "vit_l"),
    (infer_bdd100k, "output_dir", Path("inference_results"), "./x", Path("x")),
    (infer_bdd100k, "batch_size", 1, "2", 2),
    (infer_bdd100k, "device", None, "cpu", "cpu"),
]

# Word for word from the specification.
SINGLE_GPU = r"""
python train_bdd100k.py \
    -i data/bdd100k_npy/train \
    -task_name BDD100K-SAM-MaskDecoder \
    -model_type vit_b \
    -checkpoint work_dir/SAM/sam_vit_b_01ec64.pth \
    -work_dir ./work_dir \
    -batch_size 4 \
    -num_epochs 100 \
    -lr 5e-5 \
    -use_amp \
    --grad_acc_steps 4 \
    --device cuda:0
"""
FOUR_GPUS = r"""
python -m torch.distributed.launch \
    --nproc_per_node=4 \
    --master_port=29500 \
    train_bdd100k.py \
    -i data/bdd100k_npy/train \
    -task_name BDD100K-SAM-MaskDecoder \
    -model_type vit_b \
    -checkpoint work_dir/SAM/sam_vit_b_01ec64.pth \
    -work_dir ./work_dir \
    -batch_size 4 \
    -num_epochs 100 \
    -lr 5e-5 \
    -use_amp \
    --grad_acc_steps 4 \
    --world_size 4 \
    --distributed
"""
INFERENCE = r"""
python infer_bdd100k.py \
    --val_npy_path data/bdd100k_npy/val \
    --model_checkpoint work_dir/BDD100K-SAM-MaskDecoder-YYYYMMDD-HHMM/medsam_model_best.pth \
    --sam_checkpoint work_dir/SAM/sam_vit_b_01ec64.pth \
    --model_type vit_b \
    --output_dir ./inference_results \
    --batch_size 1 \
    --device cuda:0 \
    --visualize
"""
PREPROCESSING = r"""
python pre_bdd100k.py \
    --bdd100k_root data/bdd100k \
    --output_path data/bdd100k_npy \
    --image_size 1024 \
    --splits train val
"""


def parse(script: ModuleType, *flags: str) -> dict[str, Any]:
    args = script.get_args_parser().parse_args([*REQUIRED[script], *flags])
    if script is train_bdd100k:
        train_bdd100k.apply_defaults(args, {})  # as its main does first
    return vars(args)


def parse_command(script: ModuleType, command: str, *from_launcher: str) -> dict[str, Any]:
    """Parse what follows the script's name in a shell command, after the arguments that a launcher puts first."""
    words = shlex.split(command.replace("\\\n", " "))
    flags = words[words.index(f"{script.__name__}.py") + 1 :]
    return vars(script.get_args_parser().parse_args([*from_launcher, *flags]))


def test_defaults_of_the_semantic_mode() -> None:
    args = parse(train_bdd100k, "--prompt_mode", "semantic", "--warmup_epochs", "0")
    assert (args["lr"], args["lr_scheduler"], args["warmup_epochs"]) == (2e-3, "cosine", 0)  # what is given stands
    boxed = parse(train_bdd100k)
    assert (boxed["prompt_mode"], boxed["lr"], boxed["lr_scheduler"], boxed["warmup_epochs"]) == (
        "box",
        5e-5,
        "constant",
        0,
    )


def test_a_preset_decides_what_is_not_given() -> None:
    names = ("batch_size", "grad_acc_steps", "use_amp", "amp_dtype", "num_workers")
    args = parse(train_bdd100k, "--preset", "3090")
    assert [args[name] for name in names] == [8, 2, True, "bf16", 8]
    given = ["-batch_size", "4", "-use_amp", "False", "--amp_dtype", "auto", "-num_workers", "0"]  # what no preset says
    for flags in (["--preset", "3090", *given], [*given, "--preset", "3090"]):
        args = parse(train_bdd100k, *flags)
        assert [args[name] for name in names] == [4, 2, False, "auto", 0]
    for preset in ("2080ti", "3090", "a100", "cpu"):  # none changes what an optimizer step is made of
        args = parse(train_bdd100k, "--preset", preset)
        assert args["batch_size"] * args["grad_acc_steps"] == 16


@pytest.mark.parametrize(
    ("script", "name", "default", "text", "value"), FLAGS, ids=[f"{flag[0].__name__}-{flag[1]}" for flag in FLAGS]
)
def test_flag_with_one_dash_and_with_two(script: ModuleType, name: str, default: Any, text: str, value: Any) -> None:
    assert parse(script)[name] == default
    for dashes in ("-", "--"):
        assert parse(script, f"{dashes}{name}", text)[name] == value


@pytest.mark.parametrize("dashes", ["-", "--"])
@pytest.mark.parametrize("name", ["use_amp", "use_wandb"])
def test_switch_is_bare_or_followed_by_true_or_false(name: str, dashes: str) -> None:
    flag = f"{dashes}{name}"
    assert parse(train_bdd100k)[name] is False
    assert parse(train_bdd100k, flag)[name] is True
    assert parse(train_bdd100k, flag, "--grad_acc_steps", "8")[name] is True
    assert parse(train_bdd100k, flag, "True")[name] is True
    assert parse(train_bdd100k, flag, "False")[name] is False


@pytest.mark.parametrize(("script", "name"), [(train_bdd100k, "distributed"), (infer_bdd100k, "visualize")])
def test_bare_flags(script: ModuleType, name: str) -> None:
    assert parse(script)[name] is False
    assert all(parse(script, f"{dashes}{name}")[name] is True for dashes in ("-", "--"))


def test_short_flag_and_abbreviations() -> None:
    assert parse(train_bdd100k, "-i", "x", "-init_method", "env://")["tr_npy_path"] == Path("x")
    with pytest.raises(SystemExit):  # guessing at an abbreviation would break when a flag is added
        parse(train_bdd100k, "--num_epoch", "1")


def test_preprocessing_command_of_the_specification() -> None:
    args = parse_command(pre_bdd100k, PREPROCESSING)
    assert (args["image_size"], args["splits"]) == (1024, ["train", "val"])
    assert (args["bdd100k_root"], args["output_path"]) == (Path("data/bdd100k"), Path("data/bdd100k_npy"))


def test_training_commands_of_the_specification() -> None:
    single = parse_command(train_bdd100k, SINGLE_GPU)
    assert single["tr_npy_path"] == Path("data/bdd100k_npy/train")
    assert single["use_amp"] is True and single["device"] == "cuda:0" and not single["distributed"]

    # torch.distributed.launch puts the rank before the script's own arguments, spelled one way or the other.
    for spelling in ("--local-rank=0", "--local_rank=0"):
        several = parse_command(train_bdd100k, FOUR_GPUS, spelling)
        assert several["distributed"] is True and several["world_size"] == 4
    different = {key for key in single if single[key] != several[key]}
    assert different == {"device", "distributed", "world_size", "local_rank"}


def test_inference_command_of_the_specification() -> None:
    args = parse_command(infer_bdd100k, INFERENCE)
    launched = [parse_command(infer_bdd100k, INFERENCE, spelled) for spelled in ("--local-rank=1", "--local_rank=1")]
    assert [{**parsed, "local_rank": None} for parsed in launched] == [args, args]
    assert args["visualize"] is True and args["batch_size"] == 1
    assert args["model_checkpoint"].name == "medsam_model_best.pth"


@pytest.mark.parametrize(
    ("script", "flag", "value", "complaint"),
    [
        (train_bdd100k, "-batch_size", "0", "at least 1, got 0"),
        (train_bdd100k, "-batch_size", "1.5", "expected a number, got '1.5'"),
        (train_bdd100k, "-lr", "-1", "above 0, got -1"),
        (train_bdd100k, "-lr", "nan", "above 0, got nan"),
        (train_bdd100k, "-weight_decay", "inf", "at least 0, got inf"),
        (train_bdd100k, "--seed", str(2**70), f"at most {2**63 - 1}, got {2**70}"),
        (train_bdd100k, "--bbox_shift", str(10**20), f"at most {2**31 - 1}, got {10**20}"),
        (train_bdd100k, "-model_type", "vit_x", "'vit_x'"),
        (train_bdd100k, "-use_amp", "maybe", "True or False, got 'maybe'"),
        (train_bdd100k, "-no_such_flag", "1", "-no_such_flag"),
        (infer_bdd100k, "--batch_size", "0", "at least 1, got 0"),
        (pre_bdd100k, "--image_size", "100", "multiple of 16"),
        (pre_bdd100k, "--image_size", "576x", "a side such as 1024, or HxW such as 576x1024, got '576x'"),
        (pre_bdd100k, "--image_size", "x576", "a side such as 1024, or HxW such as 576x1024, got 'x576'"),
        (pre_bdd100k, "--image_size", "16x32x3", "a side such as 1024, or HxW such as 576x1024, got '16x32x3'"),
        (pre_bdd100k, "--image_size", "ax32", "expected a number, got 'a'"),
        (pre_bdd100k, "--image_size", "100x200", "multiple of 16, the encoder's patch size (such as 96 or 112), got"),
        (pre_bdd100k, "--image_size", "5000x16", "at most 4096, got 5000"),
        (pre_bdd100k, "--image_size", "0x16", "at least 1, got 0"),
        (pre_bdd100k, "--image_size", "16x-16", "at least 1, got -16"),
    ],
)
def test_bad_value_is_told_in_one_line(
    script: ModuleType, flag: str, value: str, complaint: str, error_of: Callable[..., str]
) -> None:
    line = error_of(script, *REQUIRED[script], flag, value)
    assert flag in line and complaint in line


@pytest.mark.parametrize(
    ("text", "value"),
    [("576x1024", "576x1024"), ("1024X576", "1024x576"), ("512x512", 512), ("512", 512), ("0016x32", "16x32")],
)
def test_a_frame_has_one_form(text: str, value: int | str) -> None:
    args = pre_bdd100k.get_args_parser().parse_args(["--bdd100k_root", "x", "--image_size", text])
    assert args.image_size == value and type(args.image_size) is type(value)


# Prints the exit status of a command line, and what it has imported of these.
IMPORTS = """
import runpy, sys
sys.argv[:] = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("\\nended", end.code, *(name for name in ("torch", "monai", "matplotlib") if name in sys.modules))
"""


@pytest.mark.parametrize(
    "module",
    [
        "pre_bdd100k",
        "train_bdd100k",
        "infer_bdd100k",
        "utils.ckpt_convert",
        "utils.export",
        "utils.compare",
        "utils.scenes",
    ],
)
@pytest.mark.parametrize(("flag", "status"), [("--help", 0), ("--no_such_flag", 2)])
def test_a_command_line_is_answered_before_what_takes_seconds_to_import(module: str, flag: str, status: int) -> None:
    command = [sys.executable, "-c", IMPORTS, module, flag]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == f"ended {status}"


def test_the_help_of_training_has_its_groups_and_one_spelling_of_each_flag() -> None:
    parser = train_bdd100k.get_args_parser()
    text = parser.format_help()
    titles = ["data", "model", "optimisation", "memory", "distributed", "logging"]
    assert [line[:-1] for line in text.splitlines() if line[:-1] in titles] == titles
    for action in parser._actions:
        if action.help != argparse.SUPPRESS and action.dest != "help":
            spelled = re.findall(rf"^  (?:-i, )?(-+{action.dest})\b", text, re.MULTILINE)
            assert spelled == [f"--{action.dest}"], action.dest


@pytest.mark.parametrize("script", [train_bdd100k, infer_bdd100k])
def test_where_a_cache_may_be(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    parser = script.get_args_parser()
    for word, expected in {"OFF": "off", "auto": "auto", "./True": "./True", "some/folder": "some/folder"}.items():
        assert parser.parse_args(["--cache_embeddings", word]).cache_embeddings == expected
    for word in ("True", "false", "none", "on", "1", ""):
        with pytest.raises(SystemExit):
            parser.parse_args(["--cache_embeddings", word])
        assert f"expected auto, off or a folder, got '{word}'" in capsys.readouterr().err


def test_which_flags_were_given() -> None:
    args = train_bdd100k.get_args_parser().parse_args(["-i", "x", "-lr", "1", "-use_amp", "False", "--patience=3"])
    assert args.given == {"tr_npy_path", "lr", "use_amp", "patience"}
    assert args.num_epochs == 100 and "given" not in vars(args)
    default = train_bdd100k.get_args_parser().parse_args(["-num_epochs", "100"])
    assert default.given == {"num_epochs"}  # though it is the default


@pytest.mark.slow
def test_inference_needs_no_monai() -> None:
    code = "import sys, infer_bdd100k; print('monai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n"


def test_the_choices_are_those_that_there_are() -> None:
    assert set(choices.MODEL_TYPES) == set(CONFIGS)
    assert set(choices.PROMPT_MODES) == set(SEGMENTERS)
    assert set(choices.CACHE_DTYPES) == set(DTYPES)


def exit_of(main: Callable[[], int | None], capfd: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """Exit status and stderr of `cli.run(main)`."""
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    return end.value.code, capfd.readouterr().err


def test_run_gives_the_status_of_main(capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_of(lambda: None, capfd) == (0, "")
    assert exit_of(lambda: 1, capfd) == (1, "")


def test_run_prints_a_user_error_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise UserError("a.npy: no such file; make it")

    assert exit_of(main, capfd) == (1, "error: a.npy: no such file; make it\n")


@pytest.mark.parametrize(
    ("becomes", "what"),
    [("gone", "no such file"), ("a loop", "cannot be read (Too many levels of symbolic links)")],
)
def test_run_prints_a_loader_workers_error_in_one_line(
    npy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], becomes: str, what: str
) -> None:
    folder = shutil.copytree(npy / "train", tmp_path / "train")
    dataset = BoxPromptDataset(NpyFolder(folder), classes_per_image=1, bbox_shift=0, seed=0)
    victim = sorted(folder.glob("imgs/*.npy"))[0]
    victim.unlink()  # after the check, as when a disk goes away
    if becomes == "a loop":
        victim.symlink_to(victim)

    def main() -> None:
        for _ in Loader(dataset, num_workers=1):
            pass

    status, said = exit_of(main, capfd)
    for worker in multiprocessing.active_children():  # as the script's end does, for which they would wait here
        worker.kill()
    assert status == 1
    assert said.startswith(f"error: {victim}: {what}") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("interrupt", "said"),
    [
        (KeyboardInterrupt(), "interrupted: run the same command again\n"),
        (KeyboardInterrupt("give --resume x to go on"), "interrupted: give --resume x to go on\n"),
        (Interrupted("give --resume x to go on", signal.SIGINT), "interrupted: give --resume x to go on\n"),
    ],
)
def test_run_says_what_to_do_after_ctrl_c(
    interrupt: KeyboardInterrupt, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise interrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        assert exit_of(main, capfd) == (130, said)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # a second one meets a process that ends
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("environment", "error", "waits"),
    [
        ({}, UserError, 0),
        ({"RANK": "0", "LOCAL_RANK": "0"}, UserError, 0),
        ({"RANK": "", "LOCAL_RANK": "1"}, UserError, 0),
        ({"RANK": "0", "LOCAL_RANK": ""}, UserError, 0),
        ({"RANK": "3", "LOCAL_RANK": "1"}, UserError, 1),  # the first of the machine may have met it too
        ({"RANK": "0", "LOCAL_RANK": "0"}, LostPeerError, 1),  # the launcher knows about the other one, or nobody does
        ({"RANK": "1", "LOCAL_RANK": "1"}, LostPeerError, 2),
    ],
)
def test_of_several_processes_the_one_speaks_that_knows_most(
    environment: dict[str, str], error: type[UserError], waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)

    def fail() -> None:
        raise error("gone")

    with pytest.raises(SystemExit):
        cli.run(fail)
    assert len(slept) == waits


def test_run_keeps_the_traceback_of_a_bug() -> None:
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(main)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOSPC])
def test_a_path_that_the_system_refuses_is_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def refused() -> None:
        raise OSError(number, os.strerror(number), "data/x")

    with pytest.raises(SystemExit) as end:
        cli.run(refused)
    assert end.value.code == 1 and capsys.readouterr().err == f"error: data/x: cannot be used ({os.strerror(number)})\n"


@pytest.mark.parametrize("error", [OSError("no path"), FileNotFoundError(errno.ENOENT, "ours to look for", "x")])
def test_other_errors_of_the_system_are_bugs(error: OSError) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(OSError, match=r"no path|ours to look for"):
        cli.run(fail)


def test_a_reader_that_ends_is_no_success() -> None:
    code = "from utils.runtime import cli\ncli.run(lambda: [print('x' * 70000, flush=True) for _ in range(9)] and 0)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == "stopped: the program that read the output has ended\n"
    assert process.wait() == 128 + signal.SIGPIPE


def test_a_module_is_named_by_its_command() -> None:
    done = subprocess.run([sys.executable, "-m", "utils.compare", "--no_such"], capture_output=True, text=True)
    assert (
        done.stderr.splitlines()[-1].startswith("python -m utils.compare: error:")
        or "python -m utils.compare" in done.stderr
    )
