"""One image's bytes, checked by decoding it in full, as a JPEG that every later decoder takes."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

JPEG_QUALITY = 95
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_MAX_SIDE_PX = 65_500  # libjpeg's limit
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, all Huffman coded
_STANDALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length
_TURNS = {  # EXIF orientation → what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """The bytes are no image that can be decoded in full; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class PackedImage:
    """A JPEG to pack: upright, RGB or grey. `reencoded` tells why it does not hold the original bytes."""

    jpeg: bytes
    width: int
    height: int
    reencoded: str | None


def packed_image(data: bytes) -> PackedImage:
    """Decode an image in full; keep its bytes where they are a plain JPEG, re-encode it otherwise.

    Kept: a baseline or progressive JPEG in RGB or grey whose EXIF asks for no rotation. All else becomes a JPEG of quality 95 without
    chroma subsampling: rotation applied, transparency on white, 16 bits reduced to 8, the first frame of an animation.

    Raises:
        BadImage: empty, of no known format, truncated, damaged, or 179 million pixels and more.
    """
    if not data:
        raise BadImage("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata does not matter here; what matters raises
            return _packed(data)
    except UnidentifiedImageError as error:
        raise BadImage("not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise BadImage("too large: at most 178,956,970 pixels are decoded") from error
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # a decoder raises anything at all on garbage; whatever it was, this image is at fault
        raise BadImage(f"cannot be decoded: {error or type(error).__name__}") from error


def _packed(data: bytes) -> PackedImage:
    odd = []  # why the bytes cannot be kept
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        image.load()  # raises where data is missing
        if image.format not in ("JPEG", "MPO"):
            odd.append(str(image.format))
        elif _frame(data) not in _PLAIN_FRAMES:
            odd.append("arithmetic-coded or lossless JPEG")
        if image.mode not in ("RGB", "L"):
            odd.append(image.mode)
        turn = _TURNS.get(_orientation(image))
        if turn is not None:
            odd.append("EXIF rotation")
        if not odd:
            return PackedImage(jpeg=data, width=image.width, height=image.height, reencoded=None)
        upright = _eight_bit(image if turn is None else image.transpose(turn))
    if max(upright.size) > _MAX_SIDE_PX:
        raise BadImage(f"too large: a side of {max(upright.size)} px, JPEG has at most {_MAX_SIDE_PX}")
    upright.info.clear()  # or Pillow copies comments into the JPEG
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return PackedImage(jpeg=buffer.getvalue(), width=upright.width, height=upright.height, reencoded=" ".join(odd))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # garbage in the EXIF data is no reason to lose the picture
        return 1


def _frame(jpeg: bytes) -> int:
    """The code of the frame header (SOF).

    Raises:
        BadImage: no end marker follows the first scan, so that decoders fill in what is missing.
    """
    at, code, frame = 2, 0, 0
    while code != 0xDA and at + 4 <= len(jpeg):
        if jpeg[at] != 0xFF:
            raise BadImage("damaged JPEG: a marker is missing")
        code = jpeg[at + 1]
        if code == 0xFF:  # filling
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
    """RGB or L, on white where it is transparent."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65_535:
            raise BadImage(f"samples of mode {image.mode} have no known range")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")
