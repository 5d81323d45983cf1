"""The stage as a whole: what it writes, what it skips, what it refuses, and that a killed run ends in the same bytes."""

import io
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from mining_world import ALL, CONFIG, NUM_IMAGES, World, files_of, mine, save_checkpoint, with_mining
from PIL import Image

from orl_fast.boxes import filter_proposals
from orl_fast.cli.mine import command
from orl_fast.errors import ConfigError, DataError, MissingStageError, StaleError
from orl_fast.mining.pipeline import Stage
from orl_fast.mining.reference_json import export_neighbors, import_neighbors
from orl_fast.mining.rois import open_boxes
from orl_fast.shards import ShardReader, write_shards
from orl_fast.tables import BoxTable, NeighborTable, PairTable, table_info
from orl_fast.views.patches import PatchStore


def test_tables_follow_from_one_another(world: World, mined: Path):
    index, rois, pairs = world.index, BoxTable.open(mined / "rois"), PairTable.open(mined / "pairs")
    features = np.load(mined / "features" / "features.npy").astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    products = np.round(features @ features.T, 12)
    np.fill_diagonal(products, -np.inf)
    order = np.lexsort((np.broadcast_to(np.arange(NUM_IMAGES), products.shape), -products), axis=1)[:, :3]
    np.testing.assert_array_equal(NeighborTable.open(mined / "neighbors").neighbors, order)
    np.testing.assert_array_equal(pairs.neighbors, order)
    roi_features = [np.load(mined / "roi-features" / f"roi-features-{shard:06d}.npy") for shard in range(index.num_shards)]
    cosines = np.concatenate(roi_features).astype(np.float64)
    cosines = (cosines @ cosines.T).astype(np.float32)
    for shard in range(index.num_shards):
        images = index.shard_rows(shard)
        for place, image in enumerate(images):
            proposals = open_boxes(mined / "proposals", shard).of(place)
            kept = filter_proposals(proposals, min_side_px=16, max_rois=12)
            assert rois.of(image).tolist() == proposals[kept].tolist()
            for k, neighbor in enumerate(order[image]):
                own, other = (slice(*rois.offsets[i : i + 2]) for i in (image, neighbor))
                scores = cosines[own, other].reshape(-1)
                best = np.argsort(-scores, kind="stable")[: max(1, int(0.3 * len(rois.of(image))))]
                rows = slice(pairs.first[image, k], pairs.first[image, k] + pairs.count[image, k])
                found = pairs.query_roi[rows].astype(int) * len(rois.of(neighbor)) + pairs.partner_roi[rows]
                assert found.tolist() == best.tolist()
                assert pairs.similarities[rows].tolist() == scores[best].tolist()


def test_sizes_that_the_backbone_cannot_take_are_refused(world: World, tmp_path: Path):
    config = with_mining(crop_px=16)
    config = config.model_copy(update={"model": config.model.model_copy(update={"backbone": "densenet121"})})
    dense = replace(world, checkpoint=save_checkpoint(tmp_path / "checkpoint.pt", config))
    with pytest.raises(ConfigError, match=r"mining\.crop_px = 16: too small for the backbone"):
        mine(dense, tmp_path / "mined", ("features",), config=config)


