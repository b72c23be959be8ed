"""Fine-tune SAM's mask decoder on BDD100K, with both encoders frozen.

One device:

    python train_bdd100k.py -i data/bdd100k_npy/train -model_type vit_b \\
        -checkpoint work_dir/SAM/sam_vit_b_01ec64.pth -batch_size 4 -num_epochs 100 -lr 5e-5 -use_amp \\
        --grad_acc_steps 4 --val_npy_path data/bdd100k_npy/val

Four GPUs (torchrun and "python -m torch.distributed.launch" both work):

    torchrun --nproc_per_node=4 train_bdd100k.py -i data/bdd100k_npy/train -use_amp

Resume a run. Flags that are not given come from the run:

    python train_bdd100k.py --resume work_dir/<task>-<YYYYMMDD-HHMM>

A job that may be restarted at any time resumes the task's last run, or starts one:

    python train_bdd100k.py -i data/bdd100k_npy/train ... --save_every_steps 200 --resume auto

Every long flag takes one dash or two.
"""

from __future__ import annotations

import argparse
import math
import shlex
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from utils.runtime import cli
from utils.runtime.choices import (
    AMP_DTYPES,
    AMP_HELP,
    AUGMENTATIONS,
    CACHE_DEVICES,
    CACHE_DTYPES,
    MODEL_TYPES,
    PROMPT_MODES,
    SCHEDULES,
)
from utils.runtime.errors import UserError, printable

# Flags of one start, which a resumed run does not take from its last one.
OF_ONE_START = ("resume", "distributed", "world_size", "node_rank", "init_method", "local_rank")

# Flags that the evaluation needs too, with the defaults of infer_bdd100k.py.
OF_INFERENCE = {"amp_dtype": "auto", "cache_embeddings": "auto", "cache_dtype": "float16"}

MEMORY_ADVICE = (
    "lower -batch_size and raise --grad_acc_steps by the same factor, which changes nothing else; or add "
    "-use_amp, --cache_device off or a smaller --classes_per_image (box mode), or preprocess at a smaller --image_size"
)

# What fits a GPU's memory and arithmetic; without --preset, the specification's values. All have optimizer steps of 16
# images per process, so that a run means the same on each. With vit_b at 1024 a cached step has tensors of
# 3.1, 6.1 and 12.1 GiB in semantic mode and, with all 19 classes of an image, of 4.1, 8.3 and 16.5 GiB in box mode
# (counted).
PRESETS: dict[str | None, dict[str, Any]] = {
    None: {"batch_size": 4, "grad_acc_steps": 4, "use_amp": False, "amp_dtype": "auto", "num_workers": 4},
    "2080ti": {"batch_size": 4, "grad_acc_steps": 4, "use_amp": True, "amp_dtype": "fp16", "num_workers": 4},
    "3090": {"batch_size": 8, "grad_acc_steps": 2, "use_amp": True, "amp_dtype": "bf16", "num_workers": 8},
    "a100": {"batch_size": 16, "grad_acc_steps": 1, "use_amp": True, "amp_dtype": "bf16", "num_workers": 8},
    "cpu": {"batch_size": 2, "grad_acc_steps": 8, "use_amp": True, "amp_dtype": "auto", "num_workers": 1},
}

