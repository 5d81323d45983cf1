"""Images in both parts, found by their bytes; the two readers of them agree."""

import shutil
from pathlib import Path

import numpy as np

from orl_fast.evals.copies import copied, copied_files, copied_rows
from orl_fast.shards import ShardIndex, write_shards
from tests.evals.drawn_classes import draw_image


def test_what_occurs_again_within_a_part_is_no_copy() -> None:
    assert copied([b"a", b"b", b"blank", b"blank", b"c"], [b"c", b"b", b"blank", b"d", b"e", b"e"]) == [1, 4]


def test_files_and_packed_images_that_are_copies(tmp_path: Path) -> None:
    for i in range(6):
        draw_image(tmp_path / "train" / f"{i}.jpg", seed=i)
    for i in (10, 11):
        draw_image(tmp_path / "test" / f"{i}.jpg", seed=i)
    shutil.copy(tmp_path / "train" / "4.jpg", tmp_path / "test" / "other name.jpg")
    near = bytearray((tmp_path / "train" / "2.jpg").read_bytes())  # of the same length, another in one byte of a table
    near[near.index(b"\xff\xdb") + 5] ^= 1
    (tmp_path / "test" / "near.jpg").write_bytes(near)
    files = [sorted((tmp_path / part).iterdir()) for part in ("train", "test")]
    assert [files[0][i].name for i in copied_files(*files)] == ["4.jpg"]
    assert copied_files([*files[0], tmp_path / "missing.jpg"], files[1]) == [4]
    write_shards([tmp_path / "train", tmp_path / "test"], tmp_path / "shards", num_workers=1)
    index = ShardIndex.open(tmp_path / "shards")
    rows = [np.flatnonzero(index.sources == source) for source in (0, 1)]
    assert [index.file_names[row] for row in copied_rows((index, rows[0]), (index, rows[1])).tolist()] == ["4.jpg"]
    assert copied_rows((index, rows[0][:2]), (index, rows[1])).size == 0
