import contextlib
import io
import random
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_images import draw_image, encoded
from PIL import Image, ImageOps

from orl_fast.shards.images import BadImage, decode_rgb, packed_image


def decode(jpeg: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(jpeg))
    image.load()
    assert image.format == "JPEG"
    return image


def assert_close(image: Image.Image, expected: Image.Image, *, atol: float = 6) -> None:
    assert image.size == expected.size
    assert image.mode == expected.mode
    assert np.abs(np.asarray(image, float) - np.asarray(expected, float)).mean() < atol


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "optimize": True}])
def test_plain_jpegs_keep_their_bytes(draw, encode, mode, options):
    jpeg = encode(draw(0).convert(mode), **options)
    packed = packed_image(jpeg)
    assert packed.jpeg == jpeg
    assert packed.reencoded is None
    assert (packed.width, packed.height) == (40, 30)


def test_bytes_after_the_end_marker_and_metadata_stay(draw, encode):
    exif = Image.Exif()
    exif[0x0112] = 1
    jpeg = encode(draw(0), exif=exif, comment=b"\xff\xd9 in a comment") + b"trailer"
    assert packed_image(jpeg).jpeg == jpeg


def test_a_phones_multi_picture_file_is_a_plain_jpeg(draw, encode):
    jpeg = encode(draw(0), "MPO", save_all=True, append_images=[draw(1)])
    assert Image.open(io.BytesIO(jpeg)).format == "MPO"
    assert packed_image(jpeg).jpeg == jpeg


