"""Packed photographs and the tables of stage 2, made up, for tests of whole runs."""

from pathlib import Path

import numpy as np
import pytest

from orl_fast.shards import ShardIndex, write_shards
from orl_fast.tables import TableInfo, new_table

NUM_IMAGES = 12


@pytest.fixture(scope="session")
def packed(photo_paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Twelve photographs."""
    photos = tmp_path_factory.mktemp("photos")
    for path in photo_paths[:NUM_IMAGES]:
        (photos / path.name).symlink_to(path)
    out = tmp_path_factory.mktemp("packed") / "twelve"
    write_shards([photos], out, num_workers=1)
    return ShardIndex.open(out)


@pytest.fixture(scope="session")
def mined(packed: ShardIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two RoIs per image, three neighbors, one pair with each."""
    folder = tmp_path_factory.mktemp("mined")
    write_tables(folder, index=packed.fingerprint, heights=packed.heights, widths=packed.widths)
    return folder


def write_tables(folder: Path, *, index: str, heights: np.ndarray, widths: np.ndarray, num_neighbors: int = 3) -> None:
    n = len(heights)
    rois = TableInfo(kind="rois", made_from={"index": index}, settings={})
    with new_table(folder / "rois", rois) as out:
        boxes = [[(0, 0, w // 2, h // 2), (w // 4, h // 4, w, h)] for h, w in zip(heights, widths, strict=True)]
        np.save(out / "boxes.npy", np.array(boxes, np.int16).reshape(-1, 4))
        np.save(out / "offsets.npy", np.arange(n + 1, dtype=np.int64) * 2)
    settings = {"num_neighbors": num_neighbors, "pair_ratio": 0.1, "compat": "official"}
    made_from = {"index": index, "rois": rois.fingerprint, "encoder": "e0"}
    with new_table(folder / "pairs", TableInfo(kind="pairs", made_from=made_from, settings=settings)) as out:
        total = n * num_neighbors
        np.save(out / "neighbors.npy", (np.arange(n)[:, None] + 1 + np.arange(num_neighbors)) % n)
        np.save(out / "first.npy", np.arange(total, dtype=np.int64).reshape(n, num_neighbors))
        np.save(out / "count.npy", np.ones((n, num_neighbors), np.int32))
        np.save(out / "query_roi.npy", (np.arange(total) % 2).astype(np.int16))
        np.save(out / "partner_roi.npy", (np.arange(total) // 2 % 2).astype(np.int16))
        np.save(out / "similarities.npy", np.linspace(1, 0, total, dtype=np.float32))
