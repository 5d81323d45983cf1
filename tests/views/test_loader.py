"""The loader: the same views whatever runs them, damaged samples skipped, nothing left behind."""

import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from orl_fast.config import Config, OrlConfig, TrainConfig, ViewsConfig
from orl_fast.errors import ConfigError
from orl_fast.shards import ShardIndex, write_shards
from orl_fast.tables import BoxTable, PairTable
from orl_fast.views.cpu import CpuRenderer
from orl_fast.views.loader import ViewLoader, Views
from orl_fast.views.plan import Rows, ViewPlan, draw_orl
from orl_fast.views.renderer import Rendered
from tests.views.conftest import Photos

VIEWS = ViewsConfig(image_size_px=32, patch_size_px=24)


@pytest.fixture
def open_loader(photos: Photos, mined: tuple[BoxTable, PairTable]) -> Iterator[object]:
    opened: list[ViewLoader] = []

    def draw(rows: Rows, epoch: int) -> ViewPlan:
        sizes = {"heights": photos.heights, "widths": photos.widths}
        return draw_orl(rows, seed=0, epoch=epoch, views=VIEWS, rois=mined[0], pairs=mined[1], **sizes)

    def open_one(*, source: Photos = photos, num_threads: int = 2, **options: object) -> ViewLoader:
        settings: dict[str, object] = {"num_images": len(photos), "batch_size": 8, "num_steps": 5, **options}
        opened.append(ViewLoader(CpuRenderer(source, num_threads=num_threads), draw, **settings))  # type: ignore[arg-type]
        return opened[-1]

    yield open_one
    for loader in opened:
        loader.close()


def tensors(views: Views) -> list[torch.Tensor]:
    return [view for pair in (views.image, views.intra, views.inter) if pair for view in pair]


def assert_same(found: list[Views], expected: list[Views]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a.rows, b.rows)
        assert len(tensors(a)) == len(tensors(b)) == 6
        assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def joined(parts: list[Views]) -> Views:
    pairs = {
        term: tuple(torch.cat([getattr(part, term)[view] for part in parts]) for view in (0, 1)) for term in ("image", "intra", "inter")
    }
    return Views(**pairs, rows=np.concatenate([part.rows for part in parts]))  # type: ignore[arg-type]


def test_threads_and_prefetching_do_not_change_a_byte(open_loader) -> None:  # type: ignore[no-untyped-def]
    expected = list(open_loader(num_threads=1, prefetch=1))
    assert [len(views.rows) for views in expected] == [8] * 5
    assert expected[0].image is not None
    assert expected[0].image[0].shape == (8, 3, 32, 32)
    assert expected[0].inter is not None
    assert expected[0].inter[1].shape == (8, 3, 24, 24)
    assert_same(list(open_loader(num_threads=4, prefetch=6)), expected)


def test_any_step_can_be_the_first(open_loader) -> None:  # type: ignore[no-untyped-def]
    expected = list(open_loader(num_steps=7))  # three steps per epoch: two epochs and a bit
    assert_same(list(open_loader(start_step=4, num_steps=3)), expected[4:])


@pytest.mark.parametrize(("world_size", "accumulate"), [(4, 1), (2, 2), (1, 4)])
def test_ranks_and_accumulation_share_the_same_views(world_size: int, accumulate: int, open_loader) -> None:  # type: ignore[no-untyped-def]
    expected = list(open_loader())
    ranks = [list(open_loader(batch_size=2, rank=rank, world_size=world_size, accumulate=accumulate)) for rank in range(world_size)]
    assert all(len(batches) == 5 * accumulate for batches in ranks)
    for step in range(5):
        parts = [ranks[rank][step * accumulate + micro] for micro in range(accumulate) for rank in range(world_size)]
        assert_same([joined(parts)], [expected[step]])