# A decoder with new parts has more to learn than SAM's own.
MODE_DEFAULTS: dict[str, dict[str, Any]] = {
    "box": {"lr": 5e-5, "lr_scheduler": "constant", "warmup_epochs": 0, "augment": "none"},
    "semantic": {"lr": 2e-3, "lr_scheduler": "cosine", "warmup_epochs": 1, "augment": "full"},
}


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, usage="%(prog)s -i PATH [flags] | --resume RUN [flags]")
    flag, switch = parser.add_flag, parser.add_switch

    parser.begin_group("data")
    flag("i", "tr_npy_path", type=Path, help="training split, written by pre_bdd100k.py; required for a new run")
    flag("val_npy_path", type=Path, help="validation split; its mIoU chooses the best model (default: none)")
    flag(
        "classes",
        nargs="+",
        action=cli.JoinedNames,
        metavar="CLASS",
        help="train and score these classes alone, such as road car traffic_light (default: all)",
    )
    flag(
        "other_classes",
        choices=["ignore", "other"],
        default="ignore",
        help="with --classes: ignore the pixels of the others, or train them as one class named other",
    )
    flag(
        "augment",
        choices=list(AUGMENTATIONS),
        help="flip: mirror images at random; full: also crop them, and change brightness and contrast (default: by "
        "mode)",
    )
    flag(
        "cache_embeddings",
        type=cli.cache_place,
        default="auto",
        metavar="WHERE",
        help="encode each image once and keep its features in this folder; auto: beside the images, if that saves work "
        "and the disk has room; off: no cache",
    )
    flag("cache_dtype", choices=CACHE_DTYPES, default="float16", help="type of cached features")
    flag(
        "cache_views",
        type=cli.positive_int,
        help="cached views of each image: itself, its mirror image, then random ones (default by --augment: "
        f"{', '.join(f'{name} {views}' for name, views in AUGMENTATIONS.items())})",
    )
    flag(
        "cache_device",
        choices=CACHE_DEVICES,
        default="auto",
        help="keep cached features, labels and pixels in memory, and load no batch from files: on the card, or the "
        "CPU's memory; auto: with a card, where they fit",
    )
    flag("num_workers", type=cli.non_negative_int, help="loader processes per training process (default: by preset)")

    parser.begin_group(
        "model",
        "Mode box: a class's box in, its mask out. Mode semantic: no prompt, one map of all classes. Defaults:\n"
        + "\n".join(
            f"{mode + ':':9} {', '.join(f'{name} {value}' for name, value in defaults.items())}"
            for mode, defaults in MODE_DEFAULTS.items()
        ),
    )
    flag("prompt_mode", choices=PROMPT_MODES, default="box", help="the mode, which has the defaults above")
    flag("model_type", choices=MODEL_TYPES, default="vit_b", help="SAM's image encoder")
    flag("checkpoint", type=Path, default=Path("work_dir/SAM/sam_vit_b_01ec64.pth"), help="SAM checkpoint")
    switch("verify_checkpoint", help="compare the SAM file with the hash in its name")
    flag(
        "init_decoder",
        type=Path,
        metavar="PATH",
        help="start from the decoder of this run or checkpoint, on the same SAM file; classes are matched by name "
        "(default: SAM's own decoder)",
    )

    # 修改点 3: 训练参数的默认值适配 4 张 2080 Ti（11 GB）
    parser.begin_group("optimisation")
    flag("num_epochs", type=cli.positive_int, default=100, help="passes over the data")
    flag("lr", type=cli.positive_float, help="learning rate (default: by mode)")
    flag("weight_decay", type=cli.non_negative_float, default=0.01, help="of AdamW")
    flag("lr_scheduler", choices=SCHEDULES, help="learning rate over time (default: by mode)")
    flag("warmup_epochs", type=cli.non_negative_float, help="epochs of linear warm-up (default: by mode)")
    flag("clip_grad_norm", type=cli.non_negative_float, default=1.0, help="largest gradient norm, 0 for no limit")
    flag(
        "classes_per_image",
        type=cli.positive_int_or_all,
        metavar="N",
        default="all",
        help="box mode: classes of an image in a step, which compete for its pixels: all, or N random ones",
    )
    flag("bbox_shift", type=cli.non_negative_int, default=20, help="box mode: largest jitter of a box's sides, pixels")
    flag("val_every", type=cli.positive_int, default=1, help="epochs from one validation to the next")
    flag(
        "patience",
        type=cli.non_negative_int,
        help="stop after N validations without a better mIoU, 0 for no limit; the learning rate follows -num_epochs "
        "(default: no limit)",
    )
    flag("seed", type=cli.seed, default=2024, help="seed of everything random")
    switch(
        "deterministic",
        help="CUDA kernels that repeat their results bit for bit; most are slower. The CPU needs none of it",
    )

    # 修改点 4: 混合精度训练和梯度累积的参数
    parser.begin_group(
        "memory",
        "Presets for a kind of GPU; flags beside --preset win:\n"
        + "\n".join(
            f"{(name or 'none') + ':':9} {', '.join(f'{key} {value}' for key, value in preset.items())}"
            for name, preset in PRESETS.items()
        ),
    )
    flag("preset", choices=[name for name in PRESETS if name], help="the preset (default: none)")
    flag("batch_size", type=cli.positive_int, help="images per process and batch (default: by preset)")
    flag("grad_acc_steps", type=cli.positive_int, help="batches per optimizer step (default: by preset)")
    switch("use_amp", default=None, help="mixed precision (default: by preset)")
    flag("amp_dtype", choices=AMP_DTYPES, help=f"{AMP_HELP} (default: by preset)")

    flag(
        "step_mode",
        choices=["auto", "eager", "captured", "compiled"],
        default="auto",
        help="how a step runs. eager: kernel by kernel; captured: as one CUDA graph; compiled: by torch.compile, then "
        "captured. auto: captured on a GPU without a launcher, else eager",
    )

    # 修改点 5: 分布式训练参数
    parser.begin_group("distributed", "A launcher (torchrun) is detected; it needs none of these flags.")
    flag("device", help="cpu, cuda or cuda:N (default: cuda if available)")
    switch("distributed", help="fail without a launcher")
    flag("world_size", type=cli.positive_int, help="number of processes, checked against the launcher")
    flag("node_rank", type=cli.non_negative_int, help="rank of this machine, checked against the launcher")
    flag("init_method", metavar="URL", default="env://", help="where the processes meet")
    # torch.distributed.launch passes it; the environment says the same.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)

    parser.begin_group("logging")
    flag("task_name", metavar="NAME", default="BDD100K-SAM-MaskDecoder", help="the run's folder is NAME-<time>")
    flag("work_dir", type=Path, default=Path("work_dir"), help="folder of the runs")
    flag(
        "resume",
        type=Path,
        metavar="RUN",
        help="resume this run: its folder, or a medsam_model_latest.pth; auto: the task's run in --work_dir that was "
        "saved last, or a new run",
    )
    flag(
        "save_every_steps",
        type=cli.non_negative_int,
        default=0,
        help="optimizer steps from one medsam_model_latest.pth to the next, 0 for one an epoch",
    )
    flag("keep_last", type=cli.non_negative_int, default=1, help="earlier medsam_model_latest files to keep")
    switch("use_tensorboard", help="log to TensorBoard")
    switch("use_wandb", help="log to Weights & Biases (WANDB_MODE=offline needs no account)")
    return parser


