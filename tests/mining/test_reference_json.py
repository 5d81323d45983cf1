"""The reference's JSON files: their form, the round trip, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from mining_world import CONFIG, NUM_IMAGES, World

from orl_fast.cli.mine import command as mine
from orl_fast.cli.tables import command as tables
from orl_fast.errors import DataError, StaleError
from orl_fast.mining.pipeline import STEPS, Stage
from orl_fast.mining.reference_json import (
    export_neighbors,
    export_pairs,
    export_proposals,
    import_neighbors,
    import_pairs,
    import_proposals,
)
from orl_fast.mining.rois import open_boxes
from orl_fast.shards import ShardIndex, write_shards
from orl_fast.tables import BoxTable, NeighborTable, PairTable, find_table, table_info


@pytest.fixture(scope="module")
def stage(world: World, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    stage = Stage(index=world.index, folder=tmp_path_factory.mktemp("mined"), config=CONFIG, checkpoint=world.checkpoint)
    stage.run(STEPS)
    return stage


@pytest.fixture
def fresh(world: World, tmp_path: Path) -> Stage:
    return Stage(index=world.index, folder=tmp_path / "imported", config=CONFIG, checkpoint=world.checkpoint)


def xywh(boxes):
    return [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes.tolist()]


def test_pairs_make_the_round_trip(stage: Stage, fresh: Stage, tmp_path: Path):
    export_pairs(stage, tmp_path / "pairs.json")
    content = json.loads((tmp_path / "pairs.json").read_text())
    rois, pairs = BoxTable.open(stage.folder / "rois"), PairTable.open(stage.folder / "pairs")
    assert content["info"] == {
        "bbox_min_size": 16, "bbox_max_aspect_ratio": 3.0, "bbox_max_iou": 0.5, "intra_bbox_num": 12, "knn_image_num": 3,
        "knn_bbox_pair_ratio": 0.3,
    }  # fmt: skip
    assert content["images"] == {"file_name": list(stage.index.file_names), "id": stage.index.image_ids.tolist()}
    columns = content["pseudo_annotations"]
    assert list(columns) == ["image_id", "bbox", "knn_image_id", "knn_bbox_pair"]
    for i in range(NUM_IMAGES):
        assert columns["bbox"][i] == xywh(rois.of(i))
        assert columns["knn_image_id"][i] == pairs.neighbors[i].tolist()
        for k, neighbor in enumerate(pairs.neighbors[i]):
            rows = range(pairs.first[i, k], pairs.first[i, k] + pairs.count[i, k])
            own, other = xywh(rois.of(i)), xywh(rois.of(neighbor))
            assert columns["knn_bbox_pair"][i][k] == [own[pairs.query_roi[row]] + other[pairs.partner_roi[row]] for row in rows]
    import_pairs(fresh, tmp_path / "pairs.json")
    again = PairTable.open(fresh.folder / "pairs")
    for name in ("neighbors", "first", "count", "query_roi", "partner_roi"):
        np.testing.assert_array_equal(getattr(again, name), getattr(pairs, name))
    assert BoxTable.open(fresh.folder / "rois").boxes.tolist() == rois.boxes.tolist()
    fresh.run(STEPS)  # keeps all of it
    export_pairs(fresh, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "pairs.json").read_bytes()


def test_exports_hold_what_the_tables_hold(stage: Stage, fresh: Stage, tmp_path: Path):
    """Whatever the configuration of the checkpoint at hand asks for: 3 neighbors and a ratio of 0.3 here."""
    export_pairs(stage, tmp_path / "few.json", num_neighbors=1, pair_ratio=0.1)
    import_pairs(fresh, tmp_path / "few.json")
    export_pairs(fresh, tmp_path / "again.json")
    export_neighbors(fresh, tmp_path / "neighbors.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "few.json").read_bytes()
    info = json.loads((tmp_path / "again.json").read_text())["info"]
    assert (info["knn_image_num"], info["knn_bbox_pair_ratio"]) == (1, 0.1)
    assert json.loads((tmp_path / "neighbors.json").read_text())["info"] == {"knn_image_num": 1}
    with pytest.raises(StaleError, match="1 neighbors"):
        export_pairs(fresh, tmp_path / "more.json", num_neighbors=2)
    with pytest.raises(StaleError, match="holds 1 neighbors, 2 are asked for"):
        export_neighbors(fresh, tmp_path / "more.json", num_neighbors=2)
    with pytest.raises(StaleError, match=r"the pair ratio 0.5 \(official\) need more pairs than were mined"):
        export_pairs(fresh, tmp_path / "more.json", pair_ratio=0.5)
    assert not (tmp_path / "more.json").exists()


def test_imports_keep_the_former_tables_and_are_made_once(stage: Stage, fresh: Stage, tmp_path: Path):
    export_pairs(stage, tmp_path / "pairs.json")
    fresh.run(STEPS)
    own = {kind: table_info(fresh.folder / kind).fingerprint for kind in ("neighbors", "rois", "pairs")}
    import_pairs(fresh, tmp_path / "pairs.json")
    for kind, fingerprint in own.items():
        assert find_table(fresh.folder, kind, fingerprint) == fresh.folder / f"{kind}@{fingerprint}"
    times = {path: path.stat().st_mtime_ns for path in fresh.folder.rglob("*.*") if path.parent != fresh.folder}
    import_pairs(fresh, tmp_path / "pairs.json")
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_neighbors_and_proposals_make_the_round_trip_and_are_kept(stage: Stage, fresh: Stage, tmp_path: Path):
    export_neighbors(stage, tmp_path / "neighbors.json")
    export_proposals(stage, tmp_path / "proposals.json")
    content = json.loads((tmp_path / "neighbors.json").read_text())
    neighbors = NeighborTable.open(stage.folder / "neighbors").neighbors
    assert content["info"] == {"knn_image_num": 3}
    assert content["pseudo_annotations"] == {"image_id": stage.index.image_ids.tolist(), "knn_image_id": neighbors.tolist()}
    proposals = json.loads((tmp_path / "proposals.json").read_text())
    expected = [xywh(boxes.of(i)) for boxes in (open_boxes(stage.folder / "proposals", s) for s in range(3)) for i in range(len(boxes))]
    assert proposals == {"bbox": expected}
    import_neighbors(fresh, tmp_path / "neighbors.json")
    import_proposals(fresh, tmp_path / "proposals.json")
    fresh.run(STEPS)
    assert not (fresh.folder / "features").exists()
    for name in ("neighbors", "query_roi", "partner_roi", "similarities"):
        np.testing.assert_array_equal(*(getattr(PairTable.open(s.folder / "pairs"), name) for s in (fresh, stage)))
    export_proposals(fresh, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "proposals.json").read_bytes()


def test_files_in_another_order_are_matched_by_name(stage: Stage, fresh: Stage, tmp_path: Path):
    export_neighbors(stage, tmp_path / "neighbors.json")
    content = json.loads((tmp_path / "neighbors.json").read_text())
    order = np.random.default_rng(0).permutation(NUM_IMAGES)
    place = np.argsort(order)
    names, lists = content["images"]["file_name"], content["pseudo_annotations"]["knn_image_id"]
    content["images"]["file_name"] = [f"elsewhere/{names[i]}" for i in order]
    content["pseudo_annotations"]["knn_image_id"] = [place[lists[i]].tolist() for i in order]
    (tmp_path / "shuffled.json").write_text(json.dumps(content))
    import_neighbors(fresh, tmp_path / "shuffled.json")
    found = NeighborTable.open(fresh.folder / "neighbors").neighbors
    np.testing.assert_array_equal(found, NeighborTable.open(stage.folder / "neighbors").neighbors)


def test_proposals_follow_the_annotation_file(world: World, stage: Stage, tmp_path: Path):
    """An annotation file that lists images in its own order, one of which is not there."""
    (tmp_path / "annotations").mkdir()
    shutil.copytree(world.images, tmp_path / "train2017")
    names = sorted(path.name for path in world.images.iterdir())[::-1]
    names.insert(4, "gone.jpg")
    images = [{"file_name": name, "id": 7 * i, "width": 1, "height": 1} for i, name in enumerate(names)]
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps({"images": images, "annotations": []}))
    write_shards([tmp_path], tmp_path.parent / f"{tmp_path.name}-shards", shard_size=8, num_workers=1)
    index = ShardIndex.open(tmp_path.parent / f"{tmp_path.name}-shards")
    other = Stage(index=index, folder=tmp_path / "mined", config=CONFIG, checkpoint=world.checkpoint)
    export_proposals(stage, tmp_path / "proposals.json")
    lists = json.loads((tmp_path / "proposals.json").read_text())["bbox"][::-1]
    lists.insert(4, [])
    (tmp_path / "annotated.json").write_text(json.dumps({"bbox": lists}))
    import_proposals(other, tmp_path / "annotated.json")
    assert xywh(open_boxes(other.folder / "proposals", 0).of(0)) == lists[0]
    export_proposals(other, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["bbox"] == lists
    before = table_info(other.folder / "proposals")
    alike = [names.index(f"scene{i:03d}.jpg") for i in (3, 4)]
    images[alike[0]], images[alike[1]] = images[alike[1]], images[alike[0]]
    (tmp_path / "other.json").write_text(json.dumps({"images": images, "annotations": []}))
    import_proposals(replace(other, annotations=tmp_path / "other.json"), tmp_path / "annotated.json")  # the same file in another order
    assert table_info(other.folder / "proposals") != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"]["file_name"].__setitem__(3, "other.jpg"), r"does not list 1 of 22 packed images, first 'scene003.jpg'"),
        (lambda c: c["pseudo_annotations"]["bbox"][2].__setitem__(0, [0, 0, 500, 20]), r"'scene002.jpg' does not lie within its"),
        (lambda c: c["pseudo_annotations"]["knn_bbox_pair"][1][0].__setitem__(0, [1, 2, 3, 4] * 2), "are not pairs of the boxes"),
        (lambda c: c["pseudo_annotations"]["knn_image_id"][5].__setitem__(0, 99), "does not hold K positions"),
        (lambda c: c["pseudo_annotations"]["knn_image_id"][5].pop(), "does not hold K positions"),
        (lambda c: c["pseudo_annotations"]["knn_bbox_pair"][5].__setitem__(1, []), "no pairs with one of its neighbors"),
        (lambda c: c["pseudo_annotations"].pop("bbox"), r"pseudo_annotations.bbox is missing"),
        (lambda c: c.pop("images"), "not a file of mined results"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused_and_leave_nothing(change, message: str, stage: Stage, fresh: Stage, tmp_path: Path):
    export_pairs(stage, tmp_path / "pairs.json")
    content = json.loads((tmp_path / "pairs.json").read_text())
    change(content)
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        import_pairs(fresh, tmp_path / "bad.json")
    assert not fresh.folder.exists()


def test_neighbors_that_are_not_packed_are_left_out_on_request(stage: Stage, fresh: Stage, tmp_path: Path, messages: list[str]):
    """Images 0 to 21 are packed; the file lists two more: image 1 has one of them, image 2 both and a known one, image 3 none but these."""
    export_pairs(stage, tmp_path / "pairs.json")
    content = json.loads((tmp_path / "pairs.json").read_text())
    content["images"]["file_name"] += ["x.jpg", "y.jpg"]
    columns = content["pseudo_annotations"]
    for name in ("bbox", "knn_image_id", "knn_bbox_pair"):
        columns[name] += columns[name][:2]
    columns["knn_image_id"][1][1] = 22
    columns["knn_image_id"][2][:2] = 23, 22
    columns["knn_image_id"][3] = [22, 23, 22]
    (tmp_path / "more.json").write_text(json.dumps(content))
    for take in (import_neighbors, import_pairs):
        with pytest.raises(DataError, match=r"3 images have neighbors that are not packed; .* leave these out with --skip-unknown"):
            take(fresh, tmp_path / "more.json")
    assert not fresh.folder.exists()
    import_pairs(fresh, tmp_path / "more.json", skip_unknown=True)
    told = "6 of 66 neighbors are not packed and left out; 3 images have fewer than 3, of which the nearest are repeated"
    assert any(f"{told}; 1 of them have none and are their own neighbors, first 'scene003.jpg'" in message for message in messages)
    before, after = PairTable.open(stage.folder / "pairs"), PairTable.open(fresh.folder / "pairs")
    rois = BoxTable.open(fresh.folder / "rois")
    first, third, second = before.neighbors[1, 0], before.neighbors[1, 2], before.neighbors[2, 2]
    expected = before.neighbors.copy()
    expected[1:4] = [[first, third, first], [second] * 3, [3, 3, 3]]
    np.testing.assert_array_equal(after.neighbors, expected)
    np.testing.assert_array_equal(NeighborTable.open(fresh.folder / "neighbors").neighbors, expected)

    def pairs_of(table: PairTable, image: int, k: int) -> list[tuple[int, int]]:
        rows = slice(table.first[image, k], table.first[image, k] + table.count[image, k])
        return list(zip(table.query_roi[rows].tolist(), table.partner_roi[rows].tolist(), strict=True))

    kept = {(1, 0): 0, (1, 1): 2, (1, 2): 0, (2, 0): 2, (2, 1): 2, (2, 2): 2}
    for image in range(NUM_IMAGES):
        for k in range(3):
            own = [(roi, roi) for roi in range(max(1, int(0.3 * len(rois.of(image)))))]
            assert pairs_of(after, image, k) == (own if image == 3 else pairs_of(before, image, kept.get((image, k), k)))
    export_pairs(fresh, tmp_path / "again.json")  # which is whole again
    import_pairs(replace(fresh, folder=tmp_path / "second"), tmp_path / "again.json")


def test_tables_get_narrower_where_no_image_keeps_all_neighbors(stage: Stage, fresh: Stage, tmp_path: Path):
    export_neighbors(stage, tmp_path / "neighbors.json")
    content = json.loads((tmp_path / "neighbors.json").read_text())
    content["images"]["file_name"].append("x.jpg")
    lists = content["pseudo_annotations"]["knn_image_id"]
    lists.append([0, 1, 2])
    for entry in lists[:NUM_IMAGES]:
        entry[0] = NUM_IMAGES
    (tmp_path / "more.json").write_text(json.dumps(content))
    import_neighbors(fresh, tmp_path / "more.json", skip_unknown=True)
    found = NeighborTable.open(fresh.folder / "neighbors").neighbors
    np.testing.assert_array_equal(found, NeighborTable.open(stage.folder / "neighbors").neighbors[:, 1:])
    assert table_info(fresh.folder / "neighbors").settings["num_neighbors"] == 2


def test_command_line(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for part in ("runs", "shards"):
        shutil.copytree(world.folder / part, tmp_path / part)
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    assert run(mine, ["--workers", "1"]).exit_code == 0
    done = [run(tables, ["export", what, f"{what}.json"]) for what in ("neighbors", "proposals", "pairs")]
    assert [result.exit_code for result in done] == [0, 0, 0], done
    few = run(tables, ["export", "pairs", "few.json", "scenes", "--neighbors", "1", "--pair-ratio", "0.1"])
    assert few.exit_code == 0
    assert json.loads(Path("few.json").read_text())["info"]["knn_image_num"] == 1
    shutil.move("shards/scenes/mined", "elsewhere")
    done = run(tables, ["import", "pairs", "pairs.json", "scenes"])
    assert done.exit_code == 0
    assert "Next: orl-fast train --method orl shards/scenes\n" in done.output
    for what in ("neighbors", "proposals", "pairs"):
        assert run(tables, ["export", what, "again.json", "--mined", "elsewhere"]).exit_code == 0
        assert Path("again.json").read_bytes() == Path(f"{what}.json").read_bytes()
    for what in ("neighbors", "proposals", "pairs"):
        missing = run(tables, ["import", what, "nowhere.json"])
        assert isinstance(missing.exception, DataError)
        assert "nowhere.json: cannot be read" in str(missing.exception)
    done = run(tables, ["import", "neighbors", "neighbors.json", "--mined", "third"])
    assert "imported: third. Next: orl-fast mine shards/scenes --out third" in done.output
    assert Path("third/neighbors/table.json").is_file()
    assert run(tables, ["import", "proposals", "proposals.json", "--skip-unknown"]).exit_code == 2
    shutil.move("runs", "other-runs")  # tables of a run that is elsewhere
    (checkpoint,) = Path("other-runs").rglob("checkpoint.pt")
    assert run(tables, ["export", "pairs", "again.json", "--mined", "elsewhere", "--checkpoint", str(checkpoint)]).exit_code == 0
    assert Path("again.json").read_bytes() == Path("pairs.json").read_bytes()
