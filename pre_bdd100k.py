"""Turn BDD100K's images and masks into the .npy files that training and inference read.

    python pre_bdd100k.py --bdd100k_root data/bdd100k --output_path data/bdd100k_npy --splits train val
    python pre_bdd100k.py --bdd100k_root data/bdd100k --splits test --image_dtype uint8    # a quarter of the disk
    python pre_bdd100k.py --bdd100k_root data/bdd100k --resize_mode pad --overwrite        # keep the aspect ratio
    python pre_bdd100k.py --bdd100k_root data/bdd100k --image_size 576x1024                # that of the pictures

Writes `<output_path>/<split>/imgs/<name>.npy` (H, W, 3) RGB in [0, 1], `gts/<name>.npy` (H, W) uint8 with ids 0-18 and
255 = not labelled, and `manifest.json`. A run that was stopped resumes when started again. An image is redone if its
file or its mask is another one than before: another path, size or time of modification.
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
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from utils.data.bdd100k import (
    Item,
    LabelError,
    Split,
    check_first_masks,
    count_labels,
    find_split,
    foreign_pictures,
    read_item,
    read_size,
)
from utils.data.classes import CLASSES, IGNORE_LABEL, NUM_CLASSES
from utils.data.frame import ImageSize, frame_size, image_size
from utils.data.geometry import resize_image, resize_mask
from utils.data.manifest import IMAGE_DTYPES, RESIZE_MODES, Manifest, ManifestItem, Source, read_manifest, source_of
from utils.runtime import cli
from utils.runtime.errors import UnreadableError, UserError, printable
from utils.runtime.files import atomic_write, cannot_be_read, check_npy, exists, is_file, remove_temporaries
from utils.runtime.process_pool import run_jobs, usable_cores

UNIT_INTERVAL = np.arange(256, dtype=np.float32) / 255  # a byte's value in [0, 1]
MAX_LISTED = 10  # files of one kind of trouble named one by one


def get_args_parser() -> cli.Parser:
    p = cli.Parser(description=__doc__)
    p.add_flag("bdd100k_root", type=Path, required=True, help="folder of the unpacked BDD100K")
    p.add_flag("output_path", type=Path, default=Path("data/bdd100k_npy"), help="folder to write")
    p.add_flag(
        "image_size",
        type=image_size,
        default=1024,
        help="side of the square arrays, or HxW: 576x1024 has "
        "the shape of BDD100K's pictures and 2,304 tokens in place of 4,096, 720x1280 has every pixel. "
        "Sides are multiples of 16",
    )
    p.add_flag("splits", nargs="+", default=["train", "val"], help="splits to process")
    p.add_flag("num_workers", type=cli.positive_int, default=usable_cores(), help="processes")
    p.add_flag("image_dtype", choices=IMAGE_DTYPES, default="float32", help="uint8 holds 0-255, the others [0, 1]")
    p.add_flag("resize_mode", choices=RESIZE_MODES, default="stretch", help="pad keeps the aspect ratio, as SAM does")
    p.add_switch("overwrite", help="delete what earlier runs wrote for these splits, and redo it")
    return p


@dataclass(frozen=True)
class Settings:
    """What all files of a split have in common; files of other settings are never mixed in."""

    image_size: ImageSize
    image_dtype: str
    resize_mode: str

    def __str__(self) -> str:
        return f"--image_size {self.image_size} --image_dtype {self.image_dtype} --resize_mode {self.resize_mode}"


@dataclass(frozen=True)
class Job:
    """One image to be written into a split's folder; `done` if an earlier run has written it."""

    item: Item
    folder: Path
    settings: Settings
    done: bool = False
    sources: list[Source] | None = None  # None if one is missing

    @property
    def outputs(self) -> list[Path]:
        return [self.folder / kind / f"{self.item.name}.npy" for kind in ("imgs", "gts")[: 2 if self.item.mask else 1]]


@dataclass(frozen=True)
class Failure:
    """An image or a mask that is not used."""

    message: str
    kind: str  # equal for what is grouped
    stays: bool = False  # what an earlier run made of it


WRONG_LABELS = "wrong labels"  # as a kind


def make_jobs(split: Split, folder: Path, settings: Settings, earlier: Manifest | None) -> list[Job]:
    """One job for each image; done are those whose files an earlier run has written from the same sources.

    Raises:
        UnreadableError: the system does not tell of a source, or does not let us read one whose outputs are replaced.
    """
    known = (earlier and earlier.sources) or {}
    jobs = []
    for item in split.items:
        job = Job(item, folder, settings, sources=sources_of(item))
        is_same = job.sources is not None and known.get(item.name) == job.sources
        job = replace(job, done=is_same and is_whole(job))
        if not job.done and any(exists(path) for path in job.outputs):  # which are deleted before it is read
            require_openable(item)
        jobs.append(job)
    return jobs


