"""The shards through the eyes of the tools that others use."""

import gc
import json
import shutil
import subprocess
import tarfile

import numpy as np
import pytest

from orl_fast.shards import ShardIndex, ShardReader
from orl_fast.shards.writer import tar_header


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
    """Byte for byte, headers, filling and ending: nothing of the format is our own."""
    for path in ShardIndex.open(packed).shard_paths:
        with tarfile.open(path) as ours, tarfile.open(tmp_path / "own.tar", "w", format=tarfile.USTAR_FORMAT) as own:
            for member in ours:
                plain = tarfile.TarInfo(member.name)
                plain.size, plain.mode = member.size, 0o444
                own.addfile(plain, ours.extractfile(member))
        assert (tmp_path / "own.tar").read_bytes() == path.read_bytes()


def test_headers_hold_the_longest_key():
    assert tarfile.TarInfo.frombuf(tar_header("k" * 95 + ".json", 7), "utf-8", "strict").name == "k" * 95 + ".json"