def test_pair_shards_hold_the_tables_under_the_keys_of_the_images(world: World, mined: Path):
    index, rois, pairs = world.index, BoxTable.open(mined / "rois"), PairTable.open(mined / "pairs")
    for shard, path in enumerate(index.shard_paths):
        with tarfile.open(mined / "pairs" / path.name.replace("images", "pairs")) as tar:
            members = {name: np.load(io.BytesIO(tar.extractfile(name).read())) for name in tar.getnames()}
        rows = index.shard_rows(shard)
        parts = ("rois", "neighbors", "pairs", "similarity")
        assert list(members) == [f"{index.keys[i]}.{part}.npy" for i in rows for part in parts]
        for i in rows:
            found, neighbors, entries, similarity = (members[f"{index.keys[i]}.{part}.npy"] for part in ("rois", *parts[1:]))
            assert (found.dtype, neighbors.dtype, entries.dtype, similarity.dtype) == (np.int16, np.int64, np.int32, np.float32)
            assert found.tolist() == rois.of(i).tolist()
            assert neighbors.tolist() == pairs.neighbors[i].tolist()
            expected = []
            for k, (first, count) in enumerate(zip(pairs.first[i], pairs.count[i], strict=True)):
                for row in range(first, first + count):
                    partner = rois.of(neighbors[k])[pairs.partner_roi[row]]
                    expected.append([k, *rois.of(i)[pairs.query_roi[row]], *partner, pairs.similarities[row]])
            assert np.c_[entries, similarity].tolist() == np.array(expected).tolist()


def test_patches_are_the_partner_rois_each_once(world: World, mined: Path):
    rois, pairs, store = BoxTable.open(mined / "rois"), PairTable.open(mined / "pairs"), PatchStore(mined / "patches")
    used = {
        int(rois.offsets[pairs.neighbors[i, k]] + pairs.partner_roi[row])
        for i in range(NUM_IMAGES)
        for k in range(3)
        for row in range(pairs.first[i, k], pairs.first[i, k] + pairs.count[i, k])
    }
    assert store.rows.tolist() == sorted(used)
    with ShardReader(world.index) as reader:
        for patch, row in enumerate(store.rows.tolist()):
            image = int(np.searchsorted(rois.offsets, row, side="right")) - 1
            source = Image.open(io.BytesIO(reader.read(image))).convert("RGB").crop(rois.boxes[row].tolist())
            expected = np.asarray(source.resize((128, 128), Image.Resampling.BILINEAR), np.float32)
            found = np.asarray(Image.open(io.BytesIO(store.view(patch).tobytes())), np.float32)
            assert np.abs(found - expected).mean() < 2.5


def test_a_second_run_has_nothing_to_do(world: World, copy: Path):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name not in ("mine.log", ".lock")}
    mine(world, copy, ALL)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name not in ("mine.log", ".lock")} == before


def test_fewer_neighbors_and_pairs_are_served_and_more_reuse_features(world: World, copy: Path):
    kept = {name: data for name, data in files_of(copy).items() if name.split("/")[0] in ("features", "proposals", "rois", "roi-features")}
    whole = PairTable.open(copy / "pairs")
    config = with_mining(num_neighbors=2, pair_ratio=0.1)
    mine(world, copy, config=config)
    assert table_info(copy / "pairs").settings["num_neighbors"] == 3
    times = {name: (copy / name).stat().st_mtime_ns for name in kept}
    mine(world, copy, config=with_mining(num_neighbors=5, pair_ratio=0.5))
    more = PairTable.open(copy / "pairs")
    assert more.neighbors.shape == (NUM_IMAGES, 5)
    assert {name: (copy / name).stat().st_mtime_ns for name in kept} == times
    less = more.limited(BoxTable.open(copy / "rois"), num_neighbors=3, pair_ratio=0.3, variant="official")
    np.testing.assert_array_equal(less.neighbors, whole.neighbors)
    for i in range(NUM_IMAGES):
        for k in range(3):
            a, b = (slice(t.first[i, k], t.first[i, k] + t.count[i, k]) for t in (less, whole))
            assert less.query_roi[a].tolist() == whole.query_roi[b].tolist()
            assert less.similarities[a].tolist() == whole.similarities[b].tolist()


