"""The loader: the same views whatever runs them, damaged samples skipped, nothing left behind."""

import gc
import os
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from orl_fast.config import LoaderConfig, ViewsConfig
from orl_fast.errors import ConfigError, MissingStageError
from orl_fast.shards import ShardIndex, ShardReader
from orl_fast.tables import BoxTable, PairTable
from orl_fast.views import Augmentation, Batch, RandomCrop, ViewLoader, ViewPlan, ViewSpec, choose
from orl_fast.views.cpu import CpuRenderer
from orl_fast.views.draw import Mined
from orl_fast.views.patches import PatchStore
from orl_fast.views.plan import Rows
from orl_fast.views.reference import ReferenceRenderer
from orl_fast.views.sampler import Sampler
from tests.conftest import pack
from tests.views.conftest import Photos, orl_plan, specs_of
from tests.views.test_patches import MADE_FROM
from tests.views.test_patches import pack as pack_patches

VIEWS = ViewsConfig(image_size_px=32, patch_size_px=24)
OpenLoader = Callable[..., ViewLoader]


@pytest.fixture
def open_loader(photos: Photos, mined: Mined) -> Iterator[OpenLoader]:
    opened: list[ViewLoader] = []

    def draw(rows: Rows, epoch: int) -> ViewPlan:
        return orl_plan(rows, photos, mined, VIEWS, epoch=epoch)

    def open_one(
        *, source: Photos = photos, num_threads: int = 2, batch_size: int = 8, world_size: int = 1, accumulate: int = 1, **options: object
    ) -> ViewLoader:
        """With `batch_size` images per micro-batch."""
        together = batch_size * world_size * accumulate
        sampler = Sampler(num_images=len(photos), batch_size=together, world_size=world_size, accumulate=accumulate, seed=0)
        settings: dict[str, object] = {"num_steps": 5, **options}
        opened.append(ViewLoader(CpuRenderer(source, num_threads=num_threads), draw, sampler=sampler, **settings))  # type: ignore[arg-type]
        return opened[-1]

    yield open_one
    for loader in opened:
        loader.close()


def assert_same(found: Sequence[Batch], expected: Sequence[Batch]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a.rows, b.rows)
        assert list(a.views) == list(b.views)
        assert all(torch.equal(a.views[name], b.views[name]) for name in b.views)


def joined(parts: list[Batch]) -> Batch:
    views = {name: torch.cat([part.views[name] for part in parts]) for name in parts[0].views}
    return replace(parts[0], views=views, rows=np.concatenate([part.rows for part in parts]))


def test_threads_and_prefetching_do_not_change_a_byte(open_loader: OpenLoader) -> None:
    expected = list(open_loader(num_threads=1, prefetch=1))
    assert [len(batch.rows) for batch in expected] == [8] * 5
    assert {name: tuple(view.shape) for name, view in expected[0].views.items()} == {
        **dict.fromkeys(("view1", "view2"), (8, 3, 32, 32)),
        **dict.fromkeys(("roi", "jittered_roi", "query_roi", "partner_roi"), (8, 3, 24, 24)),
    }
    assert_same(list(open_loader(num_threads=4, prefetch=6)), expected)


def test_any_step_can_be_the_first(open_loader: OpenLoader) -> None:
    expected = list(open_loader(num_steps=7))  # three steps per epoch: two epochs and a bit
    assert_same(list(open_loader(start_step=4, num_steps=3)), expected[4:])


@pytest.mark.parametrize(("world_size", "accumulate"), [(4, 1), (2, 2), (1, 4)])
def test_ranks_and_accumulation_share_the_same_views(world_size: int, accumulate: int, open_loader: OpenLoader) -> None:
    expected = list(open_loader())
    ranks = [list(open_loader(batch_size=2, rank=rank, world_size=world_size, accumulate=accumulate)) for rank in range(world_size)]
    assert all(len(batches) == 5 * accumulate for batches in ranks)
    for step in range(5):
        parts = [ranks[rank][step * accumulate + micro] for micro in range(accumulate) for rank in range(world_size)]
        assert_same([joined(parts)], [expected[step]])


