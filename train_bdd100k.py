"""Fine-tune SAM's mask decoder on BDD100K, with both encoders frozen.

One device:

    python train_bdd100k.py -i data/bdd100k_npy/train -model_type vit_b \\
        -checkpoint work_dir/SAM/sam_vit_b_01ec64.pth -batch_size 4 -num_epochs 100 -lr 5e-5 -use_amp \\
        --grad_acc_steps 4 --val_npy_path data/bdd100k_npy/val

Four cards (torchrun in place of "python -m torch.distributed.launch" works alike):

    python -m torch.distributed.launch --nproc_per_node=4 train_bdd100k.py -i data/bdd100k_npy/train -use_amp \\
        --world_size 4 --distributed

With batch size, precision and loader processes chosen for a kind of card; flags beside it win:

    python train_bdd100k.py ... --preset 3090

A run that was stopped:

    python train_bdd100k.py ... --resume work_dir/<task>-<YYYYMMDD-HHMM>

One that may be started again and again, and goes on where it was last saved:

    python train_bdd100k.py ... --save_every_steps 200 --resume auto
"""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path
from typing import Any

from utils.runtime import cli
from utils.runtime.choices import (
    AMP_DTYPES,
    AMP_HELP,
    AUGMENTATIONS,
    CACHE_DTYPES,
    MODEL_TYPES,
    PROMPT_MODES,
    SCHEDULES,
)

# What a resumed run must share with its beginning, by the names that the user knows.
KEPT_ON_RESUME = {
    "prompt_mode": "--prompt_mode",  # first: it decides the defaults of others
    "losses": "the loss",
    "model_type": "-model_type",
    "lr": "-lr",
    "weight_decay": "-weight_decay",
    "lr_scheduler": "--lr_scheduler",
    "warmup_epochs": "--warmup_epochs",
    "effective_batch_size": "the effective batch size (-batch_size x --grad_acc_steps x processes)",
    "classes_per_image": "--classes_per_image",
    "bbox_shift": "--bbox_shift",
    "augment": "--augment",
    "cache_views": "--cache_views",
    "seed": "--seed",
}

# Flags with which it is to be evaluated too, and the defaults that infer_bdd100k.py has for them.
OF_INFERENCE = {"amp_dtype": "auto", "cache_embeddings": "auto", "cache_dtype": "float16"}

MEMORY_ADVICE = (
    "lower -batch_size and raise --grad_acc_steps by the same factor, which changes nothing else; or add "
    "-use_amp, give a smaller --classes_per_image (box mode), or preprocess at a smaller --image_size"
)

# What a card has room and arithmetic for; without --preset, what the specification has. All make optimizer steps of 16
# images per process, so that a run means the same on each. With vit_b at 1024 a cached step has tensors of
# 3.1, 6.1 and 12.1 GiB in semantic mode and, with all 19 classes of an image, of 4.1, 8.3 and 16.5 GiB in box mode, by
# counting them.
PRESETS: dict[str | None, dict[str, Any]] = {
    None: {"batch_size": 4, "grad_acc_steps": 4, "use_amp": False, "amp_dtype": "auto", "num_workers": 4},
    "2080ti": {"batch_size": 4, "grad_acc_steps": 4, "use_amp": True, "amp_dtype": "fp16", "num_workers": 4},
    "3090": {"batch_size": 8, "grad_acc_steps": 2, "use_amp": True, "amp_dtype": "bf16", "num_workers": 8},
    "a100": {"batch_size": 16, "grad_acc_steps": 1, "use_amp": True, "amp_dtype": "bf16", "num_workers": 8},
    "cpu": {"batch_size": 2, "grad_acc_steps": 8, "use_amp": True, "amp_dtype": "auto", "num_workers": 1},
}