def apply_defaults(args: cli.Flags, recorded: Mapping[str, Any]) -> None:
    """Fill in the flags that were not given: by a given preset, the resumed run, the mode, and the defaults.

    Args:
        recorded: the flags of the run that is resumed.
    """
    recorded = {name: value for name, value in recorded.items() if name not in OF_ONE_START}
    preset = PRESETS[args.preset] if args.preset else {}  # one that was given here
    vars(args).update({name: value for name, value in {**recorded, **preset}.items() if name not in args.given})
    for name, value in {**MODE_DEFAULTS[args.prompt_mode], **PRESETS[args.preset]}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.cache_views = args.cache_views or AUGMENTATIONS[args.augment]


if __name__ == "__main__":
    # Before imports that take seconds: --help, and what is wrong with the flags alone.
    if not {"tr_npy_path", "resume"} & (_parser := get_args_parser()).parse_args().given:
        _parser.error("give -i, the training split that pre_bdd100k.py wrote, or --resume, the run to resume")

import torch
from torch import nn

from segment_anything.build_sam import file_digest
from utils.cache.resident import ResidentLoader, require_possible, resident_loader
from utils.cache.writer import use_caches
from utils.data.datasets import (
    FILLER,
    EvaluationDataset,
    NpyFolder,
    TrainingDataset,
    collate_training,
    training_dataset,
    validation_dataset,
)
from utils.data.loaders import Loader, evaluation_loader, training_loader, usable_workers
from utils.evaluate.evaluate import evaluate
from utils.evaluate.metrics import iou_per_class, mean_iou
from utils.model import checkpoint
from utils.model.checkpoint import ModelInfo
from utils.model.segmenter import SEGMENTERS, TRAIN_FLAGS, Segmenter, build_model
from utils.runtime import distributed
from utils.runtime.device import Precision, make_deterministic, resolve_precision, telling_out_of_memory
from utils.train.captured import CapturedSteps
from utils.train.logger import CLASS_IOU, Config, Record, require_loggers
from utils.train.loop import train_one_epoch
from utils.train.optim import TrainState, build_optimizer, build_scheduler
from utils.train.resume import AUTO, ResumeState, find_resume
from utils.train.run import Run, RunSettings, require_room
from utils.train.samples import ValidationSamples, save_training_sheet
from utils.train.step import EagerSteps, Steps, settle_gradient_order