def test_a_damaged_image_is_skipped_counted_and_logged_once(
    photos: Photos, open_loader: OpenLoader, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = Photos(list(photos.data), photos.heights, photos.widths)
    damaged.data[5] = np.zeros(1000, np.uint8)
    expected, loader = list(open_loader(num_steps=6)), open_loader(source=damaged, num_steps=6, name_of=lambda i: f"photo-{i}")
    found = list(loader)
    for a, b in zip(found, expected, strict=True):
        kept = np.isin(b.rows, a.rows)
        assert 5 not in a.rows
        assert np.array_equal(a.bad_rows, b.rows[~kept])
        assert all(torch.equal(a.views[name], view[torch.from_numpy(kept)]) for name, view in b.views.items())
    assert loader.num_skipped == sum(len(batch.bad_rows) for batch in found) >= 2
    assert [record.getMessage().split()[0] for record in caplog.records] == ["photo-5"]


def test_an_error_in_the_background_reaches_the_consumer(photos: Photos, mined: Mined) -> None:
    class Broken:
        def render(self, plan: ViewPlan) -> Batch:
            raise OSError("the disk went away")

        def close(self) -> None:
            """Nothing is held."""

    def draw(rows: Rows, epoch: int) -> ViewPlan:
        return orl_plan(rows, photos, mined, VIEWS, epoch=epoch)

    sampler = Sampler(num_images=len(photos), batch_size=4, seed=0)
    with ViewLoader(Broken(), draw, sampler=sampler) as loader, pytest.raises(OSError, match="went away"):
        next(loader)


def test_closed_loaders_leave_nothing_behind(open_loader: OpenLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[weakref.ref[Batch]] = []
    render = CpuRenderer.render

    def watched(self: CpuRenderer, plan: ViewPlan) -> Batch:
        batch = render(self, plan)
        rendered.append(weakref.ref(batch))
        return batch

    def use_one() -> tuple[int, int]:
        with open_loader(num_steps=None) as loader:  # closed while it renders ahead
            next(loader)
        gc.collect()
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    before = [use_one() for _ in range(4)][-1]
    monkeypatch.setattr(CpuRenderer, "render", watched)
    after = [use_one() for _ in range(10)][-1]
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    assert len(rendered) >= 10
    assert not any(batch() for batch in rendered)


@pytest.fixture(scope="module")
def packed(photo_paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return pack(photo_paths[:6], tmp_path_factory.mktemp("packed") / "six")


@pytest.fixture(scope="module")
def one_pair_each(packed: ShardIndex) -> Mined:
    """One RoI per image, paired with that of the image before."""
    num, one = len(packed), np.zeros(len(packed), np.int16)
    rois = BoxTable.from_lists([np.array([[10, 10, 90, 100]], np.int16)] * num)
    pairs = PairTable(
        neighbors=np.roll(np.arange(num), 1)[:, None], first=np.arange(num)[:, None], count=np.ones((num, 1), np.int32),
        query_roi=one, partner_roi=one, similarities=np.ones(num, np.float32),
    )  # fmt: skip
    return Mined(rois=rois, pairs=pairs)


def load(shards: ShardIndex | Path, specs: Sequence[ViewSpec], **options: object) -> list[Batch]:
    settings: dict[str, object] = {"batch_size": 4, "num_steps": 2, "num_threads": 2, **options}
    with ViewLoader.open(shards, specs, **settings) as loader:  # type: ignore[arg-type]
        return list(loader)


def test_opened_on_shards_it_yields_the_views_asked_for(packed: ShardIndex, one_pair_each: Mined) -> None:
    two, four = specs_of(VIEWS, "view1", "view2"), specs_of(VIEWS, "view1", "view2", "query_roi", "partner_roi")
    with ViewLoader.open(packed, two, batch_size=4, accumulate=2, num_steps=2) as loader:
        assert loader.steps_per_epoch == 1
        assert loader.renderer_kind == "cpu"
        batches = list(loader)
    assert [len(batch.rows) for batch in batches] == [2] * 4
    assert list(batches[0].views) == ["view1", "view2"]
    found = load(packed.path, four, accumulate=2, mined=one_pair_each)
    for a, b in zip(found, batches, strict=True):
        assert list(a.views) == ["view1", "view2", "query_roi", "partner_roi"]
        assert all(torch.equal(a.views[name], view) for name, view in b.views.items())


def test_leaving_out_or_reordering_views_changes_no_byte_of_another(packed: ShardIndex, one_pair_each: Mined) -> None:
    whole = load(packed, specs_of(VIEWS), mined=one_pair_each)
    for names in (("partner_roi",), ("jittered_roi", "view2"), tuple(whole[0].views)[::-1]):
        for a, b in zip(load(packed, specs_of(VIEWS, *names), mined=one_pair_each), whole, strict=True):
            assert tuple(a.views) == names
            assert all(torch.equal(a.views[name], b.views[name]) for name in names)


def test_a_users_own_views(packed: ShardIndex) -> None:
    """Two large and eight small crops, as of multi-crop methods, and what the reference renders of the same plan."""
    specs = [
        ViewSpec(name=f"large{i}", size_px=224, source=RandomCrop(area=(0.14, 1.0)), augmentation=Augmentation(), stream=1 + i)
        for i in range(2)
    ] + [
        ViewSpec(name=f"small{i}", size_px=96, source=RandomCrop(area=(0.05, 0.14)), augmentation=Augmentation(blur_prob=0.5), stream=3 + i)
        for i in range(8)
    ]
    found, expected = (load(packed, specs, num_steps=1, loader=LoaderConfig(renderer=kind)) for kind in ("cpu", "reference"))
    assert [tuple(view.shape) for view in found[0].views.values()] == [(4, 3, 224, 224)] * 2 + [(4, 3, 96, 96)] * 8
    small = [found[0].views[f"small{i}"] for i in range(8)]
    assert not any(torch.equal(a, b) for i, a in enumerate(small) for b in small[:i])
    for name, view in found[0].views.items():
        assert (view.int() - expected[0].views[name].int()).abs().float().mean() <= 0.7, name


class _InMemory:
    """A user's source: everything read beforehand."""

    def __init__(self, index: ShardIndex) -> None:
        with ShardReader(index) as reader:
            self._data = [np.array(data) for data in reader.views(np.arange(len(index)))]
        self.asked: list[Rows] = []
        self.num_closed = 0

    def views(self, rows: Rows, /) -> list[NDArray[np.uint8]]:
        self.asked.append(rows)
        return [self._data[row] for row in rows]

    def close(self) -> None:
        self.num_closed += 1


def test_a_source_of_ones_own_gives_the_same_views(packed: ShardIndex, one_pair_each: Mined, monkeypatch: pytest.MonkeyPatch) -> None:
    specs, expected = specs_of(VIEWS), load(packed, specs_of(VIEWS), mined=one_pair_each)
    source = _InMemory(packed)
    assert_same(load(packed, specs, mined=one_pair_each, source=source), expected)
    assert source.num_closed == 1
    assert np.array_equal(np.unique(np.concatenate(source.asked)), np.arange(6))

    opened: list[_InMemory] = []
    monkeypatch.setitem(choose.SOURCES, "memory", lambda index: opened.append(_InMemory(index)) or opened[-1])  # type: ignore[func-returns-value]
    assert_same(load(packed, specs, mined=one_pair_each, loader=LoaderConfig(source="memory")), expected)
    assert [source.num_closed for source in opened] == [1]


def test_partners_come_from_packed_patches_whatever_the_source(
    packed: ShardIndex, one_pair_each: Mined, photo_paths: list[Path], tmp_path: Path
) -> None:
    specs, photos = specs_of(VIEWS), Photos([np.fromfile(path, np.uint8) for path in photo_paths[:6]], packed.heights, packed.widths)
    pack_patches(tmp_path / "patches", photos, one_pair_each.rois, np.arange(6))
    patched = replace(one_pair_each, patches=PatchStore.open(tmp_path / "patches", made_from=MADE_FROM))
    plain, found = load(packed, specs, mined=one_pair_each), load(packed, specs, mined=patched)
    for a, b in zip(found, plain, strict=True):
        assert all(torch.equal(a.views[name], b.views[name]) == (name != "partner_roi") for name in b.views)
        difference = (a.views["partner_roi"].int() - b.views["partner_roi"].int()).abs().float().mean()
        assert 0 < difference < 12  # resized twice and compressed once more
    assert_same(load(packed, specs, mined=patched, source=_InMemory(packed)), found)


def test_chosen_rows_alone_are_drawn_each_as_without_the_choice(packed: ShardIndex) -> None:
    rows, specs = np.array([1, 3, 4]), specs_of(VIEWS, "view1")
    seen: dict[tuple[int, int], torch.Tensor] = {}
    with ViewLoader.open(packed, specs, batch_size=1, num_steps=12, num_threads=1) as loader:
        for step, batch in enumerate(loader):
            seen[step // 6, int(batch.rows[0])] = batch.views["view1"]
    with ViewLoader.open(packed, specs, batch_size=3, num_steps=2, num_threads=1, rows=rows) as loader:
        assert loader.steps_per_epoch == 1
        for epoch, batch in enumerate(loader):
            assert sorted(batch.rows.tolist()) == rows.tolist()
            for row, view in zip(batch.rows.tolist(), batch.views["view1"], strict=True):
                assert torch.equal(view, seen[epoch, row][0])
    with pytest.raises(ConfigError, match="only 3 images"):
        ViewLoader.open(packed, specs, batch_size=4, rows=rows)


def test_what_cannot_be_loaded_is_refused_at_once(packed: ShardIndex) -> None:
    image = specs_of(VIEWS, "view1", "view2")
    with pytest.raises(ConfigError, match="multiple of 3"):
        ViewLoader.open(packed, image, batch_size=4, world_size=3)
    with pytest.raises(ConfigError, match="only 6 images"):
        ViewLoader.open(packed, image, batch_size=8)
    for wrong in ({"name": "view1"}, {"stream": 1}, {"stream": 16}, {"stream": 0}):
        with pytest.raises(ConfigError, match="each needs a name and a stream, 1 to 15, of its own"):
            ViewLoader.open(packed, [image[0], replace(image[1], **wrong)], batch_size=4)
    with pytest.raises(MissingStageError, match="orl-fast mine"):
        ViewLoader.open(packed, specs_of(VIEWS), batch_size=4)
    with pytest.raises(ConfigError, match="no CUDA device"):
        ViewLoader.open(packed, image, batch_size=4, loader=LoaderConfig(renderer="gpu"))


def test_auto_is_resolved_before_the_loader_starts(packed: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orl_fast.views.loader.faster_renderer", lambda *_, **__: "reference")
    with ViewLoader.open(packed, specs_of(VIEWS, "view1"), batch_size=4, num_steps=1) as loader:
        assert loader.renderer_kind == "reference"
        assert isinstance(loader.renderer, ReferenceRenderer)


def test_the_documented_loader_runs(packed: ShardIndex) -> None:
    text = (Path(__file__).parents[2] / "docs" / "loading.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) == 10
    changes = {
        "shards/coco": str(packed.path),
        "batch_size=256": "batch_size=4",
        "num_steps=1000": "num_steps=2",
        "size_px=224": "size_px=32",
    }
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["second"].shape == (4, 3, 32, 32)
    assert names["second"].is_floating_point()