# A decoder that starts with new parts has more to learn than SAM's own.
MODE_DEFAULTS: dict[str, dict[str, Any]] = {
    "box": {"lr": 5e-5, "lr_scheduler": "constant", "warmup_epochs": 0, "augment": "none"},
    "semantic": {"lr": 2e-3, "lr_scheduler": "cosine", "warmup_epochs": 1, "augment": "full"},
}


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    flag = parser.add_flag
    flag("i", "tr_npy_path", type=Path, required=True, help="training split written by pre_bdd100k.py")
    flag("val_npy_path", type=Path, help="validation split: mIoU is measured on it, and the best model chosen by it")
    flag("val_every", type=cli.positive_int, default=1, help="epochs from one validation to the next")
    flag(
        "patience",
        type=cli.positive_int,
        help="stop when val mIoU has not improved for so many validations; the "
        "learning rate still follows the schedule of -num_epochs (default: off)",
    )
    flag("task_name", default="BDD100K-SAM-MaskDecoder", help="the run's folder is <work_dir>/<task_name>-<time>")
    flag("work_dir", type=Path, default=Path("work_dir"), help="where runs are kept")
    flag(
        "prompt_mode",
        choices=PROMPT_MODES,
        default="box",
        help="box: a class's box in, its mask out. semantic: no box, one map of all classes",
    )
    flag("model_type", choices=MODEL_TYPES, default="vit_b", help="which SAM")
    flag("checkpoint", type=Path, default=Path("work_dir/SAM/sam_vit_b_01ec64.pth"), help="SAM checkpoint")
    parser.add_switch("verify_checkpoint", help="compare the SAM file with the hash in its name")
    flag(
        "resume",
        type=Path,
        help="a run's folder, or its medsam_model_latest.pth, to go on with; auto: the task's "
        "run in work_dir that was saved last, or a new one",
    )
    flag(
        "save_every_steps",
        type=cli.non_negative_int,
        default=0,
        help="optimizer steps of an epoch from one medsam_model_latest.pth to the next, 0 for one an epoch",
    )
    flag("keep_last", type=cli.non_negative_int, default=1, help="how many of those before the last are kept")
    flag("seed", type=cli.seed, default=2024, help="of everything that is random")
    parser.add_switch(
        "deterministic",
        help="CUDA kernels that give the same bits on each run of the same card and "
        "software, most of them slower; one that has no such form stops the run. Not run on a GPU yet; "
        "a CPU needs none of it",
    )
    flag("device", help="cpu, cuda or cuda:N (default: cuda where there is one)")

    # 修改点 3: 训练参数默认值适配 4x 2080Ti (11GB)
    flag(
        "preset",
        choices=[name for name in PRESETS if name],
        help=f"{', '.join(PRESETS[None])} for a kind of card; what is given beside it wins",
    )
    flag("batch_size", type=cli.positive_int, help=f"images per process and step {_by_preset('batch_size')}")
    flag("num_epochs", type=cli.positive_int, default=100, help="passes over the data")
    flag("lr", type=cli.positive_float, help=f"learning rate {_by_mode('lr')}")
    flag("weight_decay", type=cli.non_negative_float, default=0.01, help="of AdamW")
    flag("lr_scheduler", choices=SCHEDULES, help=f"learning rate over time {_by_mode('lr_scheduler')}")
    flag(
        "warmup_epochs",
        type=cli.non_negative_float,
        help=f"epochs of linear warm-up before it {_by_mode('warmup_epochs')}",
    )
    flag("clip_grad_norm", type=cli.non_negative_float, default=1.0, help="largest gradient norm, 0 for no limit")
    flag(
        "classes_per_image",
        type=cli.positive_int_or_all,
        default="all",
        help="classes of an image that a step trains on and that compete for its pixels: all, or so many random ones "
        "(box mode)",
    )
    flag(
        "bbox_shift",
        type=cli.non_negative_int,
        default=20,
        help="largest jitter of a box's sides, in pixels (box mode)",
    )
    flag(
        "augment",
        choices=list(AUGMENTATIONS),
        help="flip: mirrored half of the time; full: cropped, brighter or darker, of other contrast too "
        f"{_by_mode('augment')}",
    )
    flag(
        "cache_embeddings",
        default="auto",
        help="encode each image once and keep the features: in a folder; auto, beside the images if that spares work "
        "and the disk has room; or off",
    )
    flag("cache_dtype", choices=CACHE_DTYPES, default="float16", help="what cached features are stored in")
    flag(
        "cache_views",
        type=cli.positive_int,
        help="views of each image in the cache: itself, its mirror image, then random ones (default: "
        f"{', '.join(f'{name} {views}' for name, views in AUGMENTATIONS.items())})",
    )
    flag(
        "num_workers",
        type=cli.non_negative_int,
        help=f"loader processes per training process {_by_preset('num_workers')}",
    )

    # 修改点 4: 混合精度训练和梯度累积
    parser.add_switch("use_amp", default=None, help=f"mixed precision {_by_preset('use_amp')}")
    flag("amp_dtype", choices=AMP_DTYPES, help=f"{AMP_HELP} {_by_preset('amp_dtype')}")
    flag(
        "grad_acc_steps",
        type=cli.positive_int,
        help=f"steps whose gradients are added up {_by_preset('grad_acc_steps')}",
    )

    # 修改点 5: 分布式训练参数
    parser.add_switch("distributed", help="require a launcher (with one, it is used in any case)")
    flag("world_size", type=cli.positive_int, help="number of processes, checked against the launcher")
    flag("node_rank", type=cli.non_negative_int, help="rank of this machine, checked against the launcher")
    flag("init_method", default="env://", help="where the processes meet")
    # torch.distributed.launch passes it; the environment says the same.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)

    parser.add_switch("use_tensorboard", help="log to TensorBoard")
    parser.add_switch("use_wandb", help="log to Weights & Biases (WANDB_MODE=offline needs no account)")
    return parser


