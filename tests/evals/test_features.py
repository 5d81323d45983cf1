from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orl_fast.config import load_config
from orl_fast.evals import LabelledObjects, encode_objects
from orl_fast.evals.features import pad_boxes
from orl_fast.models import Encoder
from orl_fast.models.encoder import random_encoder


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return random_encoder(load_config("demo"))


def _oracle(encoder: Encoder, image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return encoder.pooled(((pixels - mean[:, None, None]) / std[:, None, None])[None])[0]


def test_boxes_of_photographs_as_pil_would_cut_them(photo_paths: list[Path], encoder: Encoder) -> None:
    paths = tuple(photo_paths[:3])
    boxes = np.array([[10, 20, 110, 150], [0, 0, 90, 60], [30, 40, 130, 200], [5, 5, 300, 200]], np.float32)
    objects = LabelledObjects(paths=paths, images=np.array([0, 2, 1, 0]), labels=np.array([0, 1, 1, 0]), classes=("a", "b"), boxes=boxes)
    found = encode_objects(encoder, objects, size_px=32)
    # Objects come image by image.
    order = np.argsort(found.images, kind="stable")
    assert found.images[order].tolist() == [0, 0, 1, 2]
    assert sorted(found.labels.tolist()) == [0, 0, 1, 1]
    photo = Image.open(paths[1]).convert("RGB")
    padded = pad_boxes(boxes[2:3], heights=np.array([photo.height], np.int32), widths=np.array([photo.width], np.int32))[0]
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
    objects = LabelledObjects(
        paths=tuple(tmp_path / name for name in names), images=np.arange(count), labels=np.arange(count) % 2, classes=("a", "b")
    )
    found = encode_objects(encoder, objects)
    assert found.num_skipped == 3
    assert [names[i] for i in found.images] == ["alpha.png", "gray.png", "plain.jpg", "rotated.jpg"]
    assert found.labels.tolist() == [0, 1, 0, 1]
    assert found.values.shape == (4, encoder.num_features)
    assert np.isfinite(found.values).all()


def test_padding_stays_within_the_image() -> None:
    boxes = np.array([[10, 10, 30, 50], [0, 0, 100, 80]], np.float32)
    padded = pad_boxes(boxes, heights=np.array([80, 80], np.int32), widths=np.array([100, 100], np.int32), share=0.1)
    assert padded.tolist() == [[8, 6, 32, 54], [0, 0, 100, 80]]
