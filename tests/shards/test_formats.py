"""The shards as the tools of others read them."""

import gc
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orl_fast.mining.pairs import write_pair_shards
from orl_fast.shards import ShardIndex, ShardReader
from orl_fast.shards.images import decode_rgb
from orl_fast.shards.writer import new_tar
from orl_fast.tables import BoxTable, PairTable


def expected_samples(index: ShardIndex) -> list[tuple[str, bytes, dict[str, object]]]:
    with ShardReader(index) as reader:
        return [
            (
                index.keys[i],
                reader.read(i),
                {
                    "file_name": index.file_names[i],
                    "image_id": int(index.image_ids[i]),
                    "width": int(index.widths[i]),
                    "height": int(index.heights[i]),
                },
            )
            for i in range(len(index))
        ]


# webdataset leaves closing its files to the garbage collector
@pytest.mark.filterwarnings("ignore:.*unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards(packed):
    import webdataset

    index = ShardIndex.open(packed)
    dataset = webdataset.WebDataset([str(path) for path in index.shard_paths], shardshuffle=False)
    samples = [(sample["__key__"], sample["jpg"], json.loads(sample["json"])) for sample in dataset]
    assert samples == expected_samples(index)
    gc.collect()


@pytest.mark.parametrize("with_index", [True, False])
def test_dali_reads_the_shards(packed, with_index):
    from nvidia.dali import fn, pipeline_def

    index = ShardIndex.open(packed)
    extra = {"index_paths": [str(path.with_suffix(".idx")) for path in index.shard_paths]} if with_index else {}

    @pipeline_def(batch_size=23, num_threads=1, device_id=None)
    def pipeline():
        return tuple(fn.readers.webdataset(paths=[str(path) for path in index.shard_paths], ext=["jpg", "json"], name="reader", **extra))

    built = pipeline()
    built.build()
    assert built.epoch_size("reader") == 23
    jpegs, texts = built.run()
    found = [(np.asarray(jpeg).tobytes(), json.loads(np.asarray(text).tobytes())) for jpeg, text in zip(jpegs, texts, strict=True)]
    assert found == [sample[1:] for sample in expected_samples(index)]


def test_dali_index_is_what_its_own_tool_writes(packed, tmp_path):
    wds2idx = pytest.importorskip("wds2idx")
    for path in ShardIndex.open(packed).shard_paths:
        with wds2idx.IndexCreator(str(path), str(tmp_path / "own.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "own.idx").read_bytes() == path.with_suffix(".idx").read_bytes()


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar program here")
def test_tar_unpacks_the_shards(packed, tmp_path):
    index = ShardIndex.open(packed)
    for path in index.shard_paths:
        subprocess.run(["tar", "-xf", path, "-C", tmp_path], check=True)
    for key, jpeg, about in expected_samples(index):
        assert (tmp_path / f"{key}.jpg").read_bytes() == jpeg
        assert json.loads((tmp_path / f"{key}.json").read_bytes()) == about


def test_archives_are_what_pythons_tarfile_writes(packed, tmp_path):
    """Byte for byte, headers, padding and end: nothing of the format is our own."""
    for path in ShardIndex.open(packed).shard_paths:
        with tarfile.open(path) as ours, tarfile.open(tmp_path / "own.tar", "w", format=tarfile.USTAR_FORMAT) as own:
            for member in ours:
                plain = tarfile.TarInfo(member.name)
                plain.size, plain.mode = member.size, 0o444
                own.addfile(plain, ours.extractfile(member))
        assert (tmp_path / "own.tar").read_bytes() == path.read_bytes()


def test_headers_hold_the_longest_key(tmp_path):
    with new_tar(tmp_path / "long.tar") as add:
        start = add("k" * 95 + ".json", b"content")
    header = (tmp_path / "long.tar").read_bytes()[:start]
    assert len(header) == tarfile.BLOCKSIZE
    assert tarfile.TarInfo.frombuf(header, "utf-8", "strict").name == "k" * 95 + ".json"


def example(number: int, folder: Path) -> str:
    """A code block of FORMAT.md, for this dataset."""
    text = (Path(__file__).parents[2] / "shards" / "FORMAT.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[number].replace("shards/coco", str(folder))


@pytest.mark.filterwarnings("ignore:.*unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_documented_way_to_read_pairs_with_webdataset(packed):
    index = ShardIndex.open(packed)
    rng, num = np.random.default_rng(0), len(index)
    rois = BoxTable.from_lists([rng.integers(0, 20, (3, 4)).astype(np.int16) for _ in range(num)])
    pairs = PairTable(
        neighbors=rng.integers(0, num, (num, 2)),
        first=np.arange(2 * num).reshape(num, 2) * 2,
        count=np.full((num, 2), 2, np.int32),
        query_roi=rng.integers(0, 3, 4 * num).astype(np.int16),
        partner_roi=rng.integers(0, 3, 4 * num).astype(np.int16),
        similarities=rng.random(4 * num).astype(np.float32),
    )
    (packed / "mined" / "pairs").mkdir(parents=True)
    write_pair_shards(packed / "mined" / "pairs", index=index, rois=rois, pairs=pairs)
    names: dict[str, Any] = {"found": []}
    code = example(0, packed)
    exec(code.rstrip() + "\n        found.append((pixels, rois, row, query, partner))", names)
    gc.collect()
    assert len(names["found"]) == 4 * num
    for i, (pixels, found_rois, row, query, partner) in enumerate(names["found"]):
        image, neighbor = i // 4, int(pairs.neighbors[i // 4, i % 4 // 2])
        with ShardReader(index) as reader:
            np.testing.assert_array_equal(pixels, decode_rgb(reader.view(image)))
        np.testing.assert_array_equal(found_rois, rois.of(image))
        assert row == neighbor
        assert query == rois.of(image)[pairs.query_roi[i]].tolist()
        assert partner == rois.of(neighbor)[pairs.partner_roi[i]].tolist()


def test_the_documented_way_to_read_images_with_dali(packed):
    names: dict[str, Any] = {}
    exec(example(1, packed), names)
    index = ShardIndex.open(packed)
    assert names["pipeline"].epoch_size("images") == len(index)
    with ShardReader(index) as reader:
        expected = {np.asarray(decode_rgb(data)).tobytes() for data in reader.views(range(len(index)))}
    found = {np.asarray(pixels).tobytes() for pixels in names["pixels"]}
    assert len(names["pixels"]) == 8
    assert found <= expected
