"""Segment driving scenes with a fine-tuned mask decoder, and measure per-class IoU and mIoU where there are labels.

    python infer_bdd100k.py --val_npy_path data/bdd100k_npy/val \\
        --model_checkpoint work_dir/<task>-<YYYYMMDD-HHMM>/medsam_model_best.pth \\
        --sam_checkpoint work_dir/SAM/sam_vit_b_01ec64.pth --model_type vit_b \\
        --output_dir ./inference_results --visualize

A semantic checkpoint needs only the image. A box checkpoint needs boxes: those of the ground truth (*oracle* boxes), or
a detector's with --boxes FILE. Without --model_checkpoint, SAM is evaluated without fine-tuning, for comparison.

Your own pictures, without labels: a file, a folder, a quoted pattern, or a video.

    python infer_bdd100k.py --images drive.mp4 --model_checkpoint ... --sam_checkpoint ... --output_dir results

Several GPUs share an evaluation: torchrun --nproc_per_node=4 infer_bdd100k.py ...
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from utils.runtime import cli
from utils.runtime.choices import (
    AMP_DTYPES,
    AMP_HELP,
    CACHE_DTYPES,
    MAP_RULES,
    MODEL_TYPES,
    PREDICTION_FORMATS,
    MapRule,
)

NUM_PICTURES = 20  # of a bare --visualize


class _OnePath(argparse.Action):
    """Takes one path; several are a pattern that the shell has expanded."""

    shows_one = True

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        if len(values) > 1:
            paths = [Path(value) for value in values]
            folders, suffixes = ({path.parent for path in paths}, {path.suffix for path in paths})
            folder = folders.pop() if len(folders) == 1 else Path("FOLDER")
            pattern = folder / f"*{suffixes.pop() if len(suffixes) == 1 else ''}"
            raise argparse.ArgumentError(
                self, f"takes one path, got {len(values)}; quote a pattern: --images {shlex.quote(str(pattern))}"
            )
        setattr(namespace, self.dest, values[0])


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    flag, switch = parser.add_flag, parser.add_switch
    sam = Path("work_dir/SAM/sam_vit_b_01ec64.pth")

    parser.begin_group("data")
    data = Path("data/bdd100k_npy/val")
    flag("val_npy_path", type=Path, default=data, metavar="DIR", help="split written by pre_bdd100k.py")
    flag("images", nargs="+", action=_OnePath, metavar="PATH", help="your own pictures or video; replaces the split")
    flag("bdd100k_root", "root", type=Path, metavar="DIR", help="the unpacked data set, for --eval_size original")
    flag("num_workers", type=cli.non_negative_int, default=2, metavar="N", help="loader processes")

    parser.begin_group("model")
    flag(
        "model_checkpoint",
        type=Path,
        metavar="PATH",
        help="a run's folder, its best, or an .onnx or .safetensors file of utils.export (default: none, SAM itself)",
    )
    flag("sam_checkpoint", type=Path, default=sam, metavar="FILE", help="SAM file the model was trained on")
    flag("model_type", choices=MODEL_TYPES, default="vit_b", help="size of SAM")
    switch("verify_checkpoint", help="compare the SAM file with the hash in its name")

    parser.begin_group("boxes and maps")
    flag("boxes", type=Path, metavar="FILE", help="detected boxes in Scalabel's JSON; replace the ground truth's boxes")
    rules = "; ".join(f"{rule}: {text}" for rule, text in MAP_RULES.items())
    flag(
        "map_rule",
        choices=list(MAP_RULES),
        help=f"class of a pixel. {rules} (default: argmax; with --boxes, box_threshold)",
    )
    switch(
        "match_classes", help="score data of other classes on those that the model names too; the others are ignored"
    )
    switch("tta", help="average with the mirror image; semantic checkpoints only, twice the time, reads no cache")
    flag(
        "eval_size",
        choices=["frame", "original"],
        default="frame",
        help="score at the preprocessed size, or at the original size against the masks of --bdd100k_root",
    )

    parser.begin_group("memory and speed")
    flag("batch_size", type=cli.positive_int, default=1, metavar="N", help="images encoded together")
    flag("device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda if available)")
    switch("use_amp", help="mixed precision")
    flag("amp_dtype", choices=AMP_DTYPES, default="auto", help=AMP_HELP)
    flag(
        "cache_embeddings",
        type=cli.cache_place,
        default="auto",
        metavar="DIR",
        help="cache of the split's features: auto reads the one next to the split if it exists; a folder is read and "
        "filled; off uses none",
    )
    flag("cache_dtype", choices=CACHE_DTYPES, default="float16", help="type of cached features")

    parser.begin_group("output")
    output = Path("inference_results")
    flag(
        "output_dir",
        type=Path,
        default=output,
        metavar="DIR",
        help="results; those of an earlier run are removed (default: <run>/eval-<split> where a run's checkpoint is "
        "scored, otherwise %(default)s)",
    )
    flag(
        "report_images",
        type=cli.non_negative_int,
        default=60,
        metavar="N",
        help="images in report.html: the worst, and a sample of the others",
    )
    flag(
        "visualize",
        nargs="?",
        type=cli.switch_or_count,
        const=True,
        default=False,
        metavar="N",
        help=f"draw N images ({NUM_PICTURES} without a number): half spread over the split, half those of lowest mIoU",
    )
    flag(
        "opacity",
        type=cli.number(float, 0, maximum=1),
        default=0.5,
        metavar="X",
        help="of the colours over --images, 0 to 1",
    )
    flag(
        "classes",
        nargs="+",
        action=cli.JoinedNames,
        metavar="CLASS",
        help="paint only these over --images (default: all)",
    )
    switch("save_predictions", help="write each image's train ids at its original size as PNG")
    flag(
        "predictions_format",
        choices=PREDICTION_FORMATS,
        default="png",
        help="beside the PNGs of --save_predictions, a file that an annotation tool imports",
    )
    # torch.distributed.launch passes it; the environment has the same value.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and wrong flags are answered before slow imports

import numpy as np
import torch

from segment_anything.build_sam import CONFIGS, file_digest
from utils.cache.writer import use_caches
from utils.data.bdd100k import match_key
from utils.data.classes import BDD100K, ClassTable
from utils.data.datasets import BoxesByName, EvaluationDataset, NpyFolder, collate_pictures
from utils.data.detections import read_detections
from utils.data.frame import ImageSize
from utils.data.loaders import evaluation_loader, usable_workers
from utils.evaluate import annotators
from utils.evaluate.evaluate import predictions_and_labels
from utils.evaluate.examples import Examples, draw_examples
from utils.evaluate.gallery import LABEL_MAPS, ScoredImage, encode_labels, report_cards, save_label_maps
from utils.evaluate.media import (
    ImageFolder,
    OverlayFolder,
    OverlayVideo,
    Video,
    find_source,
    has_h264,
    read_ahead,
    refuse_overwriting,
    write_behind,
)
from utils.evaluate.metrics import count_pixels
from utils.evaluate.plots import OverlayStyle, save_labels
from utils.evaluate.report import begin_pictures, begin_results, remove_exports, write_report
from utils.model import checkpoint
from utils.model.checkpoint import ModelInfo
from utils.model.onnx_model import OnnxSemanticSegmenter, is_onnx, load_onnx
from utils.model.prediction import Prediction, predict
from utils.model.segmenter import Segmenter, build_model
from utils.runtime import distributed
from utils.runtime.device import Precision, resolve_precision, telling_out_of_memory
from utils.runtime.errors import UserError, printable
from utils.runtime.files import exists, is_folder, make_folder
from utils.runtime.progress import progress_bar
from utils.train.logger import CONFIG


def main(args: cli.Flags) -> int:
    if args.predictions_format != "png" and not args.save_predictions:
        raise UserError(f"--predictions_format {args.predictions_format}: needs --save_predictions")
    precision = resolve_precision(
        args.device,
        local_rank=distributed.local_rank(),
        local_world_size=distributed.local_world_size(),
        use_amp=args.use_amp,
        amp_dtype=args.amp_dtype,
    )
    distributed.setup(requested=False, world_size=None, node_rank=None, init_method="env://", device=precision.device)
    advice = "lower --batch_size, add -use_amp, or preprocess at a smaller --image_size"
    with distributed.telling_lost_peers(), telling_out_of_memory(advice):
        status = evaluate_split(args, precision) if args.images is None else segment_pictures(args, precision)
    distributed.cleanup()
    return status


def evaluate_split(args: cli.Flags, precision: Precision) -> int:
    """Score a preprocessed split; each process scores a share of it."""
    if args.tta and args.cache_embeddings not in ("auto", "off"):
        raise UserError("--tta reads no cache; leave out --cache_embeddings")
    if {"opacity", "classes"} & args.given:
        raise UserError("--opacity and --classes are for --images; leave them out")
    source = NpyFolder(args.val_npy_path)
    pictures = source.pictures() if args.predictions_format != "png" else {}  # for annotation tools
    annotators.require_exportable(pictures)
    masks = None
    if args.eval_size == "original":
        if not args.bdd100k_root:
            raise UserError("--eval_size original needs the original masks; give the unpacked data set as --root")
        masks = source.original_masks(args.bdd100k_root)
    model, info = load_model(args, precision, frame=(source.image_size, source.resize_mode), classes=source.classes)
    data_classes, note = source.classes, ""
    source.use_classes(model.classes, match=args.match_classes)
    if args.match_classes and data_classes.names not in (model.classes.names, model.classes.selected_from):
        note = f"classes in common: {model.classes.in_common(data_classes)}; pixels of all others are ignored"
        distributed.say(printable(note))
    names = [item.name for item in source.items]
    boxes = choose_boxes(args, info, model.classes, names)
    rule = choose_map_rule(args, info, boxes)
    args.output_dir = choose_output_dir(args)
    make_folders(args)

    dataset = EvaluationDataset(source, boxes, tta=args.tta)
    loading = {"batch_size": args.batch_size, "num_workers": usable_workers(args.num_workers)}
    where = "off" if args.tta else args.cache_embeddings
    if not is_onnx(args.model_checkpoint):
        use_caches({dataset: 1}, model, info, precision, where=where, dtype=args.cache_dtype, **loading)
    loader = evaluation_loader(dataset, **loading, precision=precision)
    # Which images are drawn is known at the end.
    distributed.on_main(lambda: begin_results(args.output_dir, dict.fromkeys(picture_folders(args), names)))
    examples = Examples(len(names), NUM_PICTURES if args.visualize is True else args.visualize)
    scored = []
    indexes = [index for batch in loader.batch_sampler for index in batch]  # type: ignore[union-attr]
    progress = progress_bar(indexes, "evaluating", unit="image", disable=not distributed.is_main())
    for index, (prediction, labels) in zip(progress, predictions_and_labels(model, loader, precision, rule)):
        item = source.items[index]
        original = cache(partial(original_size, prediction, item.height, item.width, info))  # at most once, if needed
        if masks:
            label_map = torch.from_numpy(original())
            labels = torch.from_numpy(source.read_original_mask(masks[item.name], item.height, item.width).copy())
        else:
            label_map = prediction.label_map(info.image_size)
        counts = count_pixels(label_map, labels, len(model.classes)).int().cpu().numpy()  # kept for every image
        shown = encode_labels(label_map.cpu().numpy(), source, index) if args.report_images else b""
        scored.append(ScoredImage(index, counts, shown))
        if args.save_predictions:
            save_labels(args.output_dir / "predictions" / f"{item.name}.png", original())
        if args.visualize and examples.add(index, scored[-1].miou):
            examples.keep(index, original())
    scored = sorted(chain(*distributed.all_gather(scored)), key=lambda image: image.index)
    distributed.on_main(lambda: save_results(args, source, scored, masks, boxes=boxes, rule=rule, note=note))
    # Each process draws those that it has scored.
    draw_examples(args.output_dir / "visualizations", examples, source, model.classes, masks)
    distributed.on_main(lambda: finish(args, model.classes, pictures))
    return 0


def save_results(
    args: argparse.Namespace,
    source: NpyFolder,
    scored: list[ScoredImage],
    masks: dict[str, Path] | None,
    *,
    boxes: BoxesByName | Literal["oracle"] | None,
    rule: MapRule,
    note: str,
) -> None:
    """Print and write the figures, then the page, which may fail where an image cannot be read again."""
    write_report(
        args.output_dir,
        {source.items[image.index].name: torch.from_numpy(image.counts) for image in scored},
        classes=source.classes,
        model=str(args.model_checkpoint or f"{args.sam_checkpoint}, not fine-tuned"),
        data=str(args.val_npy_path),
        box_source="none" if boxes is None else "oracle" if boxes == "oracle" else str(args.boxes),
        eval_size=args.eval_size,
        map_rule=rule,
        tta=args.tta,
        note=note,
        cards=lambda: report_cards(source, scored, args.report_images, source.classes, masks),
    )
    if args.report_images:
        save_label_maps(args.output_dir / LABEL_MAPS, scored)


def choose_output_dir(args: cli.Flags) -> Path:
    """The folder of the results: a folder in the run whose checkpoint is evaluated, one for each kind of evaluation."""
    path = args.model_checkpoint
    run = None if path is None else path if is_folder(path) else path.parent
    if "output_dir" in args.given or run is None or not exists(run / CONFIG):
        return args.output_dir
    kinds = [
        "" if is_folder(path) or path.name == checkpoint.BEST else path.stem.removeprefix("medsam_model_"),
        args.boxes and args.boxes.stem,
        args.map_rule,
        "original" if args.eval_size == "original" else "",
        "tta" if args.tta else "",
    ]
    return run / "-".join(["eval", args.val_npy_path.resolve().name, *filter(None, kinds)])


def original_size(prediction: Prediction, height: int, width: int, info: ModelInfo) -> np.ndarray:
    return (
        prediction.original_label_map(height, width, image_size=info.image_size, resize_mode=info.resize_mode)
        .cpu()
        .numpy()
    )


def segment_pictures(args: cli.Flags, precision: Precision) -> int:
    """Write overlays of the user's own pictures or video; returns 1 if a part of it could not be read."""
    wrong = None
    if distributed.world_size() > 1:
        wrong = "runs in one process; start it without a launcher"
    elif args.visualize or args.eval_size != "frame" or args.bdd100k_root or "report_images" in args.given:
        wrong = "draws overlays without a score; leave out --visualize, --report_images, --eval_size and --root"
    elif args.match_classes:
        wrong = "draws overlays without a score; leave out --match_classes"
    elif args.cache_embeddings not in ("auto", "off"):
        wrong = "reads no cache; leave out --cache_embeddings"
    if wrong:
        raise UserError(f"--images {wrong}")
    source = find_source(args.images)
    files = source.pictures if isinstance(source, ImageFolder) else {}
    if args.predictions_format != "png":
        if isinstance(source, Video):
            raise UserError(
                f"{source.path}: --predictions_format {args.predictions_format} needs pictures; extract the frames "
                f"(ffmpeg -i {shlex.quote(str(source.path))} 'FOLDER/%06d.png') and give their folder as --images"
            )
        annotators.require_exportable(files)
    model, info = load_model(args, precision, frame=None)
    boxes = choose_boxes(args, info, model.classes, list(files) or None)
    assert boxes != "oracle", "--images has no ground truth"
    rule = choose_map_rule(args, info, boxes)
    painted = [*range(len(model.classes))]
    if args.classes:
        painted = sorted({model.classes.id_of(name) for name in args.classes.split(",")})
    style = OverlayStyle(
        model.classes,
        args.opacity,
        class_ids=painted,
        fixed_legend=isinstance(source, Video),
    )
    sink: OverlayFolder | OverlayVideo
    if isinstance(source, Video):
        output = args.output_dir / f"{source.path.stem}.mp4"
        sink = OverlayVideo(output, source.fps, source.size, style.draw)
    else:
        output = args.output_dir / "overlays"
        sink = OverlayFolder(output, style.draw)
    refuse_overwriting(source, output)
    if args.save_predictions:
        refuse_overwriting(source, args.output_dir / "predictions")
    make_folders(args)
    if isinstance(source, ImageFolder):
        begin_pictures(output, ".jpg", source.holds)
    if args.save_predictions:
        begin_pictures(args.output_dir / "predictions", ".png", source.holds)
    remove_exports(args.output_dir)

    failures: list[UserError] = []
    segmented: set[str] = set()
    prompted = False
    ahead = read_ahead(source, args.batch_size)
    frames = iter(progress_bar(ahead, "segmenting", total=source.count, unit="image"))
    with sink, write_behind(sink, args.batch_size) as write:
        while group := list(islice(frames, args.batch_size)):
            failures += [image for _, image in group if isinstance(image, UserError)]
            pictures = [(name, image) for name, image in group if not isinstance(image, UserError)]
            if not pictures:
                continue
            batch = collate_pictures(pictures, boxes, info.image_size, info.resize_mode, tta=args.tta)
            prompted = prompted or any(map(len, batch.get("boxes", [])))
            for (name, image), prediction in zip(pictures, predict(model, batch, precision, rule)):
                labels = original_size(prediction, image.shape[0], image.shape[1], info)
                write(name, image, labels)
                if args.save_predictions:
                    save_labels(args.output_dir / "predictions" / f"{name}.png", labels)
                    segmented.add(name)
        if boxes is not None and not prompted:
            raise UserError(
                f"{args.boxes}: has no box for {args.images}; nothing was segmented (boxes are found by the picture's "
                "name; a video's frames are named <video>_000000, ...)"
            )
    print(f"\nOverlays: {output}")
    if isinstance(source, Video) and not has_h264():
        print("The video is MPEG-4, which browsers and phones do not play; for H.264, pip install av")
    finish(args, model.classes, {name: path for name, path in files.items() if name in segmented})
    for failure in [*failures, *source.skipped]:
        print(printable(f"not segmented: {failure}"))
    return 1 if failures else 0