def apply_defaults(args: argparse.Namespace) -> None:
    """Fill in what the command line left open and the mode or the preset decides."""
    for name, value in {**MODE_DEFAULTS[args.prompt_mode], **PRESETS[args.preset]}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.cache_views = args.cache_views or AUGMENTATIONS[args.augment]


def _by_mode(name: str) -> str:
    return f"(default: {MODE_DEFAULTS['box'][name]}; in semantic mode {MODE_DEFAULTS['semantic'][name]})"


def _by_preset(name: str) -> str:
    return f"(default: {PRESETS[None][name]}, or as --preset has it)"


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and a mistyped flag are answered before imports that take seconds

import monai.losses  # noqa: F401  now, and not within the first step
import torch

from segment_anything.build_sam import file_digest
from utils.cache.writer import use_caches
from utils.data.datasets import EvaluationDataset, NpyFolder, TrainingDataset, training_dataset, validation_dataset
from utils.data.loaders import evaluation_loader, training_loader, usable_workers
from utils.evaluate.evaluate import evaluate
from utils.evaluate.metrics import mean_iou
from utils.model import checkpoint
from utils.model.checkpoint import ModelInfo
from utils.model.segmenter import SEGMENTERS, TRAIN_FLAGS, Segmenter, build_model
from utils.runtime import distributed
from utils.runtime.device import Precision, make_deterministic, resolve_precision, telling_out_of_memory
from utils.runtime.errors import UserError
from utils.train.logger import require_loggers
from utils.train.loop import settle_gradient_order, train_one_epoch
from utils.train.optim import build_optimizer, build_scheduler
from utils.train.run import (
    AUTO,
    FinishedError,
    Latest,
    Run,
    cache_to_use,
    find_latest,
    plateau,
    read_latest,
    require_room,
    require_same_cache,
    require_same_data,
)


def main(args: argparse.Namespace) -> None:
    apply_defaults(args)
    if args.deterministic:
        make_deterministic()
    # The device comes first: a card that is not there should be told in one line, not by NCCL.
    precision = resolve_precision(
        args.device,
        local_rank=distributed.local_rank(),
        local_world_size=distributed.local_world_size(),
        use_amp=args.use_amp,
        amp_dtype=args.amp_dtype,
    )
    distributed.setup(
        requested=args.distributed,
        world_size=args.world_size,
        node_rank=args.node_rank,
        init_method=args.init_method,
        device=precision.device,
    )
    with distributed.telling_lost_peers(), telling_out_of_memory(MEMORY_ADVICE):
        train(args, precision)
    distributed.cleanup()