def sources_of(item: Item) -> list[Source] | None:
    """What tells the item's files from others; None if one is missing, which reading it will tell.

    Raises:
        UnreadableError: it cannot be told.
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
    for path in filter(None, (item.image, item.mask)):
        try:
            if is_file(path):  # a pipe would keep us waiting
                open(path, "rb").close()
        except OSError as error:
            raise cannot_be_read(path, error) from None


def is_whole(job: Job) -> bool:
    size = frame_size(job.settings.image_size)
    forms = [((*size, 3), job.settings.image_dtype), (size, "uint8")]
    try:
        for path, (shape, dtype) in zip(job.outputs, forms):
            check_npy(path, shape, dtype)
    except UserError:
        return False
    return True


def process(jobs: list[Job]) -> list[ManifestItem | Failure]:
    """Write images and masks, each while the next of `jobs` is decoded; of the two, the shorter costs no time then.

    Returns:
        For each job what `prepare` does.

    Raises:
        UserError: the output cannot be written.
    """
    results = []
    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(write, {})  # nothing yet
        for job in jobs:
            result, arrays = prepare(job)
            writing.result()  # so that one image waits in memory, and not all of them
            writing = writer.submit(write, arrays)
            results.append(result)
        writing.result()
    return results


def prepare(job: Job) -> tuple[ManifestItem | Failure, dict[Path, np.ndarray]]:
    """Decode and resize what the job has still to write.

    Returns:
        The manifest's entry, and the files that must be written before it is true: none if the job is done.
        Or, for a bad image or mask, one line saying so; what was there of the item is deleted then, unless the system
        does not let us read what it may well be made of.
    """
    item, settings = job.item, job.settings
    try:
        if job.done:
            height, width = read_size(item.mask or item.image)  # the image may have been turned to fit its mask
        else:
            image, mask = read_item(item)
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
        pixels, ignored = counts[:NUM_CLASSES], counts[IGNORE_LABEL]
    return ManifestItem(item.name, height, width, pixels, ignored), dict(zip(job.outputs, arrays))


def kind_of(error: UserError, item: Item) -> str:
    """What an error has in common with those of other files: its words, without the file and the numbers."""
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
        with atomic_write(path) as file:  # not np.save, whose errors do not tell that a disk is full
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data)


def read_earlier(folder: Path, settings: Settings, labelled: bool) -> Manifest | None:
    """What an earlier run of the same settings wrote into `folder`; None if there is nothing.

    Raises:
        UserError: it holds files of other settings, or of unknown ones.
    """
    if not exists(folder / "manifest.json"):
        if any(folder.glob("imgs/*.npy")) or any(folder.glob("gts/*.npy")):
            raise UserError(f"{folder}: holds .npy files but no manifest.json (--overwrite deletes and redoes them)")
        return None
    earlier = read_manifest(folder, allow_incomplete=True)
    found = Settings(earlier.image_size, earlier.image_dtype, earlier.resize_mode)
    if found != settings:
        raise UserError(f"{folder}: was written with {found}, not with {settings} (--overwrite redoes it)")
    if earlier.labelled != labelled:
        was, now = ("with", "none") if earlier.labelled else ("without", "some")
        raise UserError(f"{folder}: was written {was} masks, and there are {now} now (--overwrite redoes it)")
    return earlier


def redone(folder: Path, earlier: Manifest, jobs: list[Job]) -> str | None:
    """A line that says which files of an earlier run are not taken over, if there are any."""
    if earlier.sources is None:
        count = sum(any(exists(path) for path in job.outputs) for job in jobs)
        why = "an older version wrote them, without a record of their sources"
    else:
        count = sum(job.item.name in earlier.sources and earlier.sources[job.item.name] != job.sources for job in jobs)
        why = "the image or its mask is not the file that it was (another path, size or date)"
    return f"{folder}: {count:,} of {len(jobs):,} images are done again: {why}" if count else None


def check_disk(output: Path, jobs: list[Job], overwrite: bool) -> None:
    """Raise UserError unless the disk of `output` has room for what `jobs` still have to write."""
    todo = [job for job in jobs if not job.done]

    def needed(itemsize: int) -> int:
        channels = (3 * itemsize + (job.item.mask is not None) for job in todo)
        return sum(math.prod(frame_size(job.settings.image_size)) * count for job, count in zip(todo, channels))

    place = next(path for path in (output, *output.absolute().parents) if exists(path))
    free = shutil.disk_usage(place).free
    # These go before the first write.
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
    """Make the split's folders and record its settings and sources.

    Files that are written anew are deleted first, as what is found beside this record counts as made from its sources;
    with `overwrite`, so are all others.
    """
    try:
        for path in [*folder.glob("imgs/*.npy"), *folder.glob("gts/*.npy")] if overwrite else ():
            path.unlink()
        for path in (path for job in jobs if not job.done for path in job.outputs):
            path.unlink(missing_ok=True)
        if overwrite:
            with suppress(OSError):  # a split without labels has no gts/; if other files are in it, it stays
                (folder / "gts").rmdir()
        for kind in ("imgs", "gts") if manifest.labelled else ("imgs",):
            (folder / kind).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror} (choose another --output_path)") from None
    remove_temporaries(folder)
    manifest.write(folder)


def unpaired(split: Split) -> list[str]:
    """One line for each image without a mask and each mask without an image, the first ten of each kind."""
    lines = []
    kinds = {"image without a mask": split.images_without_mask, "mask without an image": split.masks_without_image}
    for what, paths in kinds.items():
        lines += [f"{path}: {what} (add the other or remove this one)" for path in paths[:MAX_LISTED]]
        if len(paths) > MAX_LISTED:
            lines.append(f"{paths[0].parent}: {what}: {len(paths)} in all, the first {MAX_LISTED} are listed above")
    return lines


def grouped(folder: Path, failures: Iterable[Failure]) -> list[str]:
    """The first ten failures of each kind, and how many more there are."""
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
    """Print a split's counts, its folder and, if it has labels, its pixels per class."""
    earlier = f", {kept} of them by an earlier run" if kept else ""
    found = len(split.items) + len(split.images_without_mask)
    print(f"\n{folder}: {len(manifest.items)} of {found} images written{earlier}")
    if not (manifest.labelled and manifest.items):
        return
    rows = [(c.id, c.name, sum(item.pixels[c.id] for item in manifest.items)) for c in CLASSES]
    rows.append((IGNORE_LABEL, "not labelled", sum(item.ignored for item in manifest.items)))
    total = sum(count for _, _, count in rows)
    print(f" id  {'class':<14}{'pixels':>18}{'%':>9}")
    for label, name, count in rows:
        print(f"{label:>3}  {name:<14}{count:>18,}{100 * count / total:>9.3f}")
    if not has_labels(manifest):
        print(
            f"warning: {folder}: all masks are {IGNORE_LABEL} (not labelled) throughout; there is nothing to train "
            "or score on",
            file=sys.stderr,
            flush=True,
        )