def load_model(
    args: argparse.Namespace,
    precision: Precision,
    frame: tuple[ImageSize, str] | None,
    classes: ClassTable = BDD100K,
) -> tuple[Segmenter, ModelInfo]:
    """Load SAM and the fine-tuned decoder, if one is given, and check that they and the data belong together.

    Args:
        frame: image size and resize mode of the data; None for pictures that can be resized to any.
        classes: of SAM itself; a fine-tuned decoder has its own.
    """
    if is_onnx(args.model_checkpoint):
        return load_onnx_model(args, precision, frame)
    # The small file first, so that errors do not wait for the large one.
    state = checkpoint.load_checkpoint(args.model_checkpoint) if args.model_checkpoint else None
    if state:
        checkpoint.require_model_type(state, args.model_type, args.model_checkpoint)
    prompt_mode = state["info"].prompt_mode if state else "box"
    if args.tta and prompt_mode != "semantic":
        raise UserError(f"{args.model_checkpoint or 'plain SAM'}: takes boxes, but --tta needs a semantic checkpoint")
    if state:
        model, info = checkpoint.rebuild(
            state, args.model_checkpoint, args.sam_checkpoint, frame=frame, check_hash=args.verify_checkpoint
        )
    else:
        image_size, resize_mode = frame or (CONFIGS[args.model_type].image_size, "stretch")
        model = build_model(
            args.model_type,
            args.sam_checkpoint,
            image_size=image_size,
            check_hash=args.verify_checkpoint,
            classes=classes,
        )
        info = ModelInfo(args.model_type, image_size, resize_mode, file_digest(args.sam_checkpoint))
    return model.to(precision.device), info