def main(args: cli.Flags) -> None:
    ranks = {"local_rank": distributed.local_rank(), "local_world_size": distributed.local_world_size()}
    # Before the group: a missing GPU is then one line of ours, not NCCL's.
    device = resolve_precision(args.device, **ranks, use_amp=False, amp_dtype="auto").device
    distributed.setup(
        requested=args.distributed,
        world_size=args.world_size,
        node_rank=args.node_rank,
        init_method=args.init_method,
        device=device,
    )
    with distributed.telling_lost_peers(), telling_out_of_memory(MEMORY_ADVICE):
        # One process looks for all: other machines need not have the run, and NFS may show them an old state.
        resume = distributed.on_main(partial(find_resume, args.resume, args.work_dir, args.task_name))
        recorded = get_args_parser().read_back(resume.config, resume.path) if resume else {}
        if distributed.world_size() > 1:
            recorded.pop("device", None)  # the processes have met on another one
        apply_defaults(args, recorded)
        if args.tr_npy_path is None:
            raise UserError("--resume auto finds no run of this task; give -i, the training split, to start one")
        if args.patience and not args.val_npy_path:
            raise UserError("--patience counts validations: give --val_npy_path, or leave out --patience")
        if args.other_classes == "other" and not args.classes:
            raise UserError("--other_classes other makes one class of those that --classes leaves out: give --classes")
        if args.deterministic:
            make_deterministic()
        precision = resolve_precision(args.device, **ranks, use_amp=args.use_amp, amp_dtype=args.amp_dtype)
        require_possible(args.cache_device, args.cache_embeddings, precision.device)
        require_step_mode(args, precision.device)
        train(args, precision, resume)
    distributed.cleanup()


def train(args: cli.Flags, precision: Precision, resume: ResumeState | None) -> None:
    torch.manual_seed(args.seed)
    config = configuration(args)  # before this machine's limits: the run may be resumed on another one
    args.num_workers = usable_workers(args.num_workers)
    if resume:
        resume.require_same_flags(config)
        if finished := resume.finished(args.num_epochs, args.patience):
            if args.resume != AUTO:
                raise UserError(finished)
            distributed.say(finished)  # a job that is restarted again and again has not failed
            return
    else:
        distributed.on_main(partial(require_loggers, tensorboard=args.use_tensorboard, wandb=args.use_wandb))

    dataset, val_dataset = load_data(args)
    segmenter, info = load_model(args, dataset.source, precision, resume)
    data = {"train_data": dataset.source.digest, "val_data": val_dataset.source.digest if val_dataset else None}
    if resume:
        resume.require_same_data(data, info, dataset.source.classes)
    settings = run_settings(args)
    distributed.on_main(partial(require_room, settings, resume, segmenter))
    model = distributed.wrap(segmenter, precision.device)
    stored_in = prepare_cache(args, segmenter, info, precision, dataset, val_dataset, resume)
    config |= {**data, "train_cache": stored_in}

    loader, val_loader = build_loaders(args, dataset, val_dataset, precision)
    state = build_state(args, segmenter, precision, len(loader))
    if model is not segmenter:
        settle_gradient_order(model, collate_training([dataset[FILLER]]), precision)
    run = Run(settings, segmenter, info, state, config, resume)
    steps = build_steps(args, model, segmenter, state, precision)
    announce(args, precision, run, len(dataset), len(loader))
    distributed.on_main(partial(save_training_sheet, run.folder / "train_batch.jpg", dataset))
    samples = ValidationSamples(val_dataset) if val_dataset else None

    with run.training():
        for epoch in run.epochs():
            progress = run.progress  # of a run that stopped within an epoch, not at its beginning
            dataset.set_epoch(epoch)
            loader.batch_sampler.set_epoch(  # type: ignore[union-attr]
                epoch, first_step=progress.steps * args.grad_acc_steps
            )
            figures = train_one_epoch(steps, loader, grad_acc_steps=args.grad_acc_steps, progress=progress, watch=run)
            seconds = progress.seconds
            record = {"epoch": epoch, "train_loss": figures.pop("loss"), **figures}
            # Not the loader's truth: a process without a batch of its own takes part too.
            if val_loader is not None and samples is not None and run.validates(epoch):
                with run.interruptible():
                    record |= validate(segmenter, val_loader, precision)
                    distributed.on_main(partial(samples.update, segmenter, precision))
            record |= {"seconds": seconds, "images_per_second": len(dataset) / seconds}
            run.finish_epoch(record, samples.latest if samples and run.validates(epoch) else ())
    run.finish()
    distributed.say(f"\nNext:\n  {next_command(args, run)}")