@pytest.mark.parametrize("side", [(1, 1), (1, 700), (700, 1)])
def test_tiny_images_are_packed(draw, encode, side):
    packed = packed_image(encode(draw(0, width=side[0], height=side[1])))
    assert (packed.width, packed.height) == side


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_rotation_is_baked_in(draw, encode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = draw(3)
    packed = packed_image(encode(source, exif=exif, quality=95))
    assert packed.reencoded == "EXIF rotation"
    image = decode(packed.jpeg)
    assert_close(image, ImageOps.exif_transpose(Image.open(io.BytesIO(encode(source, "PNG", exif=exif)))))
    assert not image.getexif()
    assert (packed.width, packed.height) == image.size


@pytest.mark.parametrize(
    "exif",
    [b"garbage", b"Exif\0\0", b"Exif\0\0garbage!", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\xff\xff"],
)
def test_garbage_in_the_metadata_loses_no_image(draw, encode, exif):
    jpeg = encode(draw(0), exif=exif)
    assert packed_image(jpeg).jpeg == jpeg


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_unknown_orientations_are_no_rotation(draw, encode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = encode(draw(0), exif=exif)
    assert packed_image(jpeg).jpeg == jpeg


@pytest.mark.parametrize(
    ("format_", "mode", "reason"),
    [
        ("PNG", "RGB", "PNG"),
        ("PNG", "L", "PNG"),
        ("PNG", "1", "PNG 1"),
        ("PNG", "P", "PNG P"),
        ("WEBP", "RGB", "WEBP"),
        ("BMP", "RGB", "BMP"),
        ("TIFF", "RGB", "TIFF"),
        ("TIFF", "CMYK", "TIFF CMYK"),
        ("TIFF", "LAB", "TIFF LAB"),
        ("GIF", "P", "GIF P"),
        ("JPEG", "CMYK", "CMYK"),
    ],
)
def test_other_kinds_become_jpegs(draw, encode, format_, mode, reason):
    source = Image.merge("LAB", draw(5).split()) if mode == "LAB" else draw(5).convert(mode)
    data = encode(source, format_)
    packed = packed_image(data)
    assert packed.reencoded == reason
    expected = Image.open(io.BytesIO(data))
    assert_close(decode(packed.jpeg), expected.convert("L" if mode in ("1", "L") else "RGB"), atol=25 if mode in ("1", "P") else 6)
    assert packed_image(data) == packed
    assert packed_image(packed.jpeg).reencoded is None


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_put_on_white(draw, encode, mode):
    source = draw(7).convert("RGBA")
    source.paste((0, 0, 0, 0), (0, 0, 20, 30))
    packed = packed_image(encode(source.convert(mode), "PNG"))
    assert packed.reencoded == f"PNG {mode}"
    pixels = np.asarray(decode(packed.jpeg))
    assert pixels.ndim == 3
    assert pixels[:, :16].min() > 240
    assert pixels[:, 24:].mean() < 240


def test_sixteen_bits_are_reduced_to_the_upper_eight(encode):
    values = np.linspace(0, 65_535, 64 * 48).reshape(48, 64).astype(np.uint16)
    packed = packed_image(encode(Image.fromarray(values), "PNG"))
    assert packed.reencoded == "PNG I;16"
    assert np.abs(np.asarray(decode(packed.jpeg), int) - (values >> 8)).max() <= 4


def test_first_frame_of_an_animation(draw, encode):
    data = encode(draw(1), "WEBP", save_all=True, append_images=[draw(2)], lossless=True)
    packed = packed_image(data)
    assert_close(decode(packed.jpeg), draw(1))


def test_reencoding_drops_metadata(draw, encode):
    jpeg = encode(draw(0).convert("CMYK"), comment=b"a comment", icc_profile=b"a profile")
    assert set(decode(packed_image(jpeg).jpeg).info) == {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_float_samples_are_refused(encode):
    with pytest.raises(BadImage, match="no known range"):
        packed_image(encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8", b"\xff\xd8\xff", bytes(5000), b"\x89PNG\r\n\x1a\n", b"<svg/>", b"%PDF-1.4"])
def test_other_files_are_refused(data):
    with pytest.raises(BadImage):
        packed_image(data)


def test_decompression_bombs_are_refused_by_their_header(encode):
    png = bytearray(encode(Image.new("L", (8, 8)), "PNG"))
    png[16:24] = (20_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    with pytest.raises(BadImage, match="178,956,970 pixels"):
        packed_image(bytes(png))


def test_large_images_pass_without_a_warning(encode):
    """Pillow warns from 89 million pixels on; tests turn warnings into errors."""
    packed = packed_image(encode(Image.new("L", (10_000, 9_000)), quality=10))
    assert (packed.width, packed.height) == (10_000, 9_000)


def test_sides_that_jpeg_cannot_hold_are_refused(encode):
    with pytest.raises(BadImage, match="65500"):
        packed_image(encode(Image.new("1", (70_000, 1)), "PNG"))


def test_zeros_to_the_end_are_a_truncation(draw, encode):
    """A download that stopped in a file of its final length: the decoder itself takes the zeros for data."""
    jpeg = encode(draw(0, width=300, height=200), quality=95)
    hole = jpeg[: len(jpeg) // 2] + bytes(4 * len(jpeg))
    with pytest.raises(BadImage, match="end marker"):
        packed_image(hole)


@settings(max_examples=150, deadline=None)
@given(cut=st.floats(0, 1, exclude_max=True), kind=st.sampled_from(["JPEG", "progressive", "PNG", "TIFF", "WEBP", "BMP"]))
def test_every_truncation_is_refused(cut, kind):
    source = draw_image(0, width=64, height=48)
    data = encoded(source, progressive=True) if kind == "progressive" else encoded(source, kind)
    end = data.rindex(b"\0\0\0\0IEND") - 12 if kind == "PNG" else len(data)  # after that, only checksums are missing
    with pytest.raises(BadImage):
        packed_image(data[: int(cut * end)])


def test_damaged_jpegs_that_are_kept_decode_alike_in_dali():
    """What is kept must not stop the later decoder, nor show it other pixels."""
    from nvidia.dali import fn, pipeline_def, types

    rng = random.Random(0)
    kept = []
    for i in range(400):
        data = bytearray(encoded(draw_image(i, width=64, height=48), progressive=i % 2 == 1, quality=90))
        at, length = rng.randrange(len(data)), rng.choice([1, 4, 40])
        data[at : at + length] = rng.randbytes(length)
        with contextlib.suppress(BadImage):
            packed = packed_image(bytes(data))
            if packed.reencoded is None:
                kept.append(packed)
    assert 50 < len(kept) < 350

    @pipeline_def(batch_size=len(kept), num_threads=1, device_id=None)
    def decoder():
        files = fn.external_source(lambda: [np.frombuffer(packed.jpeg, np.uint8) for packed in kept], batch=True)
        return fn.decoders.image(files, output_type=types.RGB, adjust_orientation=False)

    pipeline = decoder()
    pipeline.build()
    (images,) = pipeline.run()
    for packed, image in zip(kept, images, strict=True):
        pixels = np.asarray(image)
        assert pixels.shape == (packed.height, packed.width, 3)
        np.testing.assert_array_equal(pixels, decode(packed.jpeg).convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_images_are_decoded_to_rgb(draw, encode, mode):
    data = encode(draw(0).convert(mode))
    image = decode_rgb(np.frombuffer(data, np.uint8))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(image, decode(data).convert("RGB"))
    assert decode_rgb(data) == image
