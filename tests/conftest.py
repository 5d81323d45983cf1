"""What several tests share: photographs, real or drawn, packed folders, and the switch for tests that need a GPU."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from benchmarks.photographs import draw_jpeg
from orl_fast.console import log
from orl_fast.shards import ShardIndex, write_shards

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line has it; read when torch is imported
_SHARED = Path(os.environ.get("ORL_FAST_SHARED", Path(__file__).parents[2] / "shared"))
_NUM_DRAWN, _NUM_CANVASES, _CANVAS_PX = 128, 6, 640
# As COCO has them: mostly 640 × 480, some upright, some odd.
_SIZES_PX = [(640, 480), (640, 427), (480, 640), (500, 375), (640, 480), (427, 640), (333, 500), (640, 427), (481, 361)]


@pytest.fixture(scope="session")
def coco128(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 COCO photographs in COCO's own layout; where they are missing, drawn ones."""
    folder = _SHARED / "data" / "coco128"
    if not (folder / "train2017").is_dir():
        folder = tmp_path_factory.mktemp("drawn")
        draw_coco(folder)
    return folder


@pytest.fixture(scope="session")
def photo_paths(coco128: Path) -> list[Path]:
    """The photographs' files, sorted."""
    return sorted((coco128 / "train2017").glob("*.jpg"))


def draw_coco(folder: Path) -> None:
    """Drawn photographs, parts of a few large ones, some of them gray or upright, with boxes: in COCO's layout and always the same."""
    rng = np.random.default_rng(0)
    canvases = [Image.open(io.BytesIO(draw_jpeg(i, width_px=_CANVAS_PX, height_px=_CANVAS_PX))) for i in range(_NUM_CANVASES)]
    canvases = [ImageEnhance.Color(canvas).enhance(0.5) for canvas in canvases]  # about as colorful as photographs
    images, annotations = [], []
    (folder / "train2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for i in range(_NUM_DRAWN):
        width, height = _SIZES_PX[i % len(_SIZES_PX)]
        left, top = (int(rng.integers(_CANVAS_PX - side + 1)) for side in (width, height))
        photo = canvases[i % _NUM_CANVASES].crop((left, top, left + width, top + height))
        photo = photo.transpose(Image.Transpose(rng.choice([Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180])))
        image_id = 9 + 7 * i
        name = f"{image_id:012d}.jpg"
        photo.convert("L" if i % 40 == 11 else "RGB").save(folder / "train2017" / name, quality=int(rng.integers(85, 95)))
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for _ in range(rng.integers(12)):
            x, y = rng.uniform(0, 0.6, 2) * (width, height)
            w, h = rng.uniform(0.1, 0.4, 2) * (width, height)
            box = {
                "bbox": [round(float(v), 2) for v in (x, y, w, h)],
                "area": round(float(w * h), 2),
                "category_id": int(rng.integers(1, 4)),
            }
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0, "segmentation": [], **box})
    categories = [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(("disk", "box", "ground"), start=1)]
    document = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(document))


def pack(paths: list[Path], folder: Path) -> ShardIndex:
    """Photographs as a packed folder."""
    photos = folder.with_name(f"{folder.name}-photos")
    photos.mkdir(parents=True)
    for path in paths:
        (photos / path.name).symlink_to(path)
    write_shards([photos], folder, num_workers=1)
    return ShardIndex.open(folder)


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """The command line sets up the package's log for its process; here it is shared by all tests."""
    before = (log.handlers[:], log.level, log.propagate)
    yield
    log.handlers[:], log.level, log.propagate = before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