def load_onnx_model(
    args: argparse.Namespace, precision: Precision, frame: tuple[ImageSize, str] | None
) -> tuple[Segmenter, ModelInfo]:
    """Load a file of `utils.export`. It holds SAM, and its precision is its own."""
    for flag in sorted(args.given & {"sam_checkpoint", "verify_checkpoint", "use_amp", "amp_dtype", "cache_dtype"}):
        raise UserError(f"{args.model_checkpoint}: an ONNX model takes no --{flag}; leave it out")
    if args.cache_embeddings not in ("auto", "off"):
        raise UserError(f"{args.model_checkpoint}: an ONNX model reads no cache; leave out --cache_embeddings")
    model, info = load_onnx(args.model_checkpoint, precision.device, frame)
    if "model_type" in args.given and args.model_type != info.model_type:
        raise UserError(f"{args.model_checkpoint}: is of {info.model_type}; leave out --model_type {args.model_type}")
    needs_logits = {
        "--tta": args.tta,
        "--images": args.images is not None,
        "--eval_size original": args.eval_size == "original",
        "--save_predictions": args.save_predictions,
        "--visualize": args.visualize,
    }
    if args.tta and info.prompt_mode != "semantic":
        raise UserError(f"{args.model_checkpoint}: takes boxes, but --tta needs a semantic model")
    if isinstance(model, OnnxSemanticSegmenter) and not model.has_logits and any(needs_logits.values()):
        flag = next(flag for flag, wanted in needs_logits.items() if wanted)
        raise UserError(f"{args.model_checkpoint}: {flag} needs logits; export the model again with --logits")
    return model, info