def test_a_damaged_image_is_skipped_counted_and_told_once(photos: Photos, open_loader, caplog) -> None:  # type: ignore[no-untyped-def]
    damaged = Photos(list(photos.data), photos.heights, photos.widths)
    damaged.data[5] = np.zeros(1000, np.uint8)
    expected, loader = list(open_loader(num_steps=6)), open_loader(source=damaged, num_steps=6, name_of=lambda i: f"photo-{i}")
    found = list(loader)
    for a, b in zip(found, expected, strict=True):
        kept = np.isin(b.rows, a.rows)
        assert 5 not in a.rows
        assert a.num_skipped == (~kept).sum()
        assert all(torch.equal(x, y[torch.from_numpy(kept)]) for x, y in zip(tensors(a), tensors(b), strict=True))
    assert loader.num_skipped == sum(views.num_skipped for views in found) >= 2
    assert [record.getMessage().split()[0] for record in caplog.records] == ["photo-5"]


def test_an_error_in_the_background_reaches_the_consumer(photos: Photos, mined: tuple[BoxTable, PairTable]) -> None:
    class Broken:
        def render(self, plan: ViewPlan) -> Rendered:
            raise OSError("the disk went away")

        def close(self) -> None:
            """Nothing is held."""

    def draw(rows: Rows, epoch: int) -> ViewPlan:
        return draw_orl(rows, seed=0, epoch=epoch, heights=photos.heights, widths=photos.widths, views=VIEWS, rois=mined[0], pairs=mined[1])

    with ViewLoader(Broken(), draw, num_images=len(photos), batch_size=4) as loader, pytest.raises(OSError, match="went away"):
        next(loader)


def test_the_last_batch_is_kept_on_request(open_loader) -> None:  # type: ignore[no-untyped-def]
    sizes = [len(views.rows) for views in open_loader(batch_size=7, drop_last=False, num_steps=8)]
    assert sizes == [7, 7, 7, 3] * 2


def test_closed_loaders_leave_nothing_behind(open_loader) -> None:  # type: ignore[no-untyped-def]
    def use_one() -> tuple[int, int, int]:
        with open_loader(num_steps=None) as loader:  # closed while it renders ahead
            next(loader)
        gc.collect()
        resident_bytes = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), resident_bytes

    before = [use_one() for _ in range(4)][-1]
    after = [use_one() for _ in range(10)][-1]
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    assert after[2] - before[2] < 40e6


def test_opened_on_shards_it_yields_what_the_config_asks_for(photo_paths: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in photo_paths[:6]:
        (folder / path.name).symlink_to(path)
    write_shards([folder], tmp_path / "shards", num_workers=1)
    index = ShardIndex.open(tmp_path / "shards")
    config = Config(views=VIEWS, train=TrainConfig(batch_size=4, accumulate=2), orl=OrlConfig(intra_weight=0))
    with ViewLoader.open(index, config=config, num_steps=2) as loader:
        assert loader.steps_per_epoch == 1
        batches = list(loader)
    assert [len(views.rows) for views in batches] == [2] * 4
    assert all(views.intra is None and views.inter is None for views in batches)
    rois = BoxTable.from_lists([np.array([[10, 10, 90, 100]], np.int16)] * 6)
    one = np.zeros(6, np.int16)
    pairs = PairTable(
        neighbors=np.roll(np.arange(6), 1)[:, None], first=np.arange(6)[:, None], count=np.ones((6, 1), np.int32),
        query_roi=one, partner_roi=one, similarities=np.ones(6, np.float32),
    )  # fmt: skip
    with ViewLoader.open(tmp_path / "shards", config=config, rois=rois, pairs=pairs, num_steps=2) as loader:
        found = list(loader)
    for a, b in zip(found, batches, strict=True):
        assert a.intra is None
        assert a.inter is not None
        assert a.image is not None
        assert b.image is not None
        assert torch.equal(a.image[0], b.image[0])
    with pytest.raises(ConfigError, match="multiple of 6"):
        ViewLoader.open(index, config=config, world_size=3)
    with pytest.raises(ConfigError, match="only 6 images"):
        ViewLoader.open(index, config=replace(config, train=TrainConfig(batch_size=8)))
