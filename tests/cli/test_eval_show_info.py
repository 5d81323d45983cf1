import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from benchmarks.untrained import write_untrained
from orl_fast import distributed
from orl_fast.checkpoint import read_checkpoint, write_checkpoint
from orl_fast.cli.main import cli
from orl_fast.distributed import Ranks
from orl_fast.errors import ConfigError, DataError, MissingStageError, OrlFastError
from orl_fast.models import Encoder, load_encoder
from orl_fast.recipe import load_config
from orl_fast.shards import ShardIndex, write_shards
from orl_fast.tables import BoxTable, NeighborTable, PairTable, TableInfo, new_table


def _run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(cli, ["-q", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit | OrlFastError):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    write_untrained(file, load_config("demo"))
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in color, twelve images each, in folders; one image is broken."""
    root, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for name, tint in (("warm", (60, 0, -60)), ("cold", (-60, 0, 60))):
        (root / name).mkdir()
        for i in range(12):
            pixels = rng.integers(80, 170, (90, 110, 3)) + np.array(tint)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{name}{i}.jpg")
    (root / "warm" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return root


@pytest.fixture(scope="module")
def packed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "photos"
    write_shards([photos], folder, num_workers=1)
    index = ShardIndex.open(folder)
    num, made_from = len(index), {"index": index.fingerprint}
    boxes = [np.array([[0, 0, 50, 60], [30, 20, 100, 80]], np.int16)] * num
    with new_table(folder / "mined" / "rois", TableInfo(kind="rois", made_from=made_from, settings={"max_rois": 2})) as path:
        rois = BoxTable.from_lists(boxes)
        np.save(path / "offsets.npy", rois.offsets)
        np.save(path / "boxes.npy", rois.boxes)
    neighbors = (np.arange(num)[:, None] + [[1, 2]]) % num
    with new_table(folder / "mined" / "neighbors", TableInfo(kind="neighbors", made_from=made_from, settings={})) as path:
        NeighborTable(neighbors=neighbors, similarities=np.ones((num, 2), np.float32)).write_arrays(path)
    settings = {"num_neighbors": 2, "pair_ratio": 0.1, "compat": "official"}
    with new_table(folder / "mined" / "pairs", TableInfo(kind="pairs", made_from=made_from, settings=settings)) as path:
        first, count = np.arange(2 * num).reshape(num, 2), np.ones((num, 2), np.int32)
        table = {"neighbors": neighbors, "first": first, "count": count, "similarities": np.full(2 * num, 0.5, np.float32)}
        for name, array in {**table, "query_roi": np.zeros(2 * num, np.int16), "partner_roi": np.ones(2 * num, np.int16)}.items():
            np.save(path / f"{name}.npy", array)
    assert PairTable.open(folder / "mined" / "pairs").neighbors.shape == (num, 2)
    return folder


@pytest.mark.parametrize("kind", ["probe", "knn"])
def test_eval_tells_colors_apart_and_compares_with_random_weights(kind: str, checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    result = _run("eval", kind, checkpoint, photos, "--random-init", "--workers", "1", "--size", "32", "--json", tmp_path / "out.json")
    assert result.exit_code == 0
    assert "random initialization" in result.output
    assert "1 images and 0 objects skipped" in " ".join(result.output.split())
    found = json.loads((tmp_path / "out.json").read_text())
    assert [record["backbone"] for record in found] == [str(checkpoint), "random initialization"]
    kept = [json.loads(line) for line in (checkpoint.parent / "evals.jsonl").read_text().splitlines()]
    assert kept[-2:] == found
    assert {key: found[0][key] for key in ("eval", "method", "step", "data")} == {
        "eval": kind,
        "method": "byol",
        "step": 0,
        "data": str(photos),
    }
    assert found[0]["options"]["size_px"] == 32
    values = found[0]["values"]
    assert values == found[1]["values"]  # the checkpoint is that of an untrained network
    assert (values["num_train"] + values["num_test"], values["num_skipped_images"]) == (24, 1)
    assert values["top1"] > 0.8
    assert f"{100 * values['top1']:.1f} %" in result.output


def test_eval_takes_weights_of_other_toolkits_and_keeps_the_record_next_to_them(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    backbone = load_encoder(checkpoint).backbone
    torch.save(
        {"state_dict": {f"module.encoder_q.{key}": value for key, value in backbone.state_dict().items()}}, tmp_path / "moco.pth.tar"
    )
    for arguments in ((tmp_path / "moco.pth.tar", "--random-init"), (checkpoint, "--out", tmp_path)):
        result = _run("eval", "knn", *arguments[:1], photos, *arguments[1:], "--workers", "1", "--size", "32")
        assert result.exit_code == 0
    foreign, untrained, ours = (json.loads(line) for line in (tmp_path / "evals.jsonl").read_text().splitlines())
    assert foreign["values"] == ours["values"]
    about = ("backbone", "architecture", "checkpoint", "prefix", "method", "step")
    prefix = "state_dict.module.encoder_q."
    assert [foreign[key] for key in about] == [str(tmp_path / "moco.pth.tar"), "resnet10_small", "moco.pth.tar", prefix, None, None]
    assert foreign["encoder"] == Encoder(backbone, None, name="resnet10_small").fingerprint
    assert [untrained[key] for key in about] == ["random initialization", "resnet10_small", None, None, None, None]
    assert (ours["prefix"], ours["method"], ours["step"]) == (None, "byol", 0)
    result = _run("eval", "knn", checkpoint, photos, "--backbone", "resnet18")
    assert isinstance(result.exception, ConfigError)
    assert "its backbone is resnet10_small, not resnet18" in str(result.exception)


def test_eval_takes_coco_annotations_and_separate_test_data(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    def annotate(file: Path, numbers: range) -> Path:
        images = [{"id": 2 * i + c, "file_name": f"{name}/{name}{i}.jpg"} for i in numbers for c, name in enumerate(("warm", "cold"))]
        boxes = [{"image_id": image["id"], "category_id": image["id"] % 2, "bbox": [5, 5, 80, 70]} for image in images]
        categories = [{"id": 0, "name": "warm"}, {"id": 1, "name": "cold"}]
        file.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
        return file

    train = annotate(tmp_path / "train.json", range(8))
    result = _run("eval", "knn", checkpoint, "--annotations", train, "--images", photos, "--workers", "1")
    assert result.exit_code == 0
    assert "12 objects trained on, 4 tested" in " ".join(result.output.split())
    test = annotate(tmp_path / "test.json", range(8, 12))
    result = _run("eval", "knn", checkpoint, train, "--images", photos, "--test", test, "--test-images", photos, "--workers", "1")
    assert "16 objects trained on, 8 tested, 2 classes" in " ".join(result.output.split())


def test_eval_explains_what_is_missing(checkpoint: Path, tmp_path: Path) -> None:
    assert _run("eval", "probe", checkpoint).exit_code == 2
    assert isinstance(_run("eval", "probe", tmp_path / "none.pt", tmp_path).exception, MissingStageError)
    assert isinstance(_run("eval", "probe", checkpoint, tmp_path).exception, DataError)


def test_eval_has_help_of_its_own_and_names_the_nearest() -> None:
    listed = _run("eval", "--help").output
    assert "probe" in listed
    assert "knn" in listed
    assert "--cost" in _run("eval", "probe", "--help").output
    shown = _run("eval", "knn", "--help").output
    assert all(option in shown for option in ("--neighbors", "--temperature", "--held-out", "--test-images", "--size"))
    assert "--cost" not in shown
    wrong = _run("eval", "prob", "x", "y")
    assert wrong.exit_code == 2
    assert "Did you mean 'probe'?" in wrong.output
    assert _run("eval", "knn", "x", "y", "--temperature", "0").exit_code == 2


@pytest.mark.parametrize("kind", ["probe", "knn"])
def test_eval_refuses_weights_that_are_not_finite(kind: str, checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    values = dict(read_checkpoint(checkpoint))
    model, optimizer = values.pop("model"), values.pop("optimizer")
    next(iter(model.values()))[0] = torch.nan
    write_checkpoint(tmp_path / "checkpoint.pt", values, model=model, optimizer=optimizer)
    result = _run("eval", kind, tmp_path, photos)
    assert isinstance(result.exception, DataError)
    assert "not finite" in str(result.exception)
    assert not (tmp_path / "evals.jsonl").exists()


def test_show_writes_the_same_picture_again(packed: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        result = _run("show", "pairs", packed, "--num", "3", "--seed", "4", "--out", tmp_path / name)
        assert result.exit_code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("method", ["byol", "orl"])
def test_show_views_of_named_images(packed: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "views.png"
    images = "warm_warm3,cold/cold5.jpg,2"
    recipe = tmp_path / "two.toml"
    recipe.write_text("[mining]\nnum_neighbors = 2\n[views]\nimage_size_px = 64\npatch_size_px = 32\n")
    options = ("--recipe", recipe, "--renderer", "reference", "--images", images, "--out", out)
    result = _run("show", "views", packed, "--method", method, *options)
    assert f"{out}: 3 images, {2 if method == 'byol' else 6} views each" in result.output


def test_show_names_the_nearest_image_and_the_command_that_mines(packed: Path, photos: Path, tmp_path: Path) -> None:
    result = _run("show", "pairs", packed, "--images", "warm_warm33", "--out", tmp_path / "x.png")
    assert "did you mean 'warm_warm3'" in str(result.exception)
    write_shards([photos / "cold"], tmp_path / "cold", num_workers=1)
    result = _run("show", "pairs", tmp_path / "cold", "--out", tmp_path / "x.png")
    assert isinstance(result.exception, MissingStageError)
    assert f"run orl-fast mine {tmp_path / 'cold'}" in str(result.exception)
    assert not (tmp_path / "x.png").exists()


def test_info_knows_shards_tables_and_checkpoints(packed: Path, checkpoint: Path, tmp_path: Path) -> None:
    shown = _run("info", packed).output
    assert "24 in 1 shards" in shown
    assert "broken.jpg" in shown
    assert "neighbors, rois, pairs" in shown
    assert "2.0 on average, 2 to 2" in _run("info", packed / "mined" / "rois").output
    whole = _run("info", packed / "mined").output
    assert all(f"{kind} (" in whole for kind in ("neighbors", "rois", "pairs"))
    for path in (checkpoint, checkpoint.parent):
        shown = _run("info", path).output
        assert "byol" in shown
        assert "resnet10_small" in shown
    for path in (tmp_path / "none", tmp_path):
        result = _run("info", path)
        assert isinstance(result.exception, DataError)
        assert "not a dataset, a mined table, or a run" in str(result.exception)


def test_info_of_this_machine() -> None:
    shown = _run("info").output
    assert "nvidia-dali" in shown
    assert torch.__version__.split("+")[0] in shown


def test_an_evaluation_is_one_process(checkpoint: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "process_group", lambda _: nullcontext(Ranks(world_size=2)))
    result = _run("eval", "knn", checkpoint, photos)
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == "2 ranks: eval knn is one process; start it without torchrun"
