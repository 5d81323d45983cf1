"""The column of labels next to packed images: written whole, refused where it does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest

from orl_fast.errors import DataError, StaleError
from orl_fast.shards import ShardIndex, write_shards
from orl_fast.shards.labels import INFO_NAME, ROW, TABLE_NAME, ImageClasses, read_classes, write_classes
from tests.evals.drawn_classes import draw_image


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    for i in range(5):
        draw_image(tmp_path / "photos" / f"{i}.png", seed=i)
    write_shards([tmp_path / "photos"], tmp_path / "shards", num_workers=1)
    return ShardIndex.open(tmp_path / "shards")


def _classes(*, first: int = 0) -> ImageClasses:
    labels, splits = np.array([first, 1, -1, 1, 0], np.int32), np.array([0, 0, -1, 1, -1], np.int32)
    return ImageClasses(classes=("Katze", "été"), labels=labels, splits=splits)


def test_what_is_written_is_read_and_plain_numpy_reads_it(index: ShardIndex) -> None:
    assert read_classes(index) is None
    write_classes(index, _classes())
    found = read_classes(index)
    assert found is not None
    assert found.classes == ("Katze", "été")
    table = np.load(index.path / TABLE_NAME)
    assert table.dtype == ROW
    assert table["label"].tolist() == found.labels.tolist() == [0, 1, -1, 1, 0]
    assert table["split"].tolist() == found.splits.tolist() == [0, 0, -1, 1, -1]
    info = json.loads((index.path / INFO_NAME).read_text())
    assert (info["version"], info["index"], info["fingerprint"]) == (1, index.fingerprint, found.fingerprint(index))


def test_equal_labels_are_left_alone_and_others_replaced(index: ShardIndex) -> None:
    write_classes(index, _classes())
    before = (index.path / INFO_NAME).stat().st_ino
    write_classes(index, _classes())
    assert (index.path / INFO_NAME).stat().st_ino == before
    write_classes(index, _classes(first=1))
    found = read_classes(index)
    assert found is not None
    assert found.labels[0] == 1


def test_a_column_of_other_images_or_with_another_table_is_refused(index: ShardIndex) -> None:
    write_classes(index, _classes())
    info, table = index.path / INFO_NAME, index.path / TABLE_NAME
    good = json.loads(info.read_text())
    rows = np.load(table)
    np.save(table, rows[:4])
    with pytest.raises(DataError, match=r"labels\.npy does not fit"):
        read_classes(index)
    table.unlink()
    with pytest.raises(DataError, match="damaged"):
        read_classes(index)
    np.save(table, rows)
    for change, kind, message in (
        ({"index": "0" * 32}, StaleError, "made from images 00000000"),
        ({"version": 2}, DataError, "format version 2, this version reads 1"),
        ({"classes": ["only"]}, DataError, r"labels\.npy does not fit"),
        ({"fingerprint": "x"}, DataError, r"labels\.npy does not fit"),
    ):
        info.write_text(json.dumps(good | change))
        with pytest.raises(kind, match=message):
            read_classes(index)
    info.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        read_classes(index)


def test_a_label_beyond_the_classes_is_refused(index: ShardIndex) -> None:
    for labels in ([0, 1, -1, 2, 0], [-1, 1, -1, 1, 0]):  # no such class; trained on, but without a class
        odd = ImageClasses(classes=("a", "b"), labels=np.array(labels, np.int32), splits=np.array([0, 0, -1, 1, -1], np.int32))
        write_classes(index, odd)
        with pytest.raises(DataError, match="labels are out of range"):
            read_classes(index)
