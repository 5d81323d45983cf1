"""Partner patches: read as they were packed, refused when stale or damaged."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orl_fast.errors import DataError, MissingStageError, StaleError
from orl_fast.tables import BoxTable, PairTable, TableInfo, new_table
from orl_fast.views.cpu import CpuRenderer
from orl_fast.views.plan import PATCH_SIDE_PX, draw_orl
from orl_fast.views.reference import ReferenceRenderer, decode
from orl_fast.views.sources import PatchedSource, PatchStore
from tests.views.conftest import Photos, only

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


def test_patches_stand_in_for_their_rois(photos: Photos, mined: tuple[BoxTable, PairTable], tmp_path: Path) -> None:
    rois, pairs = mined
    rows = np.arange(0, len(rois.boxes))
    packed = pack(tmp_path / "patches", photos, rois, rows)
    store = PatchStore.open(tmp_path / "patches", made_from=MADE_FROM)
    assert len(store) == len(rows)
    assert [store.view(i).tobytes() for i in range(len(store))] == packed
    source = PatchedSource(photos, store, num_images=len(photos))
    assert source.view(3) is photos.view(3)

    batch, sizes = np.arange(10), {"heights": photos.heights, "widths": photos.widths}
    settings = {"seed": 0, "epoch": 0, "views": only(patch_size_px=48), "rois": rois, "pairs": pairs, "terms": ("inter",), **sizes}
    plain, patched = draw_orl(batch, **settings), draw_orl(batch, patch_rows=store.rows, **settings)
    with CpuRenderer(source, num_threads=1) as renderer:
        found = renderer.render(patched)
    expected = ReferenceRenderer(photos).render(plain)
    assert (patched.crops.source[len(batch) :] >= len(photos)).all()
    assert (plain.crops.source < len(photos)).all()
    difference = (found.batches[1].int() - expected.batches[1].int()).abs().float()
    assert difference.mean() < 6  # resized twice and compressed once more: not the same pixels, but the same picture
    assert (found.batches[0].int() - expected.batches[0].int()).abs().max() <= 2


def test_stale_missing_and_damaged_patches_are_refused(photos: Photos, mined: tuple[BoxTable, PairTable], tmp_path: Path) -> None:
    folder = tmp_path / "patches"
    with pytest.raises(MissingStageError, match="orl-fast mine patches"):
        PatchStore.open(folder, made_from=MADE_FROM)
    pack(folder, photos, mined[0], np.arange(4), side_px=64)
    with pytest.raises(StaleError, match="64 px"):
        PatchStore.open(folder, made_from=MADE_FROM)
    pack(folder, photos, mined[0], np.arange(4))
    with pytest.raises(StaleError):
        PatchStore.open(folder, made_from={"rois": "other"})
    store = PatchStore.open(folder, made_from=MADE_FROM)
    (folder / "patches-000000.tar").write_bytes(bytes(600))
    (folder / "patches-000001.tar").unlink()
    for i in (0, 3):
        with pytest.raises(DataError, match="orl-fast mine patches"):
            store.view(i)


def test_stored_patches_are_whole_images(photos: Photos, mined: tuple[BoxTable, PairTable], tmp_path: Path) -> None:
    pack(tmp_path / "patches", photos, mined[0], np.arange(3))
    store = PatchStore.open(tmp_path / "patches", made_from=MADE_FROM)
    assert all(Image.open(io.BytesIO(store.view(i).tobytes())).size == (PATCH_SIDE_PX, PATCH_SIDE_PX) for i in range(3))
