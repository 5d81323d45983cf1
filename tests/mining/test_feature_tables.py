"""Features of images and RoIs: against a plain loop, and what shapes or stops them."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mining_world import ALL, CONFIG, NUM_IMAGES, World, files_of, mine, save_checkpoint

from orl_fast import encode, files
from orl_fast.checkpoint import read_checkpoint, write_checkpoint
from orl_fast.config import LoaderConfig
from orl_fast.errors import DataError
from orl_fast.mining.executor import Executor
from orl_fast.models import load_encoder
from orl_fast.shards import ShardIndex, ShardReader
from orl_fast.tables import BoxTable, table_info
from orl_fast.views.normalize import normalize
from orl_fast.views.plan import center_crops, roi_crops
from orl_fast.views.reference import ReferenceRenderer


def test_features_are_those_of_a_plain_loop(world: World, mined: Path):
    """PIL renders, one view at a time; the encoder's methods in float32."""
    index, encoder, rois, mining = world.index, load_encoder(world.checkpoint), BoxTable.open(mined / "rois"), CONFIG.mining
    features = np.load(mined / "features" / "features.npy")
    roi_features = np.concatenate([np.load(mined / "roi-features" / f"roi-features-{shard:06d}.npy") for shard in range(3)])
    assert (features.dtype, roi_features.dtype) == (np.float32, np.float16)
    with ShardReader(index) as reader, torch.inference_mode():
        renderer = ReferenceRenderer(reader)
        for row in range(NUM_IMAGES):
            one = np.array([row])
            plan = center_crops(one, heights=index.heights, widths=index.widths, resize_px=mining.resize_px, crop_px=mining.crop_px)
            found = encoder.projected(normalize(renderer.render(plan).views["view"]))
            assert float(torch.nn.functional.cosine_similarity(found, torch.from_numpy(features[row]))) > 0.999
            boxes = rois.of(row)
            plan = roi_crops(np.repeat(one, len(boxes)), boxes, size_px=mining.roi_size_px)
            found = encoder.pooled(normalize(renderer.render(plan).views["view"]))
            expected = torch.from_numpy(roi_features[rois.offsets[row] : rois.offsets[row + 1]].astype(np.float32))
            assert float(torch.nn.functional.cosine_similarity(found, expected).min()) > 0.999


def test_autocast_around_mining_changes_nothing(world: World, mined: Path, tmp_path: Path):
    with torch.autocast("cpu", torch.bfloat16):
        mine(world, tmp_path, ["features"])
    assert files_of(tmp_path / "features") == files_of(mined / "features")


def test_smaller_plans_give_the_same_features(world: World, mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encode, "MAX_DECODED_BYTES", 2 * 110 * 110 * 3)
    mine(world, tmp_path, ALL)
    assert files_of(tmp_path) == files_of(mined)


def test_the_renderer_is_recorded_unless_it_is_the_cpus(world: World, mined: Path, tmp_path: Path):
    config = {kind: CONFIG.model_copy(update={"loader": LoaderConfig(renderer=kind)}) for kind in ("auto", "cpu", "reference")}
    assert table_info(mined / "features").settings.keys() == {"resize_px", "crop_px"}
    mine(world, tmp_path, config=config["auto"])
    found = {kind: table_info(tmp_path / kind).fingerprint for kind in ("features", "roi-features", "pairs")}
    mine(world, tmp_path, config=config["cpu"])
    assert {kind: table_info(tmp_path / kind).fingerprint for kind in found} == found
    mine(world, tmp_path, config=config["reference"])
    for kind, fingerprint in found.items():
        info = table_info(tmp_path / kind)
        assert info.settings["renderer"] == "reference"
        assert info.fingerprint != fingerprint


def test_images_that_no_longer_decode_are_named(world: World, tmp_path: Path):
    shutil.copytree(world.shards, tmp_path / "shards")
    index = ShardIndex.open(tmp_path / "shards")
    with index.shard_paths[1].open("r+b") as tar:
        tar.seek(index.offsets[9])
        tar.write(bytes(int(index.sizes[9])))
    damaged = replace(world, shards=tmp_path / "shards")
    with pytest.raises(DataError, match=r"image scene009 can no longer be decoded; check the shards with orl-fast verify"):
        mine(damaged, tmp_path / "mined", ["features"])


def test_weights_that_are_not_finite_are_refused(world: World, tmp_path: Path):
    checkpoint = save_checkpoint(tmp_path / "checkpoint.pt", CONFIG)
    values = dict(read_checkpoint(checkpoint))
    model, optimizer = values.pop("model"), values.pop("optimizer")
    next(value for key, value in model.items() if key.endswith("weight"))[0] = torch.nan
    write_checkpoint(checkpoint, values, model=model, optimizer=optimizer)
    with pytest.raises(DataError, match="holds weights that are not finite"):
        mine(world, tmp_path / "mined", checkpoint=checkpoint)


class FirstOfEight(Executor):
    """One of eight processes, the others of which have nothing to do yet."""

    num_shares = 8

    def own(self, shards: Sequence[int]) -> Sequence[int]:
        return shards[::8]


def test_disk_space_is_required_for_all_processes_together(world: World, copy: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.rmtree(copy / "pairs")
    shutil.rmtree(copy / "roi-features")
    num_rois, num_features = len(BoxTable.open(copy / "rois").boxes), load_encoder(world.checkpoint).num_features
    usage: Callable[[Path], SimpleNamespace] = lambda _: SimpleNamespace(free=num_rois * num_features * 2 - 1)  # noqa: E731
    monkeypatch.setattr(files.shutil, "disk_usage", usage)
    with pytest.raises(DataError, match="RoI features takes"):
        mine(world, copy, executor=FirstOfEight())
    assert not list((copy / "roi-features").glob("*.npy"))
