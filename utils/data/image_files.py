"""Picture files walked along the structure of their format, so that Pillow sees nothing but what the pixels depend on.

A decoder fails on a picture for what is around it: a profile or a text larger than it allows, a damaged thumbnail, a
second picture or a video behind the first. It also takes some pictures that are not all there.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from utils.runtime.errors import UserError
from utils.runtime.files import cannot_be_read, status

MAX_PIXELS = (1 << 28) // 3  # 256 MiB of RGB, which is Pillow's own limit; a picture that claims more is not read
MAX_BYTES = 4 * MAX_PIXELS  # of a file up to the end of its picture
MAX_JPEG_SCANS = 100  # a progressive JPEG has about ten; each is a pass over the whole picture, be it of a few bytes
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # as Pillow calls them
DAMAGED = "(the file is damaged: get it again)"

_FIRST_READ = 16 << 20  # nearly all pictures end before it
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
# A byte FF begins a marker, unless 00 or another FF follows. The 01 and the D0 to D7 are inside a scan.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
_JPEG_END, _JPEG_START, _JPEG_SCAN = 0xD9, 0xD8, 0xDA
_JPEG_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Comments and application segments, but JFIF's (E0) and Adobe's (EE), which say what the colours are.
_JPEG_METADATA = (set(range(0xE1, 0xF0)) - {0xEE}) | {0xFE}
# Pictures of other formats, by the bytes at some place: they are healthy, and only not read here.
_FOREIGN = (
    (4, re.compile(rb"ftyp(hei[cxms]|hev[cmx]|mif[12]|msf1)"), "HEIC"),
    (4, re.compile(rb"ftypavi[fs]"), "AVIF"),
    (0, re.compile(rb"GIF8[79]a"), "GIF"),
    (0, re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "JPEG 2000"),
    (0, re.compile(rb"\0\0\0\x0cJXL |\xff\x0a"), "JPEG XL"),
)


@dataclass(frozen=True)
class PictureFile:
    """A picture that is all there: `data` for Pillow, and its EXIF, b"" where it has none."""

    data: bytes
    exif: bytes = b""


class _Cut(Exception):
    """The data end before the picture does."""


class _Bad(Exception):
    """What is wrong with the picture, and what to do."""


def read_picture_file(path: Path) -> PictureFile:
    """Read a JPEG, PNG, WebP, BMP or TIFF up to the end of its picture.

    JPEG and PNG come without metadata. The other three formats have no end that could be looked for, and a part of
    them that was filled with zeros is a valid picture.

    Raises:
        UserError: the file is missing or of another kind, the picture is cut off or damaged; an `UnreadableError`, the
            system does not let us read it.
    """
    found = status(path)
    if found and not (S_ISREG(found.st_mode) or S_ISDIR(found.st_mode)):  # a pipe would keep us waiting
        raise UserError(f"{path}: not a regular file; take it out of the folder")
    try:
        with open(path, "rb") as file:
            data = file.read(_FIRST_READ)
            try:
                return _picture(data, is_all=len(data) < _FIRST_READ)
            except _Cut:
                rest = file.read(MAX_BYTES - len(data))
                more = file.read(1)
            return _picture(data + rest, is_all=not more)
    except OSError as error:
        raise cannot_be_read(path, error) from None
    except _Bad as error:
        raise UserError(f"{path}: {error}") from None
    except _Cut:
        if more:
            raise UserError(f"{path}: has more bytes than the largest picture that is read {DAMAGED}") from None
        what = "truncated, the JPEG has no end" if data[:2] == b"\xff\xd8" else "cannot be decoded: its end is missing"
        raise UserError(f"{path}: {what} {DAMAGED}") from None


def _picture(data: bytes, *, is_all: bool) -> PictureFile:
    """
    Args:
        is_all: the file has no more bytes.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    if data.startswith((b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        if not is_all:
            raise _Cut  # perhaps: read on
        return PictureFile(data)
    for at, beginning, kind in _FOREIGN:
        if beginning.match(data, at):
            raise _Bad(f"a {kind} picture, which is not read here; convert it to JPEG or PNG")
    raise _Bad(f"neither a JPEG nor a PNG image, nor a WebP, BMP or TIFF {DAMAGED}")


def _jpeg(data: bytes) -> PictureFile:
    """Without metadata and what else is between its segments, to the end of the first picture.

    Pillow notices a file that is cut off, but takes one whose missing end was filled with zeros, which is what an
    interrupted download or a full disk may leave, for an image with a flat lower part.
    """
    kept, at, scans, in_scan, exif = [data[:2]], 2, 0, False, b""
    while marker := _JPEG_MARKER.search(data, at):
        code = marker[1][0]
        if in_scan:
            kept.append(data[at : marker.start()])
        if code == _JPEG_END:
            if scans > MAX_JPEG_SCANS:
                raise _Bad(f"has {scans} scans, which would take hours to decode (save it anew, or leave it out)")
            return PictureFile(b"".join([*kept, marker[0]]), exif)
        if code == _JPEG_START:  # of a picture behind this one, whose end was lost
            raise _Bad(f"truncated, the JPEG has no end before another begins {DAMAGED}")
        body = marker.end() + 2
        if len(data) < body:
            break
        at = marker.end() + struct.unpack_from(">H", data, marker.end())[0]
        if at < body:
            raise _Bad(f"cannot be decoded: a segment of the JPEG has no length {DAMAGED}")
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
    raise _Cut


def _png(data: bytes) -> PictureFile:
    """Without metadata, up to its end chunk. Checksums are compared, which decoding alone does not do."""
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
        is_metadata = bool(kind[0] & 0x20)  # a small letter: the picture can be shown without it
        if end > len(data):
            break
        if not is_metadata or kind == b"eXIf":
            is_right = zlib.crc32(data[at + 4 : end - 4]) == struct.unpack_from(">I", data, end - 4)[0]
            if is_metadata:
                exif = data[at + 8 : end - 4] if is_right else exif
            elif not is_right:
                raise _Bad(f"cannot be decoded: broken PNG (checksum of {kind.decode()}) {DAMAGED}")
            elif kind not in _PNG_PIXELS:  # Apple's CgBI: pixels in an order and a compression of its own
                raise _Bad(f"not a standard PNG (it has a chunk {kind.decode()}); save it anew as PNG or JPEG")
            else:
                kept.append(data[at:end])
                has_pixels = has_pixels or kind == b"IDAT"
        at = end
    raise _Cut


_IEND = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))


def _webp(data: bytes) -> PictureFile:
    """Up to the end that its header tells."""
    end = 8 + int.from_bytes(data[4:8], "little")
    if len(data) < end:
        raise _Cut
    if data[12:16] == b"VP8X":  # Pillow makes room for this size before it tells it
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        if width * height > MAX_PIXELS:
            raise _Bad(ABSURD_SIZE)
    return PictureFile(data[:end])


ABSURD_SIZE = f"its header claims an absurd size, above {MAX_PIXELS / 1e6:.0f} megapixels {DAMAGED}"
