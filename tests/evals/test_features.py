from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orl_fast.errors import ConfigError, DataError
from orl_fast.evals.features import encode_objects, feature_array, pad_boxes
from orl_fast.evals.labels import Objects
from orl_fast.models import Encoder, random_encoder
from orl_fast.recipe import load_config


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return random_encoder(load_config("demo"))


def _oracle(encoder: Encoder, image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return encoder.pooled(((pixels - mean[:, None, None]) / std[:, None, None])[None])[0]


def test_boxes_of_photographs_as_pil_would_cut_them(photo_paths: list[Path], encoder: Encoder) -> None:
    paths = tuple(photo_paths[:3])
    boxes = np.array([[10, 20, 110, 150], [5, 5, 300, 200], [30, 40, 130, 200], [0, 0, 90, 60]], np.float32)
    objects = Objects(paths=paths, images=np.array([0, 0, 1, 2]), labels=np.array([0, 0, 1, 1]), classes=("a", "b"), boxes=boxes)
    found = encode_objects(encoder, objects, size_px=32)
    assert found.images.tolist() == [0, 0, 1, 2]
    assert found.labels.tolist() == [0, 0, 1, 1]
    photo = Image.open(paths[1]).convert("RGB")
    padded = pad_boxes(boxes[2:3], sizes_px=np.array([photo.size], np.int32))[0]
    expected = _oracle(encoder, photo.crop(tuple(padded.tolist())).resize((32, 32), Image.Resampling.BILINEAR))
    assert torch.nn.functional.cosine_similarity(torch.from_numpy(found.values[found.images == 1][0]), expected, dim=0) > 0.995


def test_odd_images_are_encoded_and_broken_ones_skipped(tmp_path: Path, encoder: Encoder) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (80, 100, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "plain.jpg")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "gray.png")
    Image.fromarray(np.dstack([pixels, pixels[..., 0]])).save(tmp_path / "alpha.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "rotated.jpg", exif=rotated)
    whole = (tmp_path / "plain.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    names = ("alpha.png", "cut.jpg", "empty.jpg", "gray.png", "plain.jpg", "rotated.jpg", "missing.jpg")
    count = len(names)
    objects = Objects(
        paths=tuple(tmp_path / name for name in names), images=np.arange(count), labels=np.arange(count) % 2, classes=("a", "b")
    )
    found = encode_objects(encoder, objects)
    assert found.num_skipped_images == 3
    assert [names[i] for i in found.images] == ["alpha.png", "gray.png", "plain.jpg", "rotated.jpg"]
    assert found.labels.tolist() == [0, 1, 0, 1]
    assert found.values.shape == (4, encoder.num_features)
    assert np.isfinite(found.values).all()


def test_padding_stays_within_the_image() -> None:
    boxes = np.array([[10, 10, 30, 50], [0, 0, 100, 80]], np.float32)
    padded = pad_boxes(boxes, sizes_px=np.array([[100, 80]] * 2, np.int32), share=0.1)
    assert padded.tolist() == [[8, 6, 32, 54], [0, 0, 100, 80]]


def test_boxes_are_rotated_with_an_image_that_exif_rotates(tmp_path: Path, encoder: Encoder) -> None:
    """Annotated as the file stores it, or upright: both cut out the same pixels."""
    pixels = np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated clockwise to be shown: 80 wide, 100 high
    Image.fromarray(pixels).save(tmp_path / "rotated.jpg", exif=exif, quality=95)
    stored, upright = (20, 10, 60, 40), (80 - 40, 20, 80 - 10, 60)
    values = []
    for box, size in ((stored, (100, 80)), (upright, (80, 100))):
        objects = Objects(
            paths=(tmp_path / "rotated.jpg",), images=np.zeros(1, np.int64), labels=np.zeros(1, np.int64), classes=("a", "b"),
            boxes=np.array([box], np.float32), sizes_px=np.array([size]),
        )  # fmt: skip
        values.append(encode_objects(encoder, objects, size_px=32).values)
    assert np.array_equal(*values)


def test_boxes_outside_and_images_of_another_size_are_skipped_and_counted(tmp_path: Path, encoder: Encoder) -> None:
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (100, 80), "gray").save(tmp_path / name)
    objects = Objects(
        paths=(tmp_path / "a.jpg", tmp_path / "b.jpg"), images=np.array([0, 0, 1]), labels=np.array([0, 1, 1]), classes=("a", "b"),
        boxes=np.array([[0, 0, 50, 50], [120, 10, 140, 30], [0, 0, 50, 50]], np.float32), sizes_px=np.array([[100, 80], [64, 64]]),
    )  # fmt: skip
    found = encode_objects(encoder, objects, size_px=32)
    assert (found.labels.tolist(), found.num_skipped_images, found.num_skipped_objects) == ([0], 1, 1)


def test_a_size_that_the_backbone_cannot_take_is_refused(tmp_path: Path) -> None:
    dense = random_encoder(load_config("demo", overrides=["backbone=densenet121"]))
    objects = Objects(paths=(tmp_path / "a.jpg",), images=np.zeros(1, np.int64), labels=np.zeros(1, np.int64), classes=("a", "b"))
    with pytest.raises(ConfigError, match=r"side of the views \(--size\) = 16: too small for the backbone"):
        encode_objects(dense, objects, size_px=16)


def test_features_that_would_fill_the_memory_lie_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = feature_array((3, 4), folder=tmp_path / "work")
    assert not isinstance(plain, np.memmap)
    monkeypatch.setattr("orl_fast.evals.features.available_memory", lambda: 100)
    mapped = feature_array((3, 4), folder=tmp_path / "work")
    assert isinstance(mapped, np.memmap)
    mapped[:] = 7
    assert mapped.sum() == 84
    assert list((tmp_path / "work").iterdir()) == []  # it vanishes with the array
    with pytest.raises(DataError, match="features takes"):
        feature_array((1 << 40, 1 << 10), folder=tmp_path)