def test_what_is_stale_or_missing_is_refused_with_the_command_that_fixes_it(world: World, copy: Path, tmp_path: Path):
    other = save_checkpoint(tmp_path / "other.pt", CONFIG, seed=1)
    with pytest.raises(StaleError, match=r"features: made from encoder .* run orl-fast mine features"):
        mine(world, copy, ["neighbors"], checkpoint=other)
    with pytest.raises(StaleError, match=r"neighbors: made from encoder .* run orl-fast mine neighbors"):
        mine(world, copy, ["pairs"], checkpoint=other)
    mine(world, copy, ["rois"], config=with_mining(min_side_px=20))
    with pytest.raises(StaleError, match=r"pairs: made from rois .* run orl-fast mine pairs"):
        mine(world, copy, ["patches"])
    mine(world, copy, ["proposals"], config=with_mining(proposal_seed=5))
    with pytest.raises(StaleError, match=r"rois: made from proposals .* run orl-fast mine rois"):
        mine(world, copy, ["pairs"])
    with pytest.raises(StaleError, match=r"holds 3 neighbors, 4 are asked for; run orl-fast mine neighbors --neighbors 4"):
        mine(world, copy, ["rois", "pairs"], config=with_mining(num_neighbors=4))
    empty = tmp_path / "empty"
    for step, needs in (("neighbors", "features"), ("rois", "proposals"), ("pairs", "neighbors"), ("patches", "rois")):
        with pytest.raises(MissingStageError, match=f"no {needs} table; run orl-fast mine {needs}"):
            mine(world, empty, [step])
        assert not empty.exists()
    with pytest.raises(MissingStageError, match="run orl-fast train"):
        mine(world, empty, checkpoint=tmp_path / "none.pt")
    mine(world, empty, ["proposals", "rois"], checkpoint=tmp_path / "none.pt")


def test_tables_of_other_images_are_refused(world: World, mined: Path, tmp_path: Path):
    write_shards([world.images], tmp_path / "shards", shard_size=5, num_workers=1)
    others = World(folder=tmp_path, images=world.images, shards=tmp_path / "shards", checkpoint=world.checkpoint, config=CONFIG)
    with pytest.raises(StaleError, match=r"made from index .* run orl-fast mine"):
        mine(others, mined, ["pairs"])


# Imports once, then starts and kills a child again and again: as soon as it has written something new, or a little later.
KILLER = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from mining_world import CONFIG
from orl_fast.mining.pipeline import STEPS, Stage
from orl_fast.shards import ShardIndex

folder = Path({folder!r})
files = lambda: sorted(folder.rglob("*")) if folder.exists() else []
for attempt in range(6):
    child = os.fork()
    if not child:
        index = ShardIndex.open(Path({shards!r}))
        Stage(index=index, folder=folder, config=CONFIG, checkpoint=Path({checkpoint!r})).run([*STEPS, "patches"])
        os._exit(0)
    seen, status = files(), (0, 0)
    while files() == seen and status == (0, 0):
        time.sleep(0.001)
        status = os.waitpid(child, os.WNOHANG)
    if status == (0, 0):
        time.sleep([0, 0.003, 0.03, 0.01, 0.1, 0][attempt])
        if attempt < 5:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)
    print(attempt, status[1], len(files()), flush=True)
    if status[1] == 0:
        break
