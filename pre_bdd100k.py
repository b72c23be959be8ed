"""Convert the images and masks of BDD100K, or of another data set, to the .npy files that training and inference read.

    python pre_bdd100k.py --bdd100k_root data/bdd100k --output_path data/bdd100k_npy --splits train val
    python pre_bdd100k.py --bdd100k_root data/bdd100k --image_dtype uint8                # a third of the disk
    python pre_bdd100k.py --bdd100k_root data/bdd100k --resize_mode pad --overwrite        # keep the aspect ratio
    python pre_bdd100k.py --bdd100k_root data/bdd100k --image_size 576x1024                # BDD100K's aspect ratio
    python pre_bdd100k.py --dataset cityscapes --root data/cityscapes                      # another data set

Writes `<output_path>/<split>/imgs/<name>.npy` (H, W, 3) RGB in [0, 1], `gts/<name>.npy` (H, W) uint8 with class ids
and 255 = not labelled, `manifest.json`, and the distribution of the labels as a table and a chart. Run the same command
again to resume. An image is redone if the path, size or modification time of its file or mask has changed.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from utils.data.bdd100k import (
    Item,
    LabelError,
    Split,
    check_first_masks,
    count_labels,
    foreign_pictures,
    read_item,
    read_size,
)
from utils.data.classes import BDD100K, IGNORE_LABEL, ClassTable
from utils.data.description import DEFAULT, Description, Labels, built_in_names, load_description
from utils.data.finding import find_split
from utils.data.frame import ImageSize, frame_size, image_size
from utils.data.geometry import resize_image, resize_mask
from utils.data.manifest import IMAGE_DTYPES, RESIZE_MODES, Manifest, ManifestItem, Source, read_manifest, source_of
from utils.runtime import cli
from utils.runtime.errors import UnreadableError, UserError, printable, warn
from utils.runtime.files import (
    atomic_write,
    cannot_be_read,
    check_npy,
    exists,
    is_file,
    open_untrusted,
    remove_temporaries,
)
from utils.runtime.process_pool import run_jobs, usable_cores
from utils.runtime.progress import progress_bar
from utils.runtime.text import display_width, pad

UNIT_INTERVAL = np.arange(256, dtype=np.float32) / 255  # a byte's value in [0, 1]
DISTRIBUTION = ("label_distribution.csv", "label_distribution.png")  # of a split
MAX_LISTED = 10  # files of one kind of trouble named one by one


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    flag = parser.add_flag
    parser.begin_group("data")
    flag(
        "bdd100k_root", "root", type=Path, required=True, metavar="DIR", help="the unpacked BDD100K, or other data set"
    )
    names = ", ".join(built_in_names())
    flag("dataset", default=DEFAULT, metavar="NAME", help=f"{names}, or a YAML file that describes a data set")
    flag("splits", nargs="+", default=["train", "val"], metavar="SPLIT", help="splits to process")
    where = "folder to write; of another data set, data/<name>_npy"
    flag("output_path", type=Path, default=Path("data/bdd100k_npy"), metavar="DIR", help=where)
    parser.add_switch("overwrite", help="delete the files of earlier runs for these splits, and start anew")
    parser.begin_group("format")
    flag(
        "image_size",
        type=image_size,
        default=1024,
        metavar="SIZE",
        help="side of the square arrays, or HxW, in multiples of 16. 576x1024 has BDD100K's aspect ratio and "
        "2,304 tokens instead of 4,096; 720x1280 keeps every pixel",
    )
    flag("resize_mode", choices=RESIZE_MODES, default="stretch", help="pad keeps the aspect ratio, as in SAM")
    flag("image_dtype", choices=IMAGE_DTYPES, default="float32", help="uint8 holds 0-255, the others [0, 1]")
    parser.begin_group("speed")
    flag("num_workers", type=cli.positive_int, default=usable_cores(), metavar="N", help="worker processes")
    return parser


@dataclass(frozen=True)
class Settings:
    """The settings that all files of a split share."""

    image_size: ImageSize
    image_dtype: str
    resize_mode: str

    def __str__(self) -> str:
        return f"--image_size {self.image_size} --image_dtype {self.image_dtype} --resize_mode {self.resize_mode}"


@dataclass(frozen=True)
class Job:
    """One image to write into a split's folder; `done` if an earlier run has written it."""

    item: Item
    folder: Path
    settings: Settings
    done: bool = False
    sources: list[Source] | None = None  # None if one is missing
    labels: Labels | None = None  # what the mask holds, None for BDD100K's train ids
    num_classes: int = len(BDD100K)

    @property
    def outputs(self) -> list[Path]:
        return [self.folder / kind / f"{self.item.name}.npy" for kind in ("imgs", "gts")[: 2 if self.item.mask else 1]]


