import io
import json
import tarfile

import numpy as np
import pytest
from odd_images import draw_image, encoded

from orl_fast.shards import ShardIndex, write_shards
from orl_fast.shards.verify import verify_shards


def found(folder, **options) -> list[str]:
    return [f"{file.name}: {message}" for file, message in verify_shards(folder, num_workers=1, **options)]


def test_good_shards_have_no_faults(packed):
    assert found(packed) == found(packed, fast=True) == found(packed, decode=True) == []
    assert verify_shards(packed, num_workers=2) == []


def test_real_photographs_have_no_faults(coco128, tmp_path):
    write_shards([coco128], tmp_path / "coco", num_workers=1)
    assert found(tmp_path / "coco", decode=True) == []


def test_missing_and_cut_shards(packed):
    (packed / "images-000001.tar").unlink()
    with (packed / "images-000003.tar").open("ab") as file:
        file.truncate(1000)
    for fast in (True, False):
        assert [line.split(", was")[0] for line in found(packed, fast=fast)] == [
            "images-000001.tar: is missing",
            "images-000003.tar: has 1000 bytes",
        ]


@pytest.mark.parametrize("place", ["jpeg", "header", "json", "ending"])
def test_any_changed_byte_is_found(packed, place):
    index = ShardIndex.open(packed)
    path = index.shard_paths[2]
    data = bytearray(path.read_bytes())
    row = index.shard_rows(2)[1]
    offset = int(index.offsets[row])
    at = {"jpeg": offset + 100, "header": offset - 512, "json": data.index(b'{"file_name"', offset) + 16, "ending": len(data) - 1}[place]
    data[at] ^= 1
    path.write_bytes(data)
    lines = found(packed)
    assert "images-000002.tar: its bytes have changed since it was packed (SHA-256)" in lines
    assert all(line.startswith("images-000002.tar: ") for line in lines)
    assert found(packed, fast=True) == []
    if place in ("header", "json"):
        assert len(lines) == 2


def test_undecodable_images_are_found_whatever_the_checksum(packed):
    index = ShardIndex.open(packed)
    path = index.shard_paths[0]
    data = bytearray(path.read_bytes())
    start, size = int(index.offsets[1]), int(index.sizes[1])
    data[start : start + size] = bytes(size)
    path.write_bytes(data)
    assert f"images-000000.tar: {index.keys[1]}.jpg: not an image of a known format" in found(packed, decode=True)


def test_changed_dali_index_is_found(packed):
    idx = packed / "images-000004.idx"
    idx.write_text(idx.read_text().replace("jpg 512 ", "jpg 513 "))
    (packed / "images-000000.idx").unlink()
    for fast in (True, False):
        assert [line.split(":")[0] for line in found(packed, fast=fast)] == ["images-000000.idx", "images-000004.idx"]


def test_wrong_table_of_shards_is_found(packed):
    shards = np.load(packed / "shards.npy")
    shards["first_row"][1] = 4
    np.save(packed / "shards.npy", shards)
    assert "order of its shards" in found(packed)[0]
    shards["first_row"][1] = 5
    shards["sha256"][2] = b"0" * 64
    np.save(packed / "shards.npy", shards)
    assert [line.split(":")[0] for line in found(packed)] == ["images-000002.tar", "manifest.json"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("offset", 1 << 40, "outside"),
        ("width", 0, "without pixels"),
        ("shard", 3, "order of its shards"),
        ("image_id", 99, "differs from"),
    ],
)
def test_wrong_rows_are_found(packed, field, value, message):
    rows = np.load(packed / "index.npy")
    rows[field][6] = value
    np.save(packed / "index.npy", rows)
    lines = found(packed)
    assert len(lines) == 1
    assert message in lines[0]


def test_exchanged_rows_are_found(packed):
    rows = np.load(packed / "index.npy")
    for field in ("offset", "size"):
        rows[field][[6, 7]] = rows[field][[7, 6]]
    np.save(packed / "index.npy", rows)
    assert any("position differs" in line for line in found(packed))
    assert [line.split(":")[0] for line in found(packed, fast=True)] == ["images-000001.idx"]


def test_changed_manifest_is_found(packed):
    manifest = packed / "manifest.json"
    values = json.loads(manifest.read_text())
    values["fingerprint"] = "0" * 32
    manifest.write_text(json.dumps(values))
    assert [line.split(":")[0] for line in found(packed)] == ["manifest.json"]


def _column_shard(path, keys) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key in keys:
            for column in ("rois.npy", "pairs.npy"):
                tar.addfile(tarfile.TarInfo(f"{key}.{column}"), io.BytesIO())


def test_column_shards_must_be_aligned(packed):
    index = ShardIndex.open(packed)
    keys = [index.keys[row] for row in index.shard_rows(1)]
    path = packed / "mined" / "pairs-000001.tar"
    _column_shard(path, keys)
    assert found(packed) == []
    _column_shard(path, keys[::-1])
    assert [line.split(":")[0] for line in found(packed)] == ["pairs-000001.tar"]
    path.write_bytes(b"no tar")
    assert "run orl-fast mine pairs" in found(packed)[0]


def test_packing_reencoded_images_verifies(tmp_path):
    (tmp_path / "odd").mkdir()
    for i, kind in enumerate(("PNG", "BMP", "TIFF", "WEBP")):
        (tmp_path / "odd" / f"{i}.{kind.lower()}").write_bytes(encoded(draw_image(i), kind))
    manifest = write_shards([tmp_path / "odd"], tmp_path / "out", num_workers=1)
    assert manifest.reencoded == {"BMP": 1, "PNG": 1, "TIFF": 1, "WEBP": 1}
    assert found(tmp_path / "out", decode=True) == []