def has_labels(manifest: Manifest) -> bool:
    return any(any(item.pixels) for item in manifest.items)


def next_command(output: Path, manifests: dict[str, Manifest]) -> str | None:
    """The command that trains on what was written; None where there is nothing to train on."""
    usable = [name for name, manifest in manifests.items() if has_labels(manifest)]
    train = next((name for name in ("train", *usable) if name in usable and name not in ("val", "test")), None)
    if train is None:
        return None
    model = "-model_type vit_b -checkpoint work_dir/SAM/sam_vit_b_01ec64.pth"
    # What the built-in model was made for, and too little for SAM's.
    if max(frame_size(manifests[train].image_size)) <= 256:
        model = "-model_type vit_tiny -checkpoint assets/sam_vit_tiny_scenes.pth"
    lines = [
        f"python train_bdd100k.py -i {shlex.quote(str(output / train))} -task_name BDD100K-SAM-MaskDecoder",
        f"{model} -work_dir ./work_dir",
        "-batch_size 4 -num_epochs 100 -lr 5e-5 -use_amp --grad_acc_steps 4",
    ]
    if "val" in usable:
        lines.append(f"--val_npy_path {shlex.quote(str(output / 'val'))}")
    return " \\\n        ".join(lines)


def main(args: Namespace) -> int:
    settings = Settings(args.image_size, args.image_dtype, args.resize_mode)
    # Everything that can be known to fail fails here, before the first write.
    splits = {name: find_split(args.bdd100k_root, name) for name in args.splits}
    doubts = [doubt for split in splits.values() if (doubt := check_first_masks(split))]
    jobs: dict[str, list[Job]] = {}
    earlier_items: dict[str, dict[str, ManifestItem]] = {}
    places = "; ".join(note for split in splits.values() for note in split.notes)
    notes = [places] if places else []
    for name, split in splits.items():
        folder = args.output_path / name
        earlier = None if args.overwrite else read_earlier(folder, settings, split.labelled)
        jobs[name] = make_jobs(split, folder, settings, earlier)
        earlier_items[name] = {item.name: item for item in earlier.items} if earlier else {}
        if earlier and (note := redone(folder, earlier, jobs[name])):
            notes.append(note)
    check_disk(args.output_path, [job for split_jobs in jobs.values() for job in split_jobs], args.overwrite)

    for note in dict.fromkeys(notes):
        print(printable(note), flush=True)
    if len({split.base for split in splits.values()}) > 1:
        found = ", ".join(f"{name} in {split.base}" for name, split in splits.items())
        print(
            printable(
                f"warning: the splits are in different folders ({found}); if they are not of one data set, "
                "give another --bdd100k_root"
            ),
            file=sys.stderr,
            flush=True,
        )
    for doubt in doubts:
        print(printable(f"warning: {doubt}"), file=sys.stderr, flush=True)
    manifests = {}
    for name, split in splits.items():
        sources = {job.item.name: job.sources for job in jobs[name] if job.sources}
        manifests[name] = Manifest(**vars(settings), labelled=split.labelled, complete=False, items=[], sources=sources)
        masks = f"{len(split.items)} with a mask" if split.labelled else f"no masks in {split.mask_dir}, so no gts/"
        print(f"{name}: {len(split.items) + len(split.images_without_mask)} images, {masks}", flush=True)
        if not split.labelled and name != "test":
            print(
                f"warning: without masks, {name} is nothing to train or score on; BDD100K's are a download of their "
                "own, to be unpacked into the same folder",
                file=sys.stderr,
                flush=True,
            )
        if foreign := foreign_pictures(split.items[0].image.parent):
            print(
                printable(
                    f"warning: {name}: {len(foreign)} pictures are of formats that are not read and were left "
                    f"out, such as {foreign[0]}; convert them to JPEG or PNG"
                ),
                file=sys.stderr,
                flush=True,
            )
    errors: list[str] = []
    suspect: list[str] = []
    try:
        for name, manifest in manifests.items():
            begin(args.output_path / name, manifest, jobs[name], args.overwrite)
        # Seldom where stderr is a file, so that a log stays readable.
        pace = 0.2 if sys.stderr.isatty() else 30
        with tqdm(total=sum(map(len, jobs.values())), unit="image", mininterval=pace) as progress:
            for name, split in splits.items():
                progress.set_description(name)
                results = run_jobs(process, jobs[name], args.num_workers, progress.update)
                stay = {job.item.name for job, r in zip(jobs[name], results) if isinstance(r, Failure) and r.stays}
                # What a stopped run left has no items; the record of its sources stays all the same.
                known = [
                    earlier_items[name].get(job.item.name) if job.item.name in stay else result
                    for job, result in zip(jobs[name], results)
                ]
                items = [item for item in known if isinstance(item, ManifestItem)]
                failures = [result for result in results if isinstance(result, Failure)]
                wrong = sum(failure.kind == WRONG_LABELS for failure in failures)
                suspect += [f"{args.output_path / name}: wrong labels in {wrong:,} masks"] if wrong else []
                errors += grouped(args.output_path / name, failures) + unpaired(split)
                there = {item.name for item in items} | stay
                sources = {key: files for key, files in (manifests[name].sources or {}).items() if key in there}
                manifests[name] = replace(manifests[name], complete=True, items=items, sources=sources)
                manifests[name].write(args.output_path / name)
    except KeyboardInterrupt:
        again = ", without --overwrite, which begins anew," if args.overwrite else ""
        raise KeyboardInterrupt(f"run the same command again{again} to go on") from None
    finally:
        for name in splits:
            remove_temporaries(args.output_path / name)

    for name, split in splits.items():
        report(args.output_path / name, split, manifests[name], kept=sum(job.done for job in jobs[name]))
    command = None if suspect or doubts else next_command(args.output_path, manifests)
    if command:
        print(f"\nNext:\n    {command}")
    sys.stdout.flush()  # before the errors, in whatever file the two may share
    for line in suspect:
        print(f"warning: {line}; the others may be of the same kind, so check them before training", file=sys.stderr)
    for error in errors:
        print(f"error: {printable(error)}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    cli.run(lambda: main(get_args_parser().parse_args()))
