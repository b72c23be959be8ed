"""utils.data.image_files: what lies around the pixels of a picture never makes it bad; what is missing of them does."""

from __future__ import annotations

import errno
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from utils.data.bdd100k import read_image, read_mask, read_size
from utils.data.image_files import read_picture_file
from utils.runtime.errors import UnreadableError, UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
OTHER = PIXELS[::-1, :20]


def encoded(kind: str, pixels: np.ndarray = PIXELS, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def segment(code: int, body: bytes) -> bytes:
    return b"\xff" + bytes([code]) + struct.pack(">H", len(body) + 2) + body


def chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def read(path: Path, data: bytes) -> np.ndarray:
    path.write_bytes(data)
    image = read_image(path)
    assert read_size(path) == image.shape[:2]
    return image


JPEG, PNG = encoded("JPEG", quality=90), encoded("PNG")
PROGRESSIVE = encoded("JPEG", quality=90, progressive=True)
EXIF = b"Exif\0\0MM\0*\0\0\0\x08" + b"\xff\xd8\xff\xda\xff\xd9" * 5


def in_jpeg(*segments: bytes) -> bytes:
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


@pytest.mark.parametrize("whole", [JPEG, PROGRESSIVE], ids=["baseline", "progressive"])
@pytest.mark.parametrize(
    "behind",
    [
        b"\0" * 5000,
        b"\xff\xda",
        b"\xff\xd8\xff\xda\0\0",
        encoded("JPEG", OTHER),
        encoded("JPEG", OTHER)[:-300],
        b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 40,
        b"SEFH\xff\xda" * 9,
    ],
    ids=["zeros", "marker", "start", "another", "cut one", "video", "trailer"],
)
def test_what_follows_a_jpeg_does_not_matter(tmp_path: Path, whole: bytes, behind: bytes) -> None:
    assert np.array_equal(read(tmp_path / "a.jpg", whole + behind), read(tmp_path / "b.jpg", whole))


@pytest.mark.parametrize(
    "segments",
    [
        [segment(0xE1, EXIF)],
        [segment(0xE1, EXIF + b"\xff\xda" * 1000)],
        [segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 9]) + bytes(65000)) for i in range(1, 10)],
        [segment(0xE2, b"ICC_PROFILE\0" + b"\x07\x02" + b"no profile")],
        [segment(0xE2, b"MPF\0II*\0\x08\0\0\0" + b"\xff" * 30)],
        [segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04" + b"\xff" * 7)],
        [segment(0xFE, bytes(65000))] * 400,
        [segment(0xE1, JPEG[:3000]), b"\0\0\0", segment(0xEF, b"")],
        [b"\xff\xff\xff", b"\x01" + segment(0xE3, b"x")],
    ],
    ids=["exif", "exif of scans", "large ICC", "bad ICC", "bad MPF", "bad Photoshop", "26 MB", "thumbnail", "fill"],
)
def test_metadata_of_a_jpeg_does_not_matter(tmp_path: Path, segments: list[bytes]) -> None:
    assert np.array_equal(read(tmp_path / "a.jpg", in_jpeg(*segments)), read(tmp_path / "b.jpg", JPEG))


def test_several_pictures_in_one_jpeg(tmp_path: Path) -> None:
    """As cameras write them: the first is the picture."""
    first, *more = (Image.fromarray(pixels) for pixels in (PIXELS, OTHER, OTHER))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=more, quality=90)
    assert Image.open(tmp_path / "a.jpg").format == "MPO"
    assert np.array_equal(read_image(tmp_path / "a.jpg"), read(tmp_path / "b.jpg", JPEG))
    data = (tmp_path / "a.jpg").read_bytes()
    end = data.index(b"\xff\xd9", len(JPEG) // 2)  # of the first
    for spoilt in (data[: end - 900] + bytes(902) + data[end + 2 :], data[: end - 900] + data[end + 2 :]):
        with pytest.raises(UserError, match=r"a\.jpg: truncated, the JPEG has no end"):
            read(tmp_path / "a.jpg", spoilt)


def test_colours_of_a_jpeg_are_those_that_its_segments_tell(tmp_path: Path) -> None:
    for mode in ("L", "RGB", "CMYK"):
        Image.fromarray(PIXELS).convert(mode).save(tmp_path / "a.jpg", quality=90)
        assert np.array_equal(read_image(tmp_path / "a.jpg"), np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB")))
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", quality=90, keep_rgb=True)  # Adobe's segment says so
    assert np.array_equal(read_image(tmp_path / "a.jpg"), np.asarray(Image.open(tmp_path / "a.jpg")))


def test_a_jpeg_of_twelve_bits_is_not_damaged(tmp_path: Path) -> None:
    data = bytearray(JPEG)
    data[data.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(UserError, match=r"a\.jpg: not an 8-bit image \(a JPEG of 12 bits\); convert it"):
        read(tmp_path / "a.jpg", bytes(data))


def in_png(*chunks: bytes, end: bool = False) -> bytes:
    at = len(PNG) - 12 if end else 33
    return PNG[:at] + b"".join(chunks) + PNG[at:]


PACKED = zlib.compress(bytes(80 << 20))


@pytest.mark.parametrize("end", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"iCCP", b"p\0\0" + PACKED),
        chunk(b"iCCP", b"p\0\0" + b"no zlib"),
        chunk(b"zTXt", b"k\0\0" + PACKED),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\x01\0\0\0" + PACKED),
        chunk(b"tEXt", b"k\0" + b"x" * (20 << 20)),
        chunk(b"tEXt", b"k\0text", checksum=1),
        chunk(b"tRNS", b"") + chunk(b"gAMA", b"") + chunk(b"pHYs", b"1") + chunk(b"sBIT", b"") + chunk(b"cHRM", b"1"),
        chunk(b"eXIf", EXIF) + chunk(b"eXIf", b"II*\0", checksum=1),
        chunk(b"acTL", b"") + chunk(b"fcTL", b"12") + chunk(b"fdAT", b""),
    ],
    ids=["large ICC", "bad ICC", "zTXt", "XMP", "tEXt", "checksum", "short", "exif", "animation"],
)
def test_metadata_of_a_png_does_not_matter(tmp_path: Path, extra: bytes, end: bool) -> None:
    assert np.array_equal(read(tmp_path / "a.png", in_png(extra, end=end)), PIXELS)


def test_a_mask_with_metadata_is_read(tmp_path: Path) -> None:
    mask = np.full((40, 56), 3, np.uint8)
    info = PngImagePlugin.PngInfo()
    info.add_text("k", "x" * (2 << 20), zip=True)
    Image.fromarray(mask).save(tmp_path / "a.png", pnginfo=info, icc_profile=bytes(2 << 20), transparency=3)
    assert np.array_equal(read_mask(tmp_path / "a.png", 40, 56), mask)


def test_what_follows_a_png_and_its_animation_do_not_matter(tmp_path: Path) -> None:
    for behind in (bytes(5000), PNG, b"IDAT" * 99, JPEG):
        assert np.array_equal(read(tmp_path / "a.png", PNG + behind), PIXELS)
    assert np.array_equal(read(tmp_path / "a.png", PNG[:-4]), PIXELS)  # nothing of the end chunk but its name counts
    frames = [Image.fromarray(pixels) for pixels in (PIXELS, PIXELS[::-1].copy())]
    for default in (False, True):
        frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], default_image=default)
        assert np.array_equal(read_image(tmp_path / "a.png"), PIXELS)


