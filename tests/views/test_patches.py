"""Partner patches: read as they were packed, refused when stale or damaged."""

import io
import tarfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orl_fast.errors import DataError, MissingStageError, StaleError
from orl_fast.tables import BoxTable, TableInfo, new_table
from orl_fast.views.cpu import CpuRenderer
from orl_fast.views.draw import Mined
from orl_fast.views.patches import PATCH_SIDE_PX, PatchedSource, PatchStore
from orl_fast.views.reference import ReferenceRenderer, decode
from tests.views.conftest import Photos, only, orl_plan

MADE_FROM = {"rois": "a", "pairs": "b"}


def pack(folder: Path, photos: Photos, rois: BoxTable, rows: np.ndarray, *, side_px: int = PATCH_SIDE_PX) -> list[bytes]:
    """Two tar files of patches, as mining writes them."""
    owners = np.searchsorted(rois.offsets, rows, side="right") - 1
    patches, offsets, shards = [], [], np.arange(len(rows)) * 2 // len(rows)
    with new_table(folder, TableInfo(kind="patches", made_from=MADE_FROM, settings={"side_px": side_px})) as table:
        for shard in (0, 1):
            with tarfile.open(table / f"patches-{shard:06d}.tar", "w") as tar:
                for row, owner in zip(rows[shards == shard], owners[shards == shard], strict=True):
                    buffer = io.BytesIO()
                    patch = decode(photos.data[owner]).crop(tuple(rois.boxes[row].tolist())).resize((PATCH_SIDE_PX, PATCH_SIDE_PX))
                    patch.save(buffer, "JPEG", quality=95)
                    patches.append(buffer.getvalue())
                    info = tarfile.TarInfo(f"{row}.jpg")
                    info.size = len(patches[-1])
                    offsets.append(tar.offset + 512)
                    tar.addfile(info, io.BytesIO(patches[-1]))
        np.save(table / "roi_row.npy", rows)
        np.save(table / "shard.npy", shards.astype(np.int32))
        np.save(table / "offset.npy", np.array(offsets))
        np.save(table / "size.npy", np.array([len(patch) for patch in patches], np.int32))
    return patches


def test_patches_stand_in_for_their_rois(photos: Photos, mined: Mined, tmp_path: Path) -> None:
    rows = np.arange(0, len(mined.rois.boxes))
    packed = pack(tmp_path / "patches", photos, mined.rois, rows)
    store = PatchStore.open(tmp_path / "patches", made_from=MADE_FROM)
    assert len(store.rows) == len(rows)
    assert [store.view(i).tobytes() for i in range(len(store.rows))] == packed
    num = len(photos)
    source = PatchedSource(photos, store, num_images=num)
    mixed = source.views(np.array([num + 4, 3, num, 0, 3]))
    assert [data.tobytes() for data in mixed] == [
        packed[4],
        photos.data[3].tobytes(),
        packed[0],
        photos.data[0].tobytes(),
        photos.data[3].tobytes(),
    ]
    assert mixed[1] is photos.data[3]  # no copy

    batch, views = np.arange(10), only(patch_size_px=48)
    plain = orl_plan(batch, photos, mined, views, "query_roi", "partner_roi")
    patched = orl_plan(batch, photos, replace(mined, patches=store), views, "query_roi", "partner_roi")
    with closing(CpuRenderer(source, num_threads=1)) as renderer:
        found = renderer.render(patched)
    expected = ReferenceRenderer(photos).render(plain)
    assert (patched.crops.source[len(batch) :] >= num).all()
    assert (plain.crops.source < num).all()
    difference = (found.views["partner_roi"].int() - expected.views["partner_roi"].int()).abs().float()
    assert difference.mean() < 6  # resized twice and compressed once more: not the same pixels, but the same picture
    assert (found.views["query_roi"].int() - expected.views["query_roi"].int()).abs().max() <= 2


def test_a_store_keeps_the_patches_it_was_opened_with(photos: Photos, mined: Mined, tmp_path: Path) -> None:
    folder, rows = tmp_path / "patches", np.arange(8)
    packed = pack(folder, photos, mined.rois, rows)
    store = PatchStore.open(folder, made_from=MADE_FROM)
    assert store.view(0).tobytes() == packed[0]  # the second tar is not open yet
    folder.rename(tmp_path / "patches@before")
    assert pack(folder, photos, mined.rois, rows[::-1] + 1) != packed
    assert [store.view(i).tobytes() for i in range(8)] == packed


def test_a_store_whose_folder_was_deleted_never_reads_its_successor(photos: Photos, mined: Mined, tmp_path: Path) -> None:
    folder, rows = tmp_path / "patches", np.arange(8)
    packed = pack(folder, photos, mined.rois, rows)
    store = PatchStore.open(folder, made_from=MADE_FROM)
    assert store.view(0).tobytes() == packed[0]
    pack(folder, photos, mined.rois, rows + 4)
    assert [store.view(i).tobytes() for i in range(4)] == packed[:4]  # mapped before
    with pytest.raises(DataError, match="orl-fast mine patches"):
        store.view(7)


def test_stale_missing_and_damaged_patches_are_refused(photos: Photos, mined: Mined, tmp_path: Path) -> None:
    folder = tmp_path / "patches"
    with pytest.raises(MissingStageError, match="orl-fast mine patches"):
        PatchStore.open(folder, made_from=MADE_FROM)
    pack(folder, photos, mined.rois, np.arange(4), side_px=64)
    with pytest.raises(StaleError, match="64 px"):
        PatchStore.open(folder, made_from=MADE_FROM)
    pack(folder, photos, mined.rois, np.arange(4))
    with pytest.raises(StaleError):
        PatchStore.open(folder, made_from={"rois": "other"})
    store = PatchStore.open(folder, made_from=MADE_FROM)
    (folder / "patches-000000.tar").write_bytes(bytes(600))
    (folder / "patches-000001.tar").unlink()
    for i in (0, 3):
        with pytest.raises(DataError, match="orl-fast mine patches"):
            store.view(i)


def test_stored_patches_are_whole_images(photos: Photos, mined: Mined, tmp_path: Path) -> None:
    pack(tmp_path / "patches", photos, mined.rois, np.arange(3))
    store = PatchStore.open(tmp_path / "patches", made_from=MADE_FROM)
    assert all(Image.open(io.BytesIO(store.view(i).tobytes())).size == (PATCH_SIDE_PX, PATCH_SIDE_PX) for i in range(3))
