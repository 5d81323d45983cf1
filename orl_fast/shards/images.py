"""Images as they are packed: decoded in full to check them, and stored as JPEGs that every later decoder accepts."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import compress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
JPEG_QUALITY = 95
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_MAX_SIDE_PX = 65_500  # libjpeg's limit
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, all Huffman coded
_STANDALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length
_T = Image.Transpose
_UPRIGHT = (_T.FLIP_LEFT_RIGHT, _T.ROTATE_180, _T.FLIP_TOP_BOTTOM, _T.TRANSPOSE, _T.ROTATE_270, _T.TRANSVERSE, _T.ROTATE_90)
_ROTATIONS = dict(enumerate(_UPRIGHT, start=2))  # EXIF orientation → transposition that makes the image upright


class BadImage(Exception):
    """The image cannot be decoded in full; the message is the reason."""


class PackedImage(NamedTuple):
    """A JPEG to pack: upright, RGB or gray. `reencoded` is the reason why it does not hold the original bytes."""

    jpeg: bytes
    width: int
    height: int
    reencoded: str | None


def decode_rgb(data: bytes | NDArray[np.uint8]) -> Image.Image:
    """Decode an image file to RGB, ignoring metadata."""
    with Image.open(io.BytesIO(data if isinstance(data, bytes) else data.data)) as image:
        return image.convert("RGB")


def packed_image(data: bytes) -> PackedImage:
    """Decode an image in full; keep its bytes if they are a plain JPEG, re-encode it otherwise.

    Kept: a baseline or progressive JPEG in RGB or gray without an EXIF rotation. Everything else becomes a JPEG of quality 95 without
    chroma subsampling: rotation applied, transparency on white, 16 bits reduced to 8, the first frame of an animation.
    Raises BadImage if it is empty, of unknown format, truncated, damaged, of 179 million pixels or more, or too large for the memory.
    """
    with _plain_reasons(data):
        return _packed(data)


def upright_rgb(data: bytes) -> Image.Image:
    """Decode an image in full to RGB, as `packed_image` does and with its errors, but without encoding it again."""
    with _plain_reasons(data):
        return _decoded(data)[0].convert("RGB")


@contextmanager
def _plain_reasons(data: bytes) -> Iterator[None]:
    if not data:
        raise BadImage("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata; anything that matters raises
            yield
    except UnidentifiedImageError as error:
        raise BadImage("not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise BadImage("too large: at most 178,956,970 pixels are decoded") from error
    except MemoryError as error:
        raise BadImage("too large: decoding it takes more memory than there is") from error
    except BadImage:
        raise
    except Exception as error:  # decoders raise anything at all on garbage; whatever it was, the cause is this image
        raise BadImage(f"cannot be decoded: {error or type(error).__name__}") from error


def _packed(data: bytes) -> PackedImage:
    upright, reencoded = _decoded(data)
    if not reencoded:
        return PackedImage(jpeg=data, width=upright.width, height=upright.height, reencoded=None)
    if max(upright.size) > _MAX_SIDE_PX:
        raise BadImage(f"too large: a side of {max(upright.size)} px, JPEG has at most {_MAX_SIDE_PX}")
    upright.info.clear()  # otherwise Pillow copies comments into the JPEG
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return PackedImage(jpeg=buffer.getvalue(), width=upright.width, height=upright.height, reencoded=reencoded)


def _decoded(data: bytes) -> tuple[Image.Image, str]:
    """The upright image, RGB or gray, and the reason why its file cannot be packed as it is, if there is one."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        image.load()  # raises where data is missing
        rotation, is_jpeg = None, image.format in ("JPEG", "MPO")
        with suppress(Exception):  # garbage in the EXIF data is no reason to lose the image
            rotation = _ROTATIONS.get(int(image.getexif().get(ExifTags.Base.Orientation, 1)))
        is_odd = is_jpeg and _frame(data) not in _PLAIN_FRAMES
        reasons = (str(image.format), "arithmetic-coded or lossless JPEG", image.mode, "EXIF rotation")
        reencoded = " ".join(compress(reasons, (not is_jpeg, is_odd, image.mode not in ("RGB", "L"), rotation is not None)))
        return (_eight_bit(image if rotation is None else image.transpose(rotation)) if reencoded else image), reencoded


def _frame(jpeg: bytes) -> int:
    """The code of the frame header (SOF); BadImage if no end marker follows the first scan: decoders would fill in the missing part."""
    at, code, frame = 2, 0, 0
    while code != 0xDA and at + 4 <= len(jpeg):
        if jpeg[at] != 0xFF:
            raise BadImage("damaged JPEG: a marker is missing")
        code = jpeg[at + 1]
        if code == 0xFF:  # padding
            at += 1
        elif code in _STANDALONE:
            at += 2
        else:
            frame = code if code in _FRAMES else frame
            at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    if jpeg.rfind(b"\xff\xd9", at) < 0:
        raise BadImage("truncated JPEG: the end marker is missing")
    return frame


def _eight_bit(image: Image.Image) -> Image.Image:
    """RGB or L, with transparent parts on white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65_535:
            raise BadImage(f"samples of mode {image.mode} have no known range")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")