def validate(segmenter: Segmenter, loader: Loader, precision: Precision) -> Record:
    """An epoch's figures of the validation split: "val_miou", the IoU of each class, and "val_seconds"."""
    started = time.monotonic()
    matrix = evaluate(segmenter, loader, precision).matrix
    ious = {f"{CLASS_IOU}{name}": iou for name, iou in zip(segmenter.classes.names, iou_per_class(matrix).tolist())}
    return {"val_miou": mean_iou(matrix), **ious, "val_seconds": time.monotonic() - started}


def configuration(args: cli.Flags) -> Config:
    """The flags and what follows from them, as plain values: checkpoints load with weights_only, which has no Path."""
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {
        **flags,
        "effective_batch_size": args.batch_size * args.grad_acc_steps * distributed.world_size(),
        "losses": " + ".join(SEGMENTERS[args.prompt_mode].LOSSES),
    }


def run_settings(args: cli.Flags) -> RunSettings:
    return RunSettings(
        work_dir=args.work_dir,
        task_name=args.task_name,
        num_epochs=args.num_epochs,
        patience=args.patience,
        choose_by_miou=args.val_npy_path is not None,
        save_every_steps=args.save_every_steps,
        keep_last=args.keep_last,
        val_every=args.val_every,
        use_tensorboard=args.use_tensorboard,
        use_wandb=args.use_wandb,
    )


def load_data(args: cli.Flags) -> tuple[TrainingDataset, EvaluationDataset | None]:
    source = NpyFolder(args.tr_npy_path)
    if args.classes:
        source.use_classes(source.classes.select(args.classes.split(","), other=args.other_classes == "other"))
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
    args: cli.Flags, source: NpyFolder, precision: Precision, resume: ResumeState | None
) -> tuple[Segmenter, ModelInfo]:
    segmenter = build_model(
        args.model_type,
        args.checkpoint,
        image_size=source.image_size,
        prompt_mode=args.prompt_mode,
        check_hash=args.verify_checkpoint,
        flags=TRAIN_FLAGS,
        classes=resume.classes if resume else source.classes,
        decoder=resume.decoder if resume else None,
    ).to(precision.device)
    segmenter.balance_classes(source.class_pixels())
    digest = file_digest(args.checkpoint)
    info = ModelInfo(args.model_type, source.image_size, source.resize_mode, digest, args.prompt_mode)
    if args.init_decoder and not resume:
        fresh = checkpoint.init_decoder(segmenter, info, args.init_decoder)
        news = f"; new classes: {', '.join(fresh)}" if fresh else ""
        distributed.say(printable(f"decoder of {args.init_decoder}{news}"))
    return segmenter, info


def prepare_cache(
    args: cli.Flags,
    segmenter: Segmenter,
    info: ModelInfo,
    precision: Precision,
    dataset: TrainingDataset,
    val_dataset: EvaluationDataset | None,
    resume: ResumeState | None,
) -> str | None:
    """Encode the images once, if that is wanted; the type of the cached training features, None without a cache."""
    passes: dict[TrainingDataset | EvaluationDataset, int] = {dataset: args.num_epochs}
    if val_dataset:
        passes[val_dataset] = math.ceil(args.num_epochs / args.val_every)
    stored_in = use_caches(
        passes,
        segmenter,
        info,
        precision,
        where=resume.cache_choice(args.cache_embeddings, args.cache_dtype) if resume else args.cache_embeddings,
        dtype=args.cache_dtype,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
    )
    if resume:
        resume.require_same_cache(stored_in)
    return stored_in


