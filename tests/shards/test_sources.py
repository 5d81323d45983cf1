import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orl_fast.errors import DataError
from orl_fast.shards import sources
from orl_fast.shards.sources import find_sources, list_images


def make_coco(root: Path, split: str, ids: list[int], *, kind: str = "instances", parent: str = "") -> Path:
    folder = root / parent / split
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for i in ids:
        (folder / f"{i:012d}.jpg").write_bytes(b"x" * i)
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 1, "height": 1} for i in ids]
    document = {"info": {"description": '"images": [] as text'}, "annotations": [{"id": 1}], "images": images, "categories": []}
    (root / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(document))
    return folder


def names(listing: sources.Listing) -> list[str]:
    return [image.file_name for image in listing.images]


def test_coco_order_and_ids_are_kept(tmp_path):
    folder = make_coco(tmp_path / "coco", "train2017", [30, 9, 25])
    make_coco(tmp_path / "coco", "val2017", [1])
    for given_path in (tmp_path / "coco", folder):
        listing = list_images(find_sources([given_path]))
        assert [(image.image_id, image.key, image.num_bytes) for image in listing.images] == [
            (30, "000000000030", 30),
            (9, "000000000009", 9),
            (25, "000000000025", 25),
        ]


def test_real_coco_layout(coco128):
    listing = list_images(find_sources([coco128]))
    document = json.loads((coco128 / "annotations" / "instances_train2017.json").read_text())
    assert [(image.file_name, image.image_id) for image in listing.images] == [(i["file_name"], i["id"]) for i in document["images"]]
    assert listing.absent == [[]]
    assert listing.unlisted == [0]


def test_splits_are_chosen_by_name(tmp_path):
    make_coco(tmp_path, "val2017", [1])
    make_coco(tmp_path, "train2017", [2])
    make_coco(tmp_path, "unlabeled2017", [3], kind="image_info")
    chosen = find_sources([tmp_path], splits=["train2017", "unlabeled2017"])
    assert [image.image_id for image in list_images(chosen).images] == [2, 3]
    with pytest.raises(DataError, match=r"no split 'test2017'.*train2017, unlabeled2017, val2017"):
        find_sources([tmp_path], splits=["test2017"])


def test_several_splits_without_a_training_split_need_a_choice(tmp_path):
    make_coco(tmp_path, "a", [1])
    assert [source.folder.name for source in find_sources([tmp_path])] == ["a"]
    make_coco(tmp_path, "b", [2])
    with pytest.raises(DataError, match="--split"):
        find_sources([tmp_path])
    make_coco(tmp_path, "train_c", [2])
    assert [source.folder.name for source in find_sources([tmp_path])] == ["train_c"]


def test_split_option_without_splits_is_refused(photos):
    with pytest.raises(DataError, match="no splits"):
        find_sources([photos], splits=["train2017"])


def test_images_folder_layout(tmp_path):
    folder = make_coco(tmp_path, "train2017", [7, 5], parent="images")
    for given_path in (tmp_path, folder):
        assert [image.image_id for image in list_images(find_sources([given_path])).images] == [7, 5]


def test_absent_images_are_counted_and_unlisted_ones_come_last(tmp_path):
    folder = make_coco(tmp_path, "train2017", [30, 9, 25])
    (folder / "000000000009.jpg").unlink()
    for name in ("b.png", "a.jpg"):
        (folder / name).write_bytes(b"x")
    listing = list_images(find_sources([tmp_path]))
    assert listing.absent == [["000000000009.jpg"]]
    assert listing.unlisted == [2]
    assert [(image.file_name, image.image_id) for image in listing.images[2:]] == [("a.jpg", 31), ("b.png", 32)]


def test_sources_follow_one_another(tmp_path, photos):
    make_coco(tmp_path / "coco", "train2017", [30, 9])
    listing = list_images(find_sources([tmp_path / "coco", photos]))
    assert [image.source for image in listing.images] == [0] * 2 + [1] * 23
    assert [image.image_id for image in listing.images] == [30, 9, *range(31, 54)]
    reverse = list_images(find_sources([photos, tmp_path / "coco"]))
    assert [image.image_id for image in reverse.images] == [*range(23), 30, 9]


def test_one_folder_twice_is_refused(tmp_path, photos):
    with pytest.raises(DataError, match="each folder once"):
        find_sources([photos, photos / "dir1"])
    (tmp_path / "link").symlink_to(photos)
    with pytest.raises(DataError, match="each folder once"):
        find_sources([photos, tmp_path / "link"])


@pytest.mark.parametrize("text", ["", "[]", "{", '{"images": [{"id": 1}]}', '{"images": 3}'])
def test_damaged_annotation_files_are_reported(tmp_path, text):
    make_coco(tmp_path, "train2017", [1])
    (tmp_path / "annotations" / "instances_train2017.json").write_text(text)
    with pytest.raises(DataError, match=r"instances_train2017\.json: (not a COCO-style annotation file|cannot be read as JSON)"):
        list_images(find_sources([tmp_path]))


def test_folder_is_walked_in_order_of_paths(tmp_path):
    wanted = ["a b/ü.jpeg", "a/x.JPG", "a/y.TiFf", "new\nline.png", "z.bmp"]
    for name in [*wanted, "notes.txt", ".hidden.jpg", ".thumbnails/t.jpg", "jpg"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "folder.jpg").mkdir()
    listing = list_images(find_sources([tmp_path]))
    assert names(listing) == wanted
    assert [image.image_id for image in listing.images] == list(range(5))
    assert [image.key for image in listing.images] == ["a_b_", "a_x", "a_y", "new_line", "z"]


def test_links_are_followed_once_and_loops_end(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x.jpg").write_bytes(b"x")
    (tmp_path / "outside.jpg").write_bytes(b"y")
    root = tmp_path / "root"
    root.mkdir()
    (root / "alias1").symlink_to(tmp_path / "real")
    (root / "alias2").symlink_to(tmp_path / "real")
    (root / "up").symlink_to(root)
    (root / "loop").symlink_to("loop")
    (root / "file.jpg").symlink_to(tmp_path / "outside.jpg")
    (root / "broken.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "pipe.jpg")
    listing = list_images(find_sources([root]))
    assert names(listing) == ["alias1/x.jpg", "file.jpg"]
    assert {entry.file_name: entry.reason for entry in listing.unreadable if entry.file_name != "loop"} == {
        "broken.jpg": "cannot be read: No such file or directory",
        "pipe.jpg": "not a regular file",
    }


def test_digest_depends_on_names_ids_and_sizes_but_not_on_locations(tmp_path, photos):
    before = list_images(find_sources([photos])).digest()
    moved = photos.rename(tmp_path / "moved")
    assert list_images(find_sources([moved])).digest() == before
    (moved / "dir0" / "image 00.JPG").write_bytes(b"shorter")
    assert list_images(find_sources([moved])).digest() != before


@given(st.lists(st.text(st.characters(exclude_characters="\0/"), min_size=1, max_size=120), max_size=30))
def test_keys_are_plain_and_unique(file_names):
    taken: dict[str, int] = {}
    keys = [sources._unique_key(name, taken) for name in file_names]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,90}", key) for key in keys)


def test_key_collisions_are_numbered_in_order():
    taken: dict[str, int] = {}
    given_names = ["a.jpg", "a.png", "a-1.jpg", "a.bmp", "a/b.jpg", "a_b.jpg"]
    assert [sources._unique_key(name, taken) for name in given_names] == ["a", "a-1", "a-1-1", "a-2", "a_b", "a_b-1"]