@pytest.mark.parametrize("kind", ["BMP", "TIFF"])
def test_a_file_longer_than_the_largest_picture_is_named(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(kind)
    monkeypatch.setattr("utils.data.image_files.MAX_BYTES", len(data) - 1)
    with pytest.raises(UserError, match=r"a: larger than \d+ MiB; remove it"):
        read(tmp_path / "a", data)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("filled", [False, True])
def test_a_cut_png_is_refused(tmp_path: Path, share: float, filled: bool) -> None:
    keep = int(len(PNG) * share)
    with pytest.raises(UserError, match=r"a\.png: .*the file is damaged"):
        read(tmp_path / "a.png", PNG[:keep] + bytes(len(PNG) - keep if filled else 0))


def test_a_png_of_apples_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.png: not a standard PNG \(it has a chunk CgBI\); save it again"):
        read(tmp_path / "a.png", PNG[:8] + chunk(b"CgBI", b"\x50\0\x20\2") + PNG[8:])


@pytest.mark.parametrize(("kind", "suffix"), [("WEBP", "jpg"), ("WEBP", "webp"), ("BMP", "bmp"), ("TIFF", "tif")])
def test_other_formats_are_read_whatever_the_file_is_called(tmp_path: Path, kind: str, suffix: str) -> None:
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    whole = encoded(kind, **options)
    path = tmp_path / f"a.{suffix}"
    assert np.array_equal(read(path, whole), PIXELS)
    assert np.array_equal(read(path, whole + bytes(999)), PIXELS)
    for share in (0.1, 0.5, 0.98):
        with pytest.raises(UserError, match=r"a\..*the file is damaged"):
            read(path, whole[: int(len(whole) * share)])


def test_a_tiff_is_turned_once(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "a.tif", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.tif", upright=True), np.rot90(PIXELS, -1))
    assert read_size(tmp_path / "a.tif") == (56, 40)


def test_a_large_picture_of_another_format_is_read_to_its_end(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2400, 2400, 3), dtype=np.uint8)  # 17 MB
    assert np.array_equal(read(tmp_path / "a.bmp", encoded("BMP", pixels)), pixels)


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x1cftypavif", "AVIF"),
        (b"GIF89a", "GIF"),
        (b"\xff\x0a", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n", "JPEG 2000"),
    ],
)
def test_formats_that_are_not_read_are_named(tmp_path: Path, start: bytes, kind: str) -> None:
    with pytest.raises(UserError, match=rf"a\.jpg: {kind} is not supported; convert the picture to JPEG"):
        read(tmp_path / "a.jpg", start + bytes(100))


def test_a_webp_that_claims_an_absurd_size_is_not_given_memory(tmp_path: Path) -> None:
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + b"\xff\xff\xff" * 2
    with pytest.raises(UserError, match=r"a\.webp: its header claims an absurd size"):
        read(tmp_path / "a.webp", b"RIFF" + struct.pack("<I", len(body)) + body)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("call", ["os.stat", "builtins.open"])
def test_the_systems_errors_are_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, "as the system says")

    with monkeypatch.context() as patch:
        patch.setattr(call, refuse)
        with pytest.raises(UnreadableError) as error:
            read_picture_file(tmp_path / "a.jpg")
    assert str(error.value) == f"{tmp_path / 'a.jpg'}: cannot be read (as the system says)"