def build_loaders(
    args: cli.Flags, dataset: TrainingDataset, val_dataset: EvaluationDataset | None, precision: Precision
) -> tuple[Loader | ResidentLoader, Loader | None]:
    sizes = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    order = {"batch_size": args.batch_size, "seed": args.seed, "grad_acc_steps": args.grad_acc_steps}
    loader = resident_loader(args.cache_device, dataset, **order, precision=precision) or training_loader(
        dataset, **order, num_workers=args.num_workers, precision=precision
    )
    return loader, evaluation_loader(val_dataset, **sizes, precision=precision) if val_dataset else None


def build_state(args: cli.Flags, segmenter: Segmenter, precision: Precision, num_batches: int) -> TrainState:
    steps_per_epoch = math.ceil(num_batches / args.grad_acc_steps)
    optimizer = build_optimizer(segmenter, lr=args.lr, weight_decay=args.weight_decay)
    scheduler = build_scheduler(
        optimizer,
        args.lr_scheduler,
        total_steps=steps_per_epoch * args.num_epochs,
        warmup_steps=round(steps_per_epoch * args.warmup_epochs),
    )
    return TrainState(optimizer, scheduler, precision.grad_scaler())


def build_steps(
    args: cli.Flags, model: nn.Module, segmenter: Segmenter, state: TrainState, precision: Precision
) -> Steps:
    """The steps of `--step_mode`."""
    if args.step_mode == "eager" or not can_capture(precision.device):
        return EagerSteps(model, state, precision, args.clip_grad_norm)
    compiled_batch = args.batch_size if args.step_mode == "compiled" else 0
    return CapturedSteps(segmenter, state, precision, args.clip_grad_norm, compiled_batch=compiled_batch)


def can_capture(device: torch.device) -> bool:
    """Whether steps can be CUDA graphs. DDP's, which a launcher's processes share, are not."""
    return device.type == "cuda" and not distributed.is_shared()


def require_step_mode(args: cli.Flags, device: torch.device) -> None:
    """Check --step_mode before images are encoded; raises a `UserError`."""
    if args.step_mode in ("captured", "compiled") and not can_capture(device):
        raise UserError(f"--step_mode {args.step_mode} needs a CUDA device, and no launcher; set it to auto")
    if args.step_mode == "compiled" and args.deterministic:
        raise UserError("--deterministic: not with --step_mode compiled; set it to captured")


def announce(args: cli.Flags, precision: Precision, run: Run, num_images: int, num_batches: int) -> None:
    """Print what is about to happen, before it takes hours."""
    parameters = list(run.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters) - trained
    dtype = str(precision.amp_dtype or torch.float32).removeprefix("torch.")
    if args.use_amp and precision.amp_dtype is None:
        dtype += ": this CPU has no bf16"
    epoch, steps = run.progress.epoch, run.progress.steps
    resuming = f", resuming at epoch {epoch + 1}" if epoch or steps else ""
    resuming += f", after {steps} steps" if steps else ""
    distributed.say(
        f"{args.model_type} at {run.info.image_size}: {trained:,} parameters trained, {frozen:,} frozen\n"
        f"{num_images} images, {math.ceil(num_batches / args.grad_acc_steps)} optimizer steps an epoch, "
        f"effective batch size {run.config['effective_batch_size']}\n"
        f"{distributed.world_size()} process(es) on {precision.device.type}, {dtype}\n"
        f"run folder: {run.folder}{resuming}"
    )


def next_command(args: cli.Flags, run: Run) -> str:
    """The command that evaluates the run's best model. It finds the run's cache if the splits lie side by side."""
    split = args.val_npy_path or args.tr_npy_path.parent / "val"
    output = run.folder / f"eval-{split.resolve().name}"  # the default of infer_bdd100k.py, named here to be found
    paths = (split, run.folder / checkpoint.BEST, args.checkpoint, output)
    data, best, sam, results = (shlex.quote(str(path)) for path in paths)
    lines = [
        f"python infer_bdd100k.py --val_npy_path {data}",
        f"--model_checkpoint {best}",
        f"--output_dir {results}",
        f"--sam_checkpoint {sam} --model_type {args.model_type} --visualize{' -use_amp' if args.use_amp else ''}",
    ]
    given = {name: getattr(args, name) for name, default in OF_INFERENCE.items() if getattr(args, name) != default}
    if given:
        lines.append(" ".join(f"--{name} {shlex.quote(value)}" for name, value in given.items()))
    return " \\\n      ".join(lines)


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