def train(args: argparse.Namespace, precision: Precision) -> None:
    if args.patience and not args.val_npy_path:
        raise UserError("--patience counts validations: give --val_npy_path, or leave out --patience")
    torch.manual_seed(args.seed)
    args.num_workers = usable_workers(args.num_workers)
    effective_batch_size = args.batch_size * args.grad_acc_steps * distributed.world_size()
    losses = " + ".join(SEGMENTERS[args.prompt_mode].LOSSES)
    config = {**vars(args), "effective_batch_size": effective_batch_size, "losses": losses}
    try:
        # First, as it is the smallest file. Other machines need not have it.
        latest = distributed.on_main(lambda: latest_of(args, config))
    except FinishedError as finished:
        if args.resume != AUTO:
            raise
        # Who starts a job again without knowing how far it came is told, and not that it failed.
        distributed.say(str(finished))
        return
    if latest is None:  # one that is resumed must not end for want of them
        distributed.on_main(lambda: require_loggers(tensorboard=args.use_tensorboard, wandb=args.use_wandb))
    dataset, val_dataset = load_data(args)
    segmenter, info = load_model(args, dataset.source, precision, latest)
    data = {"train_data": dataset.source.digest, "val_data": val_dataset.source.digest if val_dataset else None}
    require_same_data(data, info, latest)
    config |= data
    distributed.on_main(lambda: require_room(args.work_dir, latest, segmenter, args.keep_last))
    model = distributed.wrap(segmenter, precision.device)
    loading: dict[str, Any] = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    passes = {dataset: args.num_epochs} | (
        {val_dataset: math.ceil(args.num_epochs / args.val_every)} if val_dataset else {}
    )
    where = cache_to_use(args.cache_embeddings, latest)
    stored_in = use_caches(passes, segmenter, info, precision, where=where, dtype=args.cache_dtype, **loading)
    require_same_cache(stored_in, latest)
    config["train_cache"] = stored_in
    loader = training_loader(
        dataset, **loading, seed=args.seed, grad_acc_steps=args.grad_acc_steps, precision=precision
    )
    val_loader = evaluation_loader(val_dataset, **loading, precision=precision) if val_dataset else None
    steps_per_epoch = math.ceil(len(loader) / args.grad_acc_steps)
    settle_gradient_order(model, dataset, precision)
    stepping = build_stepping(args, segmenter, precision, steps_per_epoch)
    run = Run(
        work_dir=args.work_dir,
        task_name=args.task_name,
        latest=latest,
        model=segmenter,
        info=info,
        stateful=stepping,
        config=config,
        choose_by_miou=val_loader is not None,
        save_every_steps=args.save_every_steps,
        keep_last=args.keep_last,
        tensorboard=args.use_tensorboard,
        wandb=args.use_wandb,
    )
    if distributed.is_main():
        announce(args, segmenter, precision, run, num_images=len(dataset), steps_per_epoch=steps_per_epoch)

    with run.stop.deferred(), run.saving_on_failure():
        for epoch in range(len(run.history), args.num_epochs):
            progress = run.progress  # of a run that was stopped inside an epoch, not at its beginning
            dataset.set_epoch(epoch)
            loader.batch_sampler.set_epoch(  # type: ignore[union-attr]
                epoch, first_step=progress.steps * args.grad_acc_steps
            )
            figures = train_one_epoch(
                model,
                loader,
                **stepping,
                precision=precision,
                grad_acc_steps=args.grad_acc_steps,
                clip_grad_norm=args.clip_grad_norm,
                progress=progress,
                watch=run,
            )
            seconds = progress.seconds
            record = {"epoch": epoch, "train_loss": figures.pop("loss"), **figures}
            # Not its truth: a process without a batch of its own has to take part as well.
            if val_loader is not None and ((epoch + 1) % args.val_every == 0 or epoch + 1 == args.num_epochs):
                with run.interruptible():
                    record["val_miou"] = mean_iou(evaluate(segmenter, val_loader, precision).matrix)
            run.finish_epoch({**record, "seconds": seconds, "images_per_second": len(dataset) / seconds})
            # One process decides for all: mIoUs that rounding tells apart might differ between machines.
            if distributed.on_main(lambda: plateau(run.history, args.patience)):
                break
    run.finish()
    distributed.say(f"\nNext:\n  {next_command(args, run)}")


def load_data(args: argparse.Namespace) -> tuple[TrainingDataset, EvaluationDataset | None]:
    source = NpyFolder(args.tr_npy_path)
    dataset = training_dataset(
        source,
        args.prompt_mode,
        classes_per_image=None if args.classes_per_image == "all" else args.classes_per_image,
        bbox_shift=args.bbox_shift,
        augment=args.augment,
        num_views=args.cache_views,
        seed=args.seed,
    )
    return dataset, args.val_npy_path and validation_dataset(args.val_npy_path, source, args.prompt_mode)


