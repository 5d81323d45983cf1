"""Pictures: boxes and views stand where they belong, and nothing is clipped."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor

from orl_fast.config import LoaderConfig
from orl_fast.errors import DataError
from orl_fast.methods import METHODS
from orl_fast.report import COLORS, Cell, Grid, draw_grid, pair_grid, render_views, save_picture, view_grid
from orl_fast.shards import ShardIndex, write_shards
from orl_fast.tables import BoxTable, PairTable
from orl_fast.views import Batch, ViewLoader, ViewPlan, ViewSpec
from orl_fast.views.draw import Mined, draw_plan
from orl_fast.views.patches import PatchStore
from tests.synthetic import small_config
from tests.train.conftest import write_patches

_NUM, _K, _ROIS = 6, 3, 4


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    (root / "photos").mkdir()
    for i in range(_NUM):
        size = (64, 120) if i % 2 else (120, 64)
        Image.fromarray(rng.integers(90, 160, (*size, 3), np.uint8)).save(root / "photos" / f"photo-{i}.jpg")
    write_shards([root / "photos"], root / "shards", num_workers=1)
    return ShardIndex.open(root / "shards")


@pytest.fixture(scope="module")
def tables() -> Mined:
    rng = np.random.default_rng(1)
    boxes = [np.array([[x, y, x + 30, y + 25] for x, y in rng.integers(0, 30, (_ROIS, 2))], np.int16) for _ in range(_NUM)]
    neighbors = np.array([[(i + 1 + k) % _NUM for k in range(_K)] for i in range(_NUM)], np.int64)
    total = _NUM * _K
    pairs = PairTable(
        neighbors=neighbors,
        first=np.arange(total, dtype=np.int64).reshape(_NUM, _K),
        count=np.ones((_NUM, _K), np.int32),
        query_roi=rng.integers(0, _ROIS, total).astype(np.int16),
        partner_roi=rng.integers(0, _ROIS, total).astype(np.int16),
        similarities=rng.random(total).astype(np.float32),
    )
    return Mined(rois=BoxTable.from_lists(boxes), pairs=pairs, fingerprints={"rois": "r", "pairs": "p"})


def test_pairs_show_the_best_pairs_boxes_in_one_color(index: ShardIndex, tables: Mined) -> None:
    rois, pairs = tables.rois, tables.pairs
    grid = pair_grid(index, rois, pairs, images=[4], num_neighbors=9)
    (query, *neighbors) = grid.rows[0]
    assert len(neighbors) == _K
    assert query.caption == index.file_names[4]
    for k, cell in enumerate(neighbors):
        entry = pairs.first[4, k]
        assert query.boxes[k] == (rois.of(4)[pairs.query_roi[entry]].tolist(), COLORS[k])
        assert list(cell.boxes) == [(rois.of(int(pairs.neighbors[4, k]))[pairs.partner_roi[entry]].tolist(), COLORS[k])]
        assert cell.caption == f"cosine {pairs.similarities[entry]:.2f}"
        assert cell.image.shape[:2] == (index.heights[pairs.neighbors[4, k]], index.widths[pairs.neighbors[4, k]])


def _render(index: ShardIndex, rows: list[int], tables: Mined, method: str) -> tuple[tuple[ViewSpec, ...], ViewPlan, Batch]:
    specs = METHODS[method].views(small_config("image_size_px=32", "patch_size_px=16"))
    plan = draw_plan(np.array(rows), specs, seed=3, epoch=1, heights=index.heights, widths=index.widths, mined=tables)
    return specs, plan, render_views(index, plan, mined=tables, loader=LoaderConfig(), kind="cpu", device=torch.device("cpu"))


@pytest.mark.parametrize(("method", "columns"), [("byol", 3), ("orl", 8)])
def test_views_stand_beside_the_image_they_are_cut_from(index: ShardIndex, tables: Mined, method: str, columns: int) -> None:
    specs, plan, batch = _render(index, [1, 2], tables, method)
    grid = view_grid(index, plan, batch, specs=specs, title="views")
    assert len(grid.headings) == len(grid.rows[0]) == columns
    for b, row in enumerate(grid.rows):
        shown = [cell for cell in row if cell.border]
        for v, (spec, cell) in enumerate(zip(specs, shown, strict=True)):
            assert np.array_equal(cell.image, batch.views[spec.name][b].numpy().transpose(1, 2, 0))
            owner = row[-2] if spec.name == "partner_roi" else row[0]
            assert (plan.crops.box[v * 2 + b].tolist(), cell.border) in [(list(box), color) for box, color in owner.boxes]
    assert grid.headings[1] == "view1"


def test_the_views_shown_are_those_of_a_training(index: ShardIndex, tables: Mined) -> None:
    specs = METHODS["orl"].views(small_config("image_size_px=32", "patch_size_px=16"))
    with ViewLoader.open(index, specs, batch_size=2, seed=3, mined=tables, start_step=_NUM // 2, num_steps=1) as loader:
        expected = next(loader)  # the first batch of epoch 1
    _, _, found = _render(index, expected.rows.tolist(), tables, "orl")
    assert all(torch.equal(found.views[name], view) for name, view in expected.views.items())


def test_a_stored_patch_is_shown_as_itself(index: ShardIndex, tables: Mined, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (128, 128), (200, 30, 30)).save(buffer, "JPEG")
    write_patches(tmp_path, tables, buffer.getvalue())
    patched = replace(tables, patches=PatchStore.open(tmp_path / "patches", made_from=tables.fingerprints))
    specs, plan, batch = _render(index, [1], patched, "orl")
    grid = view_grid(index, plan, batch, specs=specs, title="views", patches=patched.patches)
    assert len(grid.rows[0]) == len(grid.headings) == 8
    stored = grid.rows[0][-2]
    assert stored.caption.startswith("stored patch ")
    assert np.abs(stored.image.astype(int) - [200, 30, 30]).max() < 4


def test_an_image_that_cannot_be_decoded_is_named(index: ShardIndex, tables: Mined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orl_fast.shards.ShardReader.views", lambda _, rows: [np.zeros(50, np.uint8)] * len(rows))
    with pytest.raises(DataError, match=f"image {index.keys[1]} cannot be decoded; run orl-fast verify"):
        _render(index, [1], tables, "byol")


def _has(picture: Image.Image, color: str) -> bool:
    pixels: NDArray[np.uint8] = np.asarray(picture)
    return bool((pixels == ImageColor.getrgb(color)).all(axis=2).any())


def test_a_drawn_grid_shows_every_box_and_clips_nothing() -> None:
    gray = np.full((50, 80, 3), 128, np.uint8)
    same = [10.0, 10.0, 40.0, 40.0]
    boxes = [(same, COLORS[0]), (same, COLORS[1]), ([0.0, 0.0, 80.0, 50.0], COLORS[2]), ([79.0, 49.0, 80.0, 50.0], COLORS[3])]
    grid = Grid(title="A title " * 20, note="", headings=["a", "b"], rows=[[Cell(image=gray, boxes=boxes, caption="long " * 40)] * 2])
    picture = draw_grid(grid)
    assert all(_has(picture, color) for color in COLORS[:4])
    edges = np.asarray(picture)
    for edge in (edges[:10], edges[-10:], edges[:, :10], edges[:, -10:]):
        assert (edge == 255).all()


def test_the_same_grid_is_the_same_file(tmp_path: Path) -> None:
    grid = Grid(title="t", note="n", headings=["h"], rows=[[Cell(image=np.zeros((9, 9, 3), np.uint8))]])
    for name in ("a.png", "b.png"):
        save_picture(draw_grid(grid), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