"""


def test_a_run_killed_again_and_again_ends_in_the_same_bytes(world: World, mined: Path, tmp_path: Path):
    folder, paths = tmp_path / "killed", {"tests": Path(__file__).parent, "shards": world.shards, "checkpoint": world.checkpoint}
    script = KILLER.format(folder=str(folder), **{name: str(path) for name, path in paths.items()})
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    attempts = [line.split() for line in done.stdout.splitlines()]
    assert sum(status == "9" for _, status, _ in attempts) >= 3, done.stdout
    assert attempts[-1][1] == "0", done.stdout
    assert files_of(folder) == files_of(mined)


# Holds the folder as a run of `mine` does, until its input ends.
HOLDER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from mining_world import CONFIG
from orl_fast.mining.pipeline import Stage
from orl_fast.shards import ShardIndex

index = ShardIndex.open(Path({shards!r}))
with Stage(index=index, folder=Path({folder!r}), config=CONFIG, checkpoint=Path("none")).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_mines_or_imports_into_a_folder(world: World, mined: Path, tmp_path: Path, messages: list[str]):
    """A process that was refused must not open the way for a third one."""
    folder = tmp_path / "mined"
    done = Stage(index=world.index, folder=mined, config=CONFIG, checkpoint=world.checkpoint)
    export_neighbors(done, tmp_path / "neighbors.json")
    script = HOLDER.format(tests=str(Path(__file__).parent), shards=str(world.shards), folder=str(folder))
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "held\n"
            before = sorted(path.name for path in folder.iterdir())
            assert "mine.log" in before
            for _ in range(3):
                with pytest.raises(DataError, match=r"orl-fast mine or tables import .* is writing here"):
                    mine(world, folder)
                with pytest.raises(DataError, match=r"orl-fast mine or tables import .* is writing here"):
                    import_neighbors(replace(done, folder=folder), tmp_path / "neighbors.json")
            assert sorted(path.name for path in folder.iterdir()) == before
        finally:
            holder.kill()
    mine(world, folder, ALL)
    assert files_of(folder) == files_of(mined)
    assert all(message in (folder / "mine.log").read_text() for message in messages)


def test_images_beyond_what_boxes_hold_are_reported_once(world: World, tmp_path: Path, messages: list[str]):
    (tmp_path / "photos").mkdir()
    for i, size in enumerate([(32_900, 24), (64, 64), (24, 32_768)]):
        Image.new("RGB", size, (i * 90, 90, 90)).save(tmp_path / "photos" / f"{i}.jpg")
    write_shards([tmp_path / "photos"], tmp_path / "shards", num_workers=1)
    mine(replace(world, shards=tmp_path / "shards"), tmp_path / "mined", ["proposals", "rois"], config=with_mining(max_aspect=9999.0))
    assert len([message for message in messages if "2 images have a side over 32767 px" in message]) == 1
    rois = BoxTable.open(tmp_path / "mined" / "rois")
    assert [rois.of(i).tolist() for i in (0, 2)] == [[[0, 0, 32_767, 24]], [[0, 0, 24, 32_767]]]


@pytest.mark.parametrize(("step", "warned"), [(3, True), (4, False)])
def test_a_checkpoint_whose_training_is_not_finished_is_reported(
    step: int, warned: bool, world: World, tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(world.folder)
    checkpoint = save_checkpoint(tmp_path / "checkpoint.pt", CONFIG, step=step, num_steps=4)
    done = CliRunner().invoke(command, ["features", "scenes", "--out", str(tmp_path / "mined"), "--checkpoint", str(checkpoint)])
    assert done.exit_code == 0, done.output
    assert any("its training is not finished, step 3 of 4" in message for message in messages) == warned


def test_command_line(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(world.folder)
    run = CliRunner().invoke
    steps = run(command, ["rois", "--out", str(tmp_path), "--workers", "1"])
    assert isinstance(steps.exception, MissingStageError)
    for step in ("proposals", "rois"):
        assert run(command, [step, "scenes", "--out", str(tmp_path), "--workers", "1"]).exit_code == 0
    assert table_info(tmp_path / "rois").settings["max_rois"] == CONFIG.mining.max_rois  # from the checkpoint
    done = run(command, ["--out", str(tmp_path), "--neighbors", "2", "--compat", "paper", "--workers", "1", "--set", "pair_ratio=0.05"])
    assert done.exit_code == 0, done.output
    assert "RoIs per image" in done.output
    assert "Next: orl-fast train" in done.output
    settings = table_info(tmp_path / "pairs").settings
    assert (settings["num_neighbors"], settings["compat"], settings["pair_ratio"]) == (2, "paper", 0.05)
    wrong = run(command, ["propsals", "scenes"])
    assert wrong.exit_code == 2
    assert "did you mean 'proposals'" in wrong.output