def load_model(
    args: argparse.Namespace, source: NpyFolder, precision: Precision, latest: Latest | None
) -> tuple[Segmenter, ModelInfo]:
    segmenter = build_model(
        args.model_type,
        args.checkpoint,
        image_size=source.image_size,
        prompt_mode=args.prompt_mode,
        check_hash=args.verify_checkpoint,
        flags=TRAIN_FLAGS,
        decoder=latest.state["model"] if latest else None,
    ).to(precision.device)
    segmenter.balance_classes(source.class_pixels())
    digest = file_digest(args.checkpoint)
    return segmenter, ModelInfo(args.model_type, source.image_size, source.resize_mode, digest, args.prompt_mode)


def next_command(args: argparse.Namespace, run: Run) -> str:
    """The command that evaluates the run's best model; it finds the run's cache where the splits lie side by side."""
    paths = (args.val_npy_path or args.tr_npy_path.parent / "val", run.folder / checkpoint.BEST, args.checkpoint)
    data, best, sam = (shlex.quote(str(path)) for path in paths)
    lines = [
        f"python infer_bdd100k.py --val_npy_path {data}",
        f"--model_checkpoint {best}",
        f"--sam_checkpoint {sam} --model_type {args.model_type} --visualize{' -use_amp' if args.use_amp else ''}",
    ]
    given = {name: getattr(args, name) for name, default in OF_INFERENCE.items() if getattr(args, name) != default}
    if given:
        lines.append(" ".join(f"--{name} {shlex.quote(value)}" for name, value in given.items()))
    return " \\\n      ".join(lines)


def latest_of(args: argparse.Namespace, config: dict[str, Any]) -> Latest | None:
    """What `--resume` names, checked against the flags; None without it, and where `auto` finds nothing."""
    unused = ("classes_per_image", "bbox_shift") if args.prompt_mode == "semantic" else ()
    path = args.resume and find_latest(args.resume, args.work_dir, args.task_name)
    if not path:
        return None
    return read_latest(
        path,
        config=config,
        kept={key: name for key, name in KEPT_ON_RESUME.items() if key not in unused},
        num_epochs=args.num_epochs,
        choose_by_miou=args.val_npy_path is not None,
        patience=args.patience,
    )


def build_stepping(
    args: argparse.Namespace, segmenter: Segmenter, precision: Precision, steps_per_epoch: int
) -> dict[str, Any]:
    """What moves the weights, by the names that `train_one_epoch` and `latest` know it by."""
    optimizer = build_optimizer(segmenter, lr=args.lr, weight_decay=args.weight_decay)
    scheduler = build_scheduler(
        optimizer,
        args.lr_scheduler,
        total_steps=steps_per_epoch * args.num_epochs,
        warmup_steps=round(steps_per_epoch * args.warmup_epochs),
    )
    return {"optimizer": optimizer, "scheduler": scheduler, "scaler": precision.grad_scaler()}


def announce(
    args: argparse.Namespace,
    model: Segmenter,
    precision: Precision,
    run: Run,
    *,
    num_images: int,
    steps_per_epoch: int,
) -> None:
    """Say what is about to happen, before it takes hours."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    dtype = str(precision.amp_dtype or torch.float32).removeprefix("torch.")
    if args.use_amp and precision.amp_dtype is None:
        dtype += ": this CPU has no bf16"
    print(f"{args.model_type} at {run.info.image_size}: {trained:,} parameters trained, {frozen:,} frozen")
    print(
        f"{num_images} images, {steps_per_epoch} optimizer steps an epoch, "
        f"effective batch size {run.config['effective_batch_size']}"
    )
    print(f"{distributed.world_size()} process(es) on {precision.device.type}, {dtype}")
    position = run.progress
    going_on = f", going on at epoch {position.epoch}" if position.epoch or position.steps else ""
    going_on += f", after {position.steps} steps" if position.steps else ""
    print(f"run folder: {run.folder}{going_on}", flush=True)


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