def choose_boxes(
    args: argparse.Namespace, info: ModelInfo, classes: ClassTable, names: list[str] | None
) -> BoxesByName | Literal["oracle"] | None:
    """The boxes to prompt with: detected ones, "oracle" for the ground truth's, or None in semantic mode.

    Args:
        names: of the images; None if they are unknown before reading.
    """
    if info.prompt_mode == "semantic":
        if args.boxes:
            raise UserError(f"{args.model_checkpoint}: a semantic checkpoint takes no boxes; leave out --boxes")
        return None
    if not args.boxes:
        if args.images is not None:
            raise UserError(
                f"{args.model_checkpoint or 'plain SAM'}: needs boxes, and --images has no ground truth to take them "
                "from; give --boxes FILE, or the checkpoint of a run with --prompt_mode semantic"
            )
        return "oracle"
    detections = read_detections(args.boxes, classes)
    if names is not None:
        found = sum(match_key(name) in detections.boxes for name in names)
        if not found:
            raise UserError(f"{args.boxes}: has none of the images (such as {names[0]}); give the file of this split")
        distributed.say(f"{args.boxes}: has {found} of {len(names)} images; the others get no boxes")
    if detections.left_out:
        some = ", ".join(f"{name} ({count})" for name, count in detections.left_out.items())
        distributed.say(printable(f"{args.boxes}: boxes of other categories are ignored: {some}"))
    return detections.boxes