@dataclass(frozen=True)
class Failure:
    """An image that cannot be used."""

    message: str
    kind: str  # failures of the same kind are grouped
    stays: bool = False  # the files of an earlier run are kept


WRONG_LABELS = "wrong labels"  # a kind


def make_jobs(
    split: Split, folder: Path, settings: Settings, earlier: Manifest | None, classes: ClassTable = BDD100K
) -> list[Job]:
    """One job for each image; it is done if an earlier run has written its files from the same sources.

    Raises:
        UnreadableError: the system does not let us look at a source, or read one whose outputs will be replaced.
    """
    known = (earlier and earlier.sources) or {}
    jobs = []
    for item in split.items:
        job = Job(item, folder, settings, False, sources_of(item), split.labels, len(classes))
        is_same = job.sources is not None and known.get(item.name) == job.sources
        job = replace(job, done=is_same and is_complete(job))
        if not job.done and any(exists(path) for path in job.outputs):  # they are deleted before the source is read
            require_openable(item)
        jobs.append(job)
    return jobs


def sources_of(item: Item) -> list[Source] | None:
    """Identify the item's files; None if one is missing.

    Raises:
        UnreadableError: the system does not let us look.
    """
    sources = []
    for path in filter(None, (item.image, item.mask)):
        try:
            sources.append(source_of(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise cannot_be_read(path, error) from None
    return sources


def require_openable(item: Item) -> None:
    """Raise UnreadableError if the system does not let us open one of the item's files."""
    for path in filter(is_file, filter(None, (item.image, item.mask))):
        with open_untrusted(path):
            pass


def is_complete(job: Job) -> bool:
    """Whether all files of the job exist and are intact."""
    size = frame_size(job.settings.image_size)
    forms = [((*size, 3), job.settings.image_dtype), (size, "uint8")]
    try:
        for path, (shape, dtype) in zip(job.outputs, forms):
            check_npy(path, shape, dtype)
    except UserError:
        return False
    return True


def process(jobs: list[Job]) -> list[ManifestItem | Failure]:
    """Write images and masks, each while the next one is decoded.

    Returns:
        For each job, the first result of `prepare`.

    Raises:
        UserError: the output cannot be written.
    """
    results = []
    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(write, {})
        for job in jobs:
            result, arrays = prepare(job)
            writing.result()  # so that only one image waits in memory
            writing = writer.submit(write, arrays)
            results.append(result)
        writing.result()
    return results


def prepare(job: Job) -> tuple[ManifestItem | Failure, dict[Path, np.ndarray]]:
    """Decode and resize the files that the job has to write.

    Returns:
        The manifest's entry and the files to write, none if the job is done. For a bad image or mask, a failure;
        earlier files of the item are then deleted, except after an `UnreadableError`.
    """
    item, settings = job.item, job.settings
    try:
        if job.done:
            height, width = read_size(item.mask or item.image)  # the image may have been turned to fit its mask
        else:
            image, mask = read_item(item, job.labels)
            height, width = image.shape[:2]
    except UserError as error:
        stays = job.done and isinstance(error, UnreadableError)
        for path in [] if stays else job.outputs:
            path.unlink(missing_ok=True)
        return Failure(str(error), kind_of(error, item), stays), {}
    arrays = []
    if not job.done:
        arrays.append(resize_image(image, settings.image_size, settings.resize_mode))
        if settings.image_dtype != "uint8":
            arrays[0] = cv2.LUT(arrays[0], UNIT_INTERVAL).astype(settings.image_dtype, copy=False)
        if mask is not None:
            arrays.append(resize_mask(mask, settings.image_size, settings.resize_mode))
    pixels, ignored = [], 0
    if item.mask:
        counts = count_labels(np.load(job.outputs[1], allow_pickle=False) if job.done else arrays[1]).tolist()
        pixels, ignored = counts[: job.num_classes], counts[IGNORE_LABEL]
    return ManifestItem(item.name, height, width, pixels, ignored), dict(zip(job.outputs, arrays))


def kind_of(error: UserError, item: Item) -> str:
    """The kind of an error: its words without file names and numbers."""
    if isinstance(error, LabelError):
        return WRONG_LABELS
    message = str(error)
    for path in filter(None, (item.mask, item.image)):
        message = message.replace(str(path), "")
    return re.sub(r"\d+", "#", message)


def write(arrays: dict[Path, np.ndarray]) -> None:
    """Write the .npy files.

    Raises:
        UserError: one cannot be written.
    """
    for path, array in arrays.items():
        with atomic_write(path) as file:  # np.save hides errors such as a full disk
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data)


def read_earlier(folder: Path, settings: Settings, description: Description, labelled: bool) -> Manifest | None:
    """The manifest of an earlier run of the same settings; None if there is none.

    Raises:
        UserError: the folder holds files of other settings or of another data set, or .npy files without a manifest.
    """
    earlier, wrong = None, None
    if exists(folder / "manifest.json"):
        earlier = read_manifest(folder, allow_incomplete=True)
        found = Settings(earlier.image_size, earlier.image_dtype, earlier.resize_mode)
        if earlier.description != description:
            was, now = earlier.description.name, description.name
            wrong = f"was written from {was}, not from {now}" if was != now else f"had another description of {now}"
        elif found != settings:
            wrong = f"was written with {found}, not with {settings}"
        elif earlier.labelled != labelled:
            was, now = ("with", "none") if earlier.labelled else ("without", "some")
            wrong = f"was written {was} masks, and there are {now} now"
    elif any(folder.glob("imgs/*.npy")) or any(folder.glob("gts/*.npy")):
        wrong = "holds .npy files but no manifest.json"
    if wrong:
        raise UserError(f"{folder}: {wrong}; add --overwrite to delete its files and start anew")
    return earlier


def redone(folder: Path, earlier: Manifest, jobs: list[Job]) -> str | None:
    """A message about the files of an earlier run that are redone, if there are any."""
    if earlier.sources is None:
        count = sum(any(exists(path) for path in job.outputs) for job in jobs)
        why = "an older version did not record their sources"
    else:
        count = sum(job.item.name in earlier.sources and earlier.sources[job.item.name] != job.sources for job in jobs)
        why = "the image or its mask has changed (path, size or modification time)"
    return f"{folder}: {count:,} of {len(jobs):,} images are redone: {why}" if count else None


def check_disk(output: Path, jobs: list[Job], overwrite: bool) -> None:
    """Raise UserError unless the disk of `output` has room for the files that `jobs` still have to write."""
    todo = [job for job in jobs if not job.done]

    def needed(itemsize: int) -> int:
        channels = (3 * itemsize + (job.item.mask is not None) for job in todo)
        return sum(math.prod(frame_size(job.settings.image_size)) * count for job, count in zip(todo, channels))

    place = next(path for path in (output, *output.absolute().parents) if exists(path))
    free = shutil.disk_usage(place).free
    # Deleted before the first write.
    old = (path for folder in {job.folder for job in jobs} for path in folder.glob("*/*.npy"))
    if not overwrite:
        old = (path for job in todo for path in job.outputs if exists(path))
    free += sum(path.stat().st_size for path in old)
    itemsize = np.dtype(jobs[0].settings.image_dtype).itemsize
    if needed(itemsize) > free:
        advice = "use a smaller --image_size, or a larger disk"
        if itemsize > 1 and needed(1) <= free:
            advice = f"--image_dtype uint8 needs {needed(1) / 1e9:.3g} GB, masks included"
        raise UserError(
            f"{output}: needs {needed(itemsize) / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free on {place} ({advice})"
        )


def begin(folder: Path, manifest: Manifest, jobs: list[Job], overwrite: bool) -> None:
    """Create the split's folders and record its settings and sources.

    Files that will be rewritten are deleted first, because files next to the record count as written from its sources.
    With `overwrite`, all files are deleted.
    """
    try:
        for path in [*folder.glob("imgs/*.npy"), *folder.glob("gts/*.npy")] if overwrite else ():
            path.unlink()
        for path in (path for job in jobs if not job.done for path in job.outputs):
            path.unlink(missing_ok=True)
        for name in DISTRIBUTION:
            (folder / name).unlink(missing_ok=True)
        if overwrite:
            with suppress(OSError):  # missing without labels; it stays if other files are in it
                (folder / "gts").rmdir()
        for kind in ("imgs", "gts") if manifest.labelled else ("imgs",):
            (folder / kind).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; give another --output_path") from None
    remove_temporaries(folder)
    manifest.write(folder)


def unpaired(split: Split) -> list[str]:
    """One line for each image without a mask and each mask without an image, the first ten of each kind."""
    lines = []
    kinds = {"image without a mask": split.images_without_mask, "mask without an image": split.masks_without_image}
    for what, paths in kinds.items():
        lines += [f"{path}: {what}; add the other or remove this one" for path in paths[:MAX_LISTED]]
        if len(paths) > MAX_LISTED:
            lines.append(f"{paths[0].parent}: {what}: {len(paths)} in total, the first {MAX_LISTED} are listed above")
    return lines


def grouped(folder: Path, failures: Iterable[Failure]) -> list[str]:
    """The first ten failures of each kind, and the number of further ones."""
    kinds: dict[str, list[str]] = {}
    for failure in failures:
        kinds.setdefault(failure.kind, []).append(failure.message)
    lines = []
    for messages in kinds.values():
        lines += messages[:MAX_LISTED]
        if len(messages) > MAX_LISTED:
            lines.append(f"{folder}: ... and {len(messages) - MAX_LISTED:,} more like the last one")
    return lines


def report(folder: Path, split: Split, manifest: Manifest, kept: int) -> None:
    """Print a split's counts, its folder and, if it has labels, its pixels and images per class.

    The figures per class are also written to `DISTRIBUTION`, as a table and a chart.
    """
    earlier = f", {kept} of them by an earlier run" if kept else ""
    found = len(split.items) + len(split.images_without_mask)
    print(f"\n{folder}: {len(manifest.items)} of {found} images written{earlier}")
    if not (manifest.labelled and manifest.items):
        return
    classes = manifest.classes
    of_classes = [[item.pixels[c.id] for item in manifest.items] for c in classes]
    rows = [(c.id, c.name, counts) for c, counts in zip(classes, of_classes)]
    rows.append((IGNORE_LABEL, "not labelled", [item.ignored for item in manifest.items]))
    total = sum(sum(counts) for _, _, counts in rows)
    table = [["id", "class", "pixels", "percent", "images"]]
    wide = max(14, *(display_width(name) + 1 for _, name, _ in rows))
    print(f" id  {'class':<{wide}}{'pixels':>18}{'%':>9}{'images':>10}")
    for label, name, counts in rows:
        pixels, images = sum(counts), sum(map(bool, counts))
        print(f"{label:>3}  {pad(name, wide)}{pixels:>18,}{100 * pixels / total:>9.3f}{images:>10,}")
        table.append([str(label), name, str(pixels), f"{100 * pixels / total:.6f}", str(images)])
    with atomic_write(folder / DISTRIBUTION[0]) as file:
        file.write("".join(f"{','.join(row)}\n" for row in table).encode())
    from utils.evaluate.charts import save_label_distribution  # matplotlib, which worker processes need not import

    pixels_of, images_of = ([sum(map(f, counts)) for counts in of_classes] for f in (int, bool))
    chart = folder / DISTRIBUTION[1]
    save_label_distribution(chart, folder.name, pixels_of, images_of, len(manifest.items), classes)
    if not has_labels(manifest):
        warn(f"{folder}: all pixels of all masks are {IGNORE_LABEL} (not labelled); this split is of no use")


def has_labels(manifest: Manifest) -> bool:
    return any(any(item.pixels) for item in manifest.items)


def next_command(output: Path, manifests: dict[str, Manifest]) -> str | None:
    """The command that trains on the written data; None if no split is usable."""
    usable = [name for name, manifest in manifests.items() if has_labels(manifest)]
    train = next(
        (name for name in ("train", *usable) if name in usable and name not in ("val", "validation", "test")), None
    )
    if train is None:
        return None
    task = "BDD100K" if manifests[train].dataset is None else manifests[train].description.name
    model = "-model_type vit_b -checkpoint work_dir/SAM/sam_vit_b_01ec64.pth"
    # The built-in model is trained at 256 pixels, too few for SAM's.
    if max(frame_size(manifests[train].image_size)) <= 256:
        model = "-model_type vit_tiny -checkpoint assets/sam_vit_tiny_scenes.pth"
    lines = [
        f"python train_bdd100k.py -i {shlex.quote(str(output / train))} -task_name {task}-SAM-MaskDecoder",
        f"{model} -work_dir ./work_dir",
        "-batch_size 4 -num_epochs 100 -lr 5e-5 -use_amp --grad_acc_steps 4",
    ]
    if val := next((name for name in ("val", "validation") if name in usable), None):
        lines.append(f"--val_npy_path {shlex.quote(str(output / val))}")
    return " \\\n        ".join(lines)


def check_shape(size: ImageSize, split: Split) -> str | None:
    """What to warn of if the frame stands upright and the pictures lie, or the reverse: HxW is often given as WxH."""
    height, width = frame_size(size)
    try:
        picture_height, picture_width = read_size(split.items[0].image)
    except (UserError, IndexError):
        return None  # reading the pictures reports it
    if (height - width) * (picture_height - picture_width) >= 0:
        return None
    return (
        f"--image_size {size} is {height} high and {width} wide, but the picture {split.items[0].image} is "
        f"{picture_height} high and {picture_width} wide; was {width}x{height} meant?"
    )


def main(args: Namespace) -> int:
    settings = Settings(args.image_size, args.image_dtype, args.resize_mode)
    # All checks come before the first write.
    description = load_description(args.dataset)
    dataset = None if description.name == DEFAULT else description.to_plain()
    output: Path = args.output_path
    if dataset and "output_path" not in args.given:
        output = output.with_name(f"{description.name}_npy")
    splits = {name: find_split(args.bdd100k_root, name, description) for name in args.splits}
    checks = (check_first_masks, partial(check_shape, args.image_size))
    doubts = [doubt for split in splits.values() for check in checks if (doubt := check(split))]
    jobs: dict[str, list[Job]] = {}
    earlier_items: dict[str, dict[str, ManifestItem]] = {}
    places = "; ".join(note for split in splits.values() for note in split.notes)
    notes = [places] if places else []
    for name, split in splits.items():
        folder = output / name
        earlier = None if args.overwrite else read_earlier(folder, settings, description, split.labelled)
        jobs[name] = make_jobs(split, folder, settings, earlier, description.classes)
        earlier_items[name] = {item.name: item for item in earlier.items} if earlier else {}
        if earlier and (note := redone(folder, earlier, jobs[name])):
            notes.append(note)
    check_disk(output, [job for split_jobs in jobs.values() for job in split_jobs], args.overwrite)

    for note in dict.fromkeys(notes):
        print(printable(note), flush=True)
    if len({split.base for split in splits.values()}) > 1:
        found = ", ".join(f"{name} in {split.base}" for name, split in splits.items())
        warn(f"the splits are in different folders ({found}); if they are different data, give another --bdd100k_root")
    for doubt in doubts:
        warn(doubt)
    manifests = {}
    for name, split in splits.items():
        sources = {job.item.name: job.sources for job in jobs[name] if job.sources}
        manifests[name] = Manifest(
            **vars(settings),
            labelled=split.labelled,
            complete=False,
            items=[],
            class_names=list(description.classes.names),
            sources=sources,
            dataset=dataset,
        )
        masks = f"{len(split.items)} with a mask" if split.labelled else f"no masks in {split.mask_dir}, so no gts/"
        print(f"{name}: {len(split.items) + len(split.images_without_mask)} images, {masks}", flush=True)
        if not split.labelled and name != "test":
            fix = f"add its masks as the layout of {description.name} says"
            if dataset is None:
                fix = "download BDD100K's masks and unpack them into the same folder"
            warn(f"without masks, {name} is of no use for training or evaluation; {fix}")
        if foreign := foreign_pictures(split.items[0].image.parent):
            warn(
                f"{name}: {len(foreign)} pictures are left out, such as {foreign[0]}: their format is not supported; "
                "convert them to JPEG or PNG"
            )
    errors: list[str] = []
    suspect: list[str] = []
    try:
        for name, manifest in manifests.items():
            begin(output / name, manifest, jobs[name], args.overwrite)
        with progress_bar(total=sum(map(len, jobs.values())), unit="image") as progress:
            for name, split in splits.items():
                progress.set_description_str(name, refresh=False)
                results = run_jobs(process, jobs[name], args.num_workers, progress.update)
                stay = {job.item.name for job, r in zip(jobs[name], results) if isinstance(r, Failure) and r.stays}
                # The manifest of a stopped run has no items, but a record of sources, which stays.
                known = [
                    earlier_items[name].get(job.item.name) if job.item.name in stay else result
                    for job, result in zip(jobs[name], results)
                ]
                items = [item for item in known if isinstance(item, ManifestItem)]
                failures = [result for result in results if isinstance(result, Failure)]
                wrong = sum(failure.kind == WRONG_LABELS for failure in failures)
                suspect += [f"{output / name}: wrong labels in {wrong:,} masks"] if wrong else []
                errors += grouped(output / name, failures) + unpaired(split)
                there = {item.name for item in items} | stay
                sources = {key: files for key, files in (manifests[name].sources or {}).items() if key in there}
                manifests[name] = replace(manifests[name], complete=True, items=items, sources=sources)
                manifests[name].write(output / name)
    except KeyboardInterrupt:
        again = " without --overwrite" if args.overwrite else " again"
        raise KeyboardInterrupt(f"run the same command{again} to resume") from None
    finally:
        for name in splits:
            remove_temporaries(output / name)

    for name, split in splits.items():
        report(output / name, split, manifests[name], kept=sum(job.done for job in jobs[name]))
    command = None if suspect or doubts else next_command(output, manifests)
    if command:
        print(f"\nNext:\n    {command}")
    sys.stdout.flush()  # before the errors, if both go to one file
    for line in suspect:
        warn(f"{line}; check the others before training")
    for error in errors:
        print(f"error: {printable(error)}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
