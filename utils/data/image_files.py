"""Picture files reduced to what their pixels depend on, before Pillow decodes them.

Pillow rejects a good picture for what surrounds it: a large profile or text, a damaged thumbnail, a second picture or a
video after the first. It also accepts some pictures that are cut off.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from utils.runtime.errors import UserError
from utils.runtime.files import open_untrusted

MAX_PIXELS = (1 << 28) // 3  # 256 MiB of RGB, Pillow's own limit
MAX_BYTES = 4 * MAX_PIXELS  # of a file
MAX_JPEG_SCANS = 100  # a progressive JPEG has about ten; each scan is a pass over the whole picture
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # in any case
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # as Pillow calls them
DAMAGED = "(the file is damaged; get it again)"

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
# FF begins a marker, unless 00 or another FF follows. Markers 01 and D0 to D7 occur inside a scan.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
_JPEG_END, _JPEG_START, _JPEG_SCAN = 0xD9, 0xD8, 0xDA
_JPEG_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Comments and application segments, except JFIF's (E0) and Adobe's (EE): these define the colours.
_JPEG_METADATA = (set(range(0xE1, 0xF0)) - {0xEE}) | {0xFE}
# Formats that are not supported, by their bytes at an offset.
_FOREIGN = (
    (4, re.compile(rb"ftyp(hei[cxms]|hev[cmx]|mif[12]|msf1)"), "HEIC"),
    (4, re.compile(rb"ftypavi[fs]"), "AVIF"),
    (0, re.compile(rb"GIF8[79]a"), "GIF"),
    (0, re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "JPEG 2000"),
    (0, re.compile(rb"\0\0\0\x0cJXL |\xff\x0a"), "JPEG XL"),
)


@dataclass(frozen=True)
class PictureFile:
    """A complete picture: `data` for Pillow, and its EXIF, b"" if it has none."""

    data: bytes
    exif: bytes = b""


class _Bad(Exception):
    """What is wrong with the picture, and what to do."""


def read_picture_file(path: Path) -> PictureFile:
    """Read a JPEG, PNG, WebP, BMP or TIFF up to the end of its picture.

    JPEG and PNG come without metadata. The other formats have no end marker: if a part was filled with zeros, the
    picture is still valid.

    Raises:
        UserError: the file is missing or of another kind, or the picture is cut off or damaged.
        UnreadableError: the system does not let us read it.
    """
    with open_untrusted(path, MAX_BYTES, fix="remove it from the data") as file:
        data = file.read()
    try:
        return _picture(data)
    except _Bad as error:
        raise UserError(f"{path}: {error}") from None


def _picture(data: bytes) -> PictureFile:
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    if data.startswith((b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return PictureFile(data)
    for at, beginning, kind in _FOREIGN:
        if beginning.match(data, at):
            raise _Bad(f"{kind} is not supported; convert the picture to JPEG or PNG")
    raise _Bad(f"not a JPEG, PNG, WebP, BMP or TIFF picture {DAMAGED}")


def _jpeg(data: bytes) -> PictureFile:
    """The first picture of a JPEG, without metadata and without bytes between segments.

    An interrupted download or a full disk can leave a file whose end is zeros. Pillow decodes it to an image with a
    flat lower part; here it has no end marker.
    """
    kept, at, scans, in_scan, exif = [data[:2]], 2, 0, False, b""
    while marker := _JPEG_MARKER.search(data, at):
        code = marker[1][0]
        if in_scan:
            kept.append(data[at : marker.start()])
        if code == _JPEG_END:
            if scans > MAX_JPEG_SCANS:
                raise _Bad(f"has {scans} scans and would take hours to decode; save it again, or remove it")
            return PictureFile(b"".join([*kept, marker[0]]), exif)
        if code == _JPEG_START:  # of another picture: the end of this one is missing
            break
        body = marker.end() + 2
        if len(data) < body:
            break
        at = marker.end() + struct.unpack_from(">H", data, marker.end())[0]
        if at < body:
            raise _Bad(f"cannot be decoded: a JPEG segment has no length {DAMAGED}")
        if len(data) < at:
            break
        if code in _JPEG_FRAMES and data[body : body + 1] not in (b"", b"\x08"):
            raise _Bad(f"not an 8-bit image (a JPEG of {data[body]} bits); convert it to 8 bits a channel")
        in_scan = code == _JPEG_SCAN
        scans += in_scan
        if code not in _JPEG_METADATA:
            kept.append(data[marker.start() : at])
        elif code == 0xE1 and data.startswith(b"Exif\0\0", body):
            exif = exif or data[body:at]
    raise _Bad(f"truncated, the JPEG has no end {DAMAGED}")


def _png(data: bytes) -> PictureFile:
    """A PNG up to its end chunk, without metadata. Checksums are compared, which Pillow does not do."""
    kept, at, exif, has_pixels = [_PNG], len(_PNG), b"", False
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if not kind.isalpha():
            raise _Bad(f"cannot be decoded: broken PNG (chunk {kind!r}) {DAMAGED}")
        if kind == b"IEND":
            if not has_pixels:
                raise _Bad(f"cannot be decoded: a PNG without pixels {DAMAGED}")
            return PictureFile(b"".join([*kept, _IEND]), exif)
        end = at + 12 + length
        is_metadata = bool(kind[0] & 0x20)  # a lower-case letter marks what a viewer may skip
        if end > len(data):
            break
        if not is_metadata or kind == b"eXIf":
            is_right = zlib.crc32(data[at + 4 : end - 4]) == struct.unpack_from(">I", data, end - 4)[0]
            if is_metadata:
                exif = data[at + 8 : end - 4] if is_right else exif
            elif not is_right:
                raise _Bad(f"cannot be decoded: broken PNG (checksum of {kind.decode()}) {DAMAGED}")
            elif kind not in _PNG_PIXELS:  # such as Apple's CgBI, with its own pixel order and compression
                raise _Bad(f"not a standard PNG (it has a chunk {kind.decode()}); save it again as PNG or JPEG")
            else:
                kept.append(data[at:end])
                has_pixels = has_pixels or kind == b"IDAT"
        at = end
    raise _Bad(_NO_END)


_IEND = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))


def _webp(data: bytes) -> PictureFile:
    """A WebP up to the end that its header gives."""
    end = 8 + int.from_bytes(data[4:8], "little")
    if len(data) < end:
        raise _Bad(_NO_END)
    if data[12:16] == b"VP8X":  # Pillow allocates this size before it reports it
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        if width * height > MAX_PIXELS:
            raise _Bad(ABSURD_SIZE)
    return PictureFile(data[:end])


_NO_END = f"cannot be decoded: its end is missing {DAMAGED}"
ABSURD_SIZE = f"its header claims an absurd size, above {MAX_PIXELS / 1e6:.0f} megapixels {DAMAGED}"