def choose_map_rule(
    args: argparse.Namespace, info: ModelInfo, boxes: BoxesByName | Literal["oracle"] | None
) -> MapRule:
    """How masks become a map. Detected boxes miss classes and background, so that their masks need a threshold."""
    if info.prompt_mode == "semantic":
        if args.map_rule not in (None, "argmax"):
            raise UserError(f"--map_rule {args.map_rule}: is for boxes; a semantic checkpoint supports only argmax")
        return "argmax"
    return args.map_rule or ("argmax" if boxes == "oracle" else "box_threshold")


def picture_folders(args: argparse.Namespace) -> dict[str, Path]:
    wanted = {"visualizations": args.visualize and args.images is None, "predictions": args.save_predictions}
    return {name: args.output_dir / name for name, wants in wanted.items() if wants}


def finish(args: argparse.Namespace, classes: ClassTable, pictures: Mapping[str, Path]) -> None:
    """Name the folders of pictures, and write the predictions of `pictures` for an annotation tool if one is given."""
    for name, folder in picture_folders(args).items():
        print(f"{'Pictures' if name == 'visualizations' else 'Train ids'}: {folder}")
    tool, folder = args.predictions_format, args.output_dir
    if tool != "png" and pictures:
        model = str(args.model_checkpoint or "SAM, not fine-tuned")
        for line in annotators.export_predictions(tool, folder, folder / "predictions", pictures, classes, model=model):
            print(printable(line))


def make_folders(args: argparse.Namespace) -> None:
    for folder in (args.output_dir, *picture_folders(args).values()):
        make_folder(folder, "--output_dir")


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
