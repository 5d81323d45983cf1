"""The loader's benchmark: contenders get the same images, and what is not installed is left out."""

import io
import sys
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import harness, user_views
from benchmarks.loading import Data, decode_tensor, pixel_source, store_pixels
from benchmarks.photographs import draw_jpeg
from orl_fast.config import LoaderConfig
from orl_fast.views.cpu import CpuRenderer
from orl_fast.views.loader import ViewLoader


@pytest.fixture(scope="module")
def data() -> Data:
    return Data.of([draw_jpeg(seed, width_px=240 + 16 * seed, height_px=210) for seed in range(4)])


def test_a_users_own_views_are_the_same_from_bytes_from_pixels_and_from_the_loader(data: Data) -> None:
    with ExitStack() as stack:
        index = store_pixels(data, stack)
        loader = stack.enter_context(
            ViewLoader.open(index, user_views.DINO_VIEWS, batch_size=4, loader=LoaderConfig(pixels="never"), num_threads=1)
        )
        loaded = next(loader)
        plan = data.plan(loaded.rows, 0, user_views.DINO_VIEWS)
        for source in (data, pixel_source(index)):
            renderer = CpuRenderer(source, num_threads=1)
            stack.callback(renderer.close)
            views = renderer.render(plan).views
            assert {name: tuple(view.shape) for name, view in views.items()} == {
                spec.name: (4, 3, spec.size_px, spec.size_px) for spec in user_views.DINO_VIEWS
            }
            assert all(torch.equal(view, loaded.views[name]) for name, view in views.items())


def test_the_other_toolkits_views_have_the_sizes_of_ours(data: Data) -> None:
    (sample,) = data.samples(1)
    found = [
        (user_views.SIMCLR_VIEWS, user_views._simclr_transforms()),
        (user_views.DINO_VIEWS, user_views._dino_transforms()),
    ]
    for specs, theirs in found:
        for views in theirs.values():
            assert [tuple(view.shape) for view in views(sample)] == [(3, spec.size_px, spec.size_px) for spec in specs]


def test_every_contender_has_a_row_in_each_group(data: Data) -> None:
    with ExitStack() as stack:
        rows = user_views.run(data, store_pixels(data, stack), num_samples=1, rounds=1)
    groups = list(dict.fromkeys(row.group for row in rows))
    assert len(groups) == 2
    assert all("one core, CPU time" in group for group in groups)
    for group in groups:
        names = [row.name for row in rows if row.group == group]
        assert names[-3:] == ["ours, JPEG bytes", "ours, pixel shards", "ours, pixel shards, normalized floats"]
        assert "rebuilt" in names[0]


def test_what_is_not_installed_is_skipped_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    harness.available.cache_clear()
    monkeypatch.setitem(sys.modules, "lightly", None)
    for _ in range(2):
        assert not [name for name in user_views._simclr_transforms() if "lightly" in name]
        assert not [name for name in user_views._dino_transforms() if "lightly" in name]
    harness.available.cache_clear()
    lines = [line for line in capsys.readouterr().out.splitlines() if "lightly" in line]
    assert len(lines) == 1
    assert "skipped" in lines[0]
    assert "pip install" in lines[0]


def test_torchcodec_decodes_to_pils_pixels() -> None:
    pytest.importorskip("torchcodec")
    for mode in ("RGB", "L"):
        file = io.BytesIO()
        Image.open(io.BytesIO(draw_jpeg(0, width_px=201, height_px=99))).convert(mode).save(file, "JPEG", quality=90)
        expected = np.asarray(Image.open(file).convert("RGB"))
        assert np.array_equal(decode_tensor(file.getvalue()).permute(1, 2, 0).numpy(), expected)
