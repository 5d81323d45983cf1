"""Views from stored pixels: the JPEGs' own to the last bit, whatever part of the images is stored."""

import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from orl_fast.config import LoaderConfig, ViewsConfig
from orl_fast.shards import ShardIndex, ShardReader
from orl_fast.shards.pixels import PixelStore, write_pixels
from orl_fast.views import Batch, ViewLoader, ViewPlan, pixels
from orl_fast.views.choose import open_renderer, open_source
from orl_fast.views.cpu import CpuRenderer
from orl_fast.views.draw import Mined
from orl_fast.views.gpu import DaliRenderer
from orl_fast.views.pixels import PixelSource, images_identity
from orl_fast.views.plan import Crops, center_crops, roi_crops
from orl_fast.views.reference import ReferenceRenderer
from tests.conftest import pack
from tests.views.conftest import Photos, byol_plan, orl_plan, specs_of

ALL = LoaderConfig(pixels="always")


@pytest.fixture(scope="session")
def index(photos: Photos, tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """The photographs, packed."""
    folder = tmp_path_factory.mktemp("pixels")
    for i, data in enumerate(photos.data):
        (folder / f"{i:03d}.jpg").write_bytes(data.tobytes())
    return pack(sorted(folder.glob("*.jpg")), folder / "packed")


@pytest.fixture(scope="session")
def store(index: ShardIndex) -> PixelStore:
    write_pixels(index, num_workers=1)
    found = PixelStore.find(index)
    assert found is not None
    return found


@pytest.fixture(params=[24, 10])
def source(request: pytest.FixtureRequest, index: ShardIndex, store: PixelStore) -> PixelSource:
    """All stored, or the first ten of 24."""
    return PixelSource(ShardReader(index), store, num_rows=request.param)


def equal(a: Batch, b: Batch) -> bool:
    return list(a.views) == list(b.views) and all(torch.equal(a.views[name], b.views[name]) for name in a.views)


def plans(photos: Photos, mined: Mined) -> Iterator[ViewPlan]:
    rows = np.arange(len(photos))
    for epoch in range(2):
        yield byol_plan(rows, photos, ViewsConfig(), epoch=epoch)
        yield orl_plan(rows, photos, mined, ViewsConfig(image_size_px=97, patch_size_px=41), epoch=epoch)
    yield center_crops(rows, heights=photos.heights, widths=photos.widths, resize_px=256, crop_px=224)
    yield roi_crops(rows, np.array([[3, 5, 20, 9]] * len(rows), np.int16), size_px=224)


def test_views_are_those_of_the_jpegs(photos: Photos, mined: Mined, source: PixelSource) -> None:
    with closing(CpuRenderer(photos, num_threads=2)) as expected, closing(CpuRenderer(source, num_threads=2)) as found:
        for plan in plans(photos, mined):
            assert equal(found.render(plan), expected.render(plan))


def test_the_dali_graph_takes_pixels_and_jpegs_together(photos: Photos, mined: Mined, source: PixelSource) -> None:
    with closing(DaliRenderer(photos, num_threads=2)) as expected, closing(DaliRenderer(source, num_threads=2)) as found:
        for plan in plans(photos, mined):
            a, b = found.render(plan), expected.render(plan)
            for name, view in a.views.items():
                assert (view.int() - b.views[name].int()).abs().max() <= (1 if plan.beyond_box else 0)


def test_the_reference_takes_pixels(photos: Photos, source: PixelSource) -> None:
    plan = byol_plan(np.arange(6, 14), photos, ViewsConfig(image_size_px=64))
    assert equal(ReferenceRenderer(source).render(plan), ReferenceRenderer(photos).render(plan))


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (9, 9), (10, 12), (11, 11), (22, 7)])
@pytest.mark.parametrize("size_px", [8, 96])
def test_images_that_are_narrower_than_a_vector(size: tuple[int, int], size_px: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    (tmp_path / "photos").mkdir()
    for i in range(2):
        Image.fromarray(noise).save(tmp_path / "photos" / f"{i}.jpg", quality=95)
    index = pack(sorted((tmp_path / "photos").glob("*.jpg")), tmp_path / "packed")
    write_pixels(index, num_workers=1)
    boxes = np.array([[0, 0, *size], [0, 0, 1, 1], [size[0] - 1, size[1] - 1, *size], [0, size[1] // 2, *size]], np.float32)
    plan = roi_crops(np.zeros(4, np.int64), boxes, size_px=size_px)
    views = {}
    for pixels_of in ("never", "always"):
        source = open_source(index, LoaderConfig(pixels=pixels_of))  # type: ignore[arg-type]
        with closing(CpuRenderer(source, num_threads=1)) as renderer:
            views[pixels_of] = renderer.render(plan)
        expected = ReferenceRenderer(source).render(plan).views["view"].int()
        assert (views[pixels_of].views["view"].int() - expected).abs().max() <= 3
    assert equal(views["never"], views["always"])


def test_a_loader_finds_pixels_and_yields_the_same(index: ShardIndex, store: PixelStore) -> None:
    specs = specs_of(ViewsConfig(image_size_px=48), "view1", "view2")
    batches = {}
    for name, loader in {
        "jpegs": LoaderConfig(pixels="never"),
        "pixels": LoaderConfig(),
        "one thread": LoaderConfig(num_threads=1),
    }.items():
        with ViewLoader.open(index, specs, batch_size=8, num_steps=7, loader=loader) as views:
            assert isinstance(views._source, PixelSource) == (name != "jpegs")
            batches[name] = list(views)
    for a, b, c in zip(*batches.values(), strict=True):
        assert equal(a, b)
        assert equal(a, c)
        assert np.array_equal(a.rows, b.rows)
        assert set(b.seconds) == {"queue", "reading", "decoding", "drawing"}
    with ViewLoader.open(index, specs, batch_size=8, start_step=4, num_steps=3) as views:
        assert all(equal(a, b) for a, b in zip(views, batches["jpegs"][4:], strict=True))


def test_missing_pixels_are_an_error_and_not_a_skipped_sample(index: ShardIndex, store: PixelStore, tmp_path: Path) -> None:
    for path in index.path.glob("pixels*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = PixelStore.find(index, tmp_path)
    assert found is not None
    (tmp_path / "pixels-000000.tar").unlink()
    with pytest.raises(Exception, match=r"pixels-000000.tar: cannot be read"):
        PixelSource(ShardReader(index), found, num_rows=24).views(np.arange(3))


def test_shrunken_images_serve_training_alone_and_are_near(index: ShardIndex, photos: Photos, tmp_path: Path) -> None:
    write_pixels(index, tmp_path, max_side=400, num_workers=1)
    (index.path / "pixels.link").unlink()
    loader = LoaderConfig(pixels_dir=str(tmp_path))
    exact, smaller = open_source(index, loader), open_source(index, loader, shrunken=True)
    assert isinstance(exact, ShardReader)
    assert isinstance(smaller, PixelSource)
    assert images_identity(index, loader) == f"{index.fingerprint} with 24 images of at most 400 px"
    assert images_identity(index, LoaderConfig(pixels="never")) == index.fingerprint
    rows = np.arange(len(photos))
    box = np.stack([rows * 0, rows * 0, photos.widths, photos.heights], axis=1).astype(np.float32)
    part = box * np.array([0.5, 0.5, 0.9, 0.8], np.float32) + np.array([20, 10, 0, 0], np.float32)
    crops = Crops.plain(np.tile(rows, 2), np.concatenate([box, part]))
    plan = ViewPlan(rows=rows, sizes_px={"whole": 96, "part": 96}, crops=crops)
    expected = CpuRenderer(exact, num_threads=2).render(plan)
    for renderer in (CpuRenderer(smaller, num_threads=2), DaliRenderer(smaller, num_threads=2), ReferenceRenderer(smaller)):
        for name, view in renderer.render(plan).views.items():
            assert (view.float() - expected.views[name].float()).abs().mean() < 6  # a shift by a pixel would be 12 or more


@pytest.mark.parametrize(("read_s", "num_rows"), [(0.001, 24), (1.0, None)])
def test_more_pixels_than_memory_are_read_only_where_that_is_faster(
    read_s: float,
    num_rows: int | None,
    index: ShardIndex,
    store: PixelStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("orl_fast"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("orl_fast"), "level", logging.INFO)
    monkeypatch.setattr(pixels, "available_memory", lambda: store.info.num_bytes)
    monkeypatch.setattr(pixels, "_time_to_read", lambda _: read_s)
    monkeypatch.setattr(pixels, "_time_to_decode", lambda *_: 0.01)
    found = open_source(index, LoaderConfig(num_threads=1))
    assert isinstance(found, PixelSource)
    if num_rows is None:
        ends = np.cumsum(3 * index.heights.astype(int) * index.widths)
        num_rows = int((ends <= 0.8 * store.info.num_bytes).sum())
        assert 0 < num_rows < 24
        assert "reading takes longer than decoding" in caplog.text
    assert found.num_rows == num_rows
    monkeypatch.setattr(pixels, "available_memory", lambda: 1000)
    monkeypatch.setattr(pixels, "_time_to_read", lambda _: 1.0)
    assert isinstance(open_source(index, LoaderConfig()), ShardReader)
    always = open_source(index, ALL)
    assert isinstance(always, PixelSource)
    assert always.num_rows == 24


def test_disk_and_decoder_are_measured(index: ShardIndex, store: PixelStore) -> None:
    assert 0 < pixels._time_to_read(store) < 1
    assert 0 < pixels._time_to_decode(ShardReader(index), 24) < 1


def test_reading_ahead_is_asked_for_only_after_waiting_for_the_disk(
    index: ShardIndex, store: PixelStore, photos: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    waits = SimpleNamespace(ru_majflt=0)
    monkeypatch.setattr(pixels, "advise", lambda data, *, now: asked.append(data.nbytes))
    monkeypatch.setattr(pixels.resource, "getrusage", lambda _: waits)
    source = PixelSource(ShardReader(index), store, num_rows=10)
    plan = roi_crops(np.array([1, 2, 20]), np.array([[10, 20, 60, 70]] * 3, np.int16), size_px=32)
    source.announce(plan)
    assert asked == []
    waits.ru_majflt = 5
    for _ in range(200):
        source.announce(plan)
    assert len(asked) == 2 * 64
    assert set(asked) <= {3 * 50 * int(width) for width in index.widths[[1, 2]]}  # lines 20 to 70 alone; row 20 is not stored


def test_views_of_every_kind_of_renderer_are_opened_on_pixels(index: ShardIndex, store: PixelStore, photos: Photos) -> None:
    plan = byol_plan(np.arange(4), photos, ViewsConfig(image_size_px=32))
    for kind in ("cpu", "reference", "dali-cpu"):
        with closing(open_renderer(kind, open_source(index, ALL), ALL)) as renderer:
            assert renderer.render(plan).views["view1"].shape == (4, 3, 32, 32)
