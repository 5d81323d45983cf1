"""Features of whole images: the reference's views bit for bit, and a cache that is never stale or damaged."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose, Resize

from orl_fast.evals import Context, levels
from orl_fast.evals.levels import Levels, encode_levels, twice_resized
from orl_fast.evals.pooling import pool_levels
from orl_fast.models import Encoder, random_encoder
from orl_fast.recipe import load_config
from orl_fast.views.normalize import normalize


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return random_encoder(load_config("demo"))


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.jpg" for i in range(5)]
    for path, size in zip(paths, [(50, 70), (70, 50), (33, 33), (120, 41), (60, 60)], strict=True):
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(path)
    return paths


def _encoded(encoder: Encoder, paths: list[Path], folder: Path) -> Levels:
    return encode_levels(encoder, paths, size_px=32, folder=folder, context=Context(device=torch.device("cpu"), num_threads=2))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (334, 500), (97, 1000), (224, 224)])
def test_views_are_torchvisions_two_resizes(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8))
    expected = Compose([Resize(256), Resize((224, 224))])(image)
    assert np.array_equal(twice_resized(image, 224), np.asarray(expected))


def test_features_are_pooled_levels_of_the_images(encoder: Encoder, images: list[Path], tmp_path: Path) -> None:
    found = _encoded(encoder, images, tmp_path / "kept")
    squares = np.stack([twice_resized(Image.open(path).convert("RGB"), 32) for path in images])
    expected = pool_levels(encoder.levels(normalize(torch.from_numpy(squares).permute(0, 3, 1, 2))))
    assert len(found.values) == len(expected)
    for level, wanted in zip(found.values, expected, strict=True):
        np.testing.assert_allclose(level, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_unreadable_images_are_skipped_and_the_others_keep_their_places(encoder: Encoder, images: list[Path], tmp_path: Path) -> None:
    whole = _encoded(encoder, images, tmp_path / "kept")
    images[1].write_bytes(images[1].read_bytes()[:300])
    images[3].write_bytes(b"no image")
    found = _encoded(encoder, images, tmp_path / "kept")
    assert found.kept.tolist() == [True, False, True, False, True]
    for level, all_five in zip(found.values, whole.values, strict=True):
        np.testing.assert_allclose(level, all_five[[0, 2, 4]], rtol=1e-4, atol=1e-5)


def test_features_are_computed_once_for_the_same_files_and_encoder(
    encoder: Encoder, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    compute = levels._compute

    def counted(*arguments: object, **options: object) -> None:
        calls.append(1)
        compute(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(levels, "_compute", counted)
    first, again = (_encoded(encoder, images, tmp_path / "kept") for _ in range(2))
    assert len(calls) == 1
    assert all(np.array_equal(*pair) for pair in zip(first.values, again.values, strict=True))
    os.utime(images[0], ns=(1, 1))  # another file, perhaps
    assert _encoded(encoder, images, tmp_path / "kept").fingerprint != first.fingerprint
    assert len(calls) == 2
    _encoded(random_encoder(load_config("demo", overrides=["seed=5"])), images, tmp_path / "kept")
    assert len(calls) == 3


@pytest.mark.parametrize("damage", ["cut", "changed", "no index"])
def test_damaged_features_are_computed_again(encoder: Encoder, images: list[Path], tmp_path: Path, damage: str) -> None:
    first = _encoded(encoder, images, tmp_path / "kept")
    values = [np.array(level) for level in first.values]
    place = tmp_path / "kept" / f"features-{first.fingerprint}"
    content = bytearray((place / "level2.npy").read_bytes())
    if damage == "no index":
        (place / "index.json").unlink()
    elif damage == "cut":
        (place / "level2.npy").write_bytes(content[:-40])
    else:
        content[-5] ^= 1
        (place / "level2.npy").write_bytes(content)
    again = _encoded(encoder, images, tmp_path / "kept")
    assert all(np.array_equal(*pair) for pair in zip(values, again.values, strict=True))


def test_a_file_that_cannot_be_read_now_is_tried_again(
    encoder: Encoder, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path == images[2]:
            raise OSError(5, "Input/output error")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        assert _encoded(encoder, images, tmp_path / "kept").kept.tolist() == [True, True, False, True, True]
    assert _encoded(encoder, images, tmp_path / "kept").kept.all()
