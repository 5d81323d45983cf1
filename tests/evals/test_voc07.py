"""The whole evaluation on drawn data: from the command to the record."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from sklearn.metrics import precision_recall_curve
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from benchmarks.untrained import write_untrained
from orl_fast.cli.main import cli
from orl_fast.errors import DataError, OrlFastError
from orl_fast.evals import Context, svm
from orl_fast.evals.levels import encode_levels
from orl_fast.evals.voc import read_voc
from orl_fast.evals.voc07 import FAST_COSTS
from orl_fast.models import load_encoder
from orl_fast.recipe import load_config
from tests.drawn_voc import CLASSES, draw_voc

_CPU = Context(device=torch.device("cpu"))


def _run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(cli, ["-q", "eval", "voc07", *map(str, arguments), "--size", "32", "--workers", "1"])
    if result.exception is not None and not isinstance(result.exception, SystemExit | OrlFastError):
        raise result.exception
    return result


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_untrained(tmp_path / "run" / "checkpoint.pt", load_config("demo"))
    return tmp_path / "run" / "checkpoint.pt"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return draw_voc(tmp_path / "data")


def _plain_ap(labels: np.ndarray, scores: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(labels == 1, scores)  # by falling recall
    return float(-np.sum(np.diff(recall) * np.maximum.accumulate(precision)[:-1]))


@pytest.mark.filterwarnings("ignore:Liblinear failed to converge")
def test_the_record_holds_what_scikit_learn_gives(checkpoint: Path, voc: Path, tmp_path: Path) -> None:
    (voc / "JPEGImages" / "000006.jpg").write_bytes(b"broken")
    result = _run(checkpoint, voc, "--fast", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    (record,) = json.loads((tmp_path / "out.json").read_text())
    values = record["values"]
    data = read_voc(voc)
    splits = (data.trainval, data.test)
    parts = [encode_levels(load_encoder(checkpoint), of.paths, size_px=32, folder=tmp_path / "own", context=_CPU) for of in splits]
    labels, test_labels = (of.labels[part.kept] for of, part in zip(splits, parts, strict=True))
    expected = {}
    for number, features in enumerate(zip(parts[0].values, parts[1].values, strict=True), start=1):
        train, test = (x.astype(np.float64) / (np.linalg.norm(x.astype(np.float64), axis=1) + 1e-5)[:, None] for x in features)
        aps = []
        for c in range(len(CLASSES)):
            signs = np.where(labels[:, c] == 1, 1, -1)
            best: tuple[float, float] = (-1, 0)
            for cost in FAST_COSTS:
                model = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, dual=True, random_state=0)
                score = cross_val_score(model, train, signs, cv=3, scoring="average_precision").mean()
                best = max(best, (score, cost), key=lambda pair: pair[0])
            model.set_params(C=best[1]).fit(train, signs)
            tested = test_labels[:, c] != 0
            aps.append(_plain_ap(test_labels[tested, c], model.decision_function(test[tested])))
        expected[number] = aps
    assert [values[f"map_level{number}"] for number in expected] == pytest.approx([np.mean(aps) for aps in expected.values()])
    assert values["map"] == pytest.approx(max(np.mean(aps) for aps in expected.values()))
    assert [values[f"ap_{name}"] for name in CLASSES] == pytest.approx(expected[values["best_level"]])
    counts = {"num_trainval": 23, "num_test": 16, "num_classes": 2, "num_skipped_images": 1, "num_skipped_classes": 0}
    assert {key: values[key] for key in counts} == counts
    for shown in ("mAP", "level 4", f"AP: box {100 * values['ap_box']:.1f}", "23 trainval and 16 test images, 2 classes; 1 images"):
        assert shown in result.output
    assert "k = 1" not in result.output


def test_runs_share_features_and_results(checkpoint: Path, voc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svm, "COSTS", (*FAST_COSTS, 0.5**8))
    assert _run(checkpoint, voc).exit_code == 0
    monkeypatch.setattr("orl_fast.evals.levels._compute", lambda *_, **__: pytest.fail("features were computed again"))
    monkeypatch.setattr("orl_fast.evals.svm.cross_validate", lambda _: pytest.fail("a fit was repeated"))
    assert _run(checkpoint, voc, "--fast").exit_code == 0
    low_shot = _run(checkpoint, voc, "--low-shot", "--fast")
    assert low_shot.exit_code == 0
    assert "k = 2" in low_shot.output
    assert "Standard deviation over samples, by k:" in low_shot.output
    records = [json.loads(line)["values"] for line in (checkpoint.parent / "evals.jsonl").read_text().splitlines()]
    assert len(records) == 3
    shots = [key for key in records[2] if key.startswith("map_k")]
    assert records[2]["map"] == pytest.approx(np.mean([records[2][key] for key in shots]))
    assert all(0 <= records[2][key] <= 1 for key in shots)
    assert not list((checkpoint.parent / "evals" / "voc07").glob("basis-*"))


def test_changed_labels_are_not_scored_with_kept_results(checkpoint: Path, voc: Path) -> None:
    values = []
    for _ in range(2):
        assert _run(checkpoint, voc, "--fast").exit_code == 0
        values.append(json.loads((checkpoint.parent / "evals.jsonl").read_text().splitlines()[-1])["values"])
        for file in (voc / "ImageSets" / "Main").glob("disk_*.txt"):
            names = [line.split()[0] for line in file.read_text().splitlines()]
            file.write_text("".join(f"{name} {1 if i % 5 == 0 else -1}\n" for i, name in enumerate(names)))
    assert values[0]["ap_box"] == values[1]["ap_box"]
    assert values[0]["ap_disk"] != values[1]["ap_disk"]


def test_classes_that_cannot_be_scored_are_left_out(
    checkpoint: Path, voc: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = voc / "ImageSets" / "Main"
    for name, split, keep in (("rare", "trainval", 2), ("absent", "test", 0)):
        for part in ("trainval", "test"):
            lines = (main / f"box_{part}.txt").read_text().replace(" 0\n", "-1\n").splitlines()
            names = [line.split()[0] for line in lines]
            num = keep if part == split else 6
            (main / f"{name}_{part}.txt").write_text("".join(f"{each} {1 if i < num else -1}\n" for i, each in enumerate(names)))
    result = _run(checkpoint, voc, "--fast")
    assert "2 classes; 0 images and 2 classes skipped" in result.output
    for file in main.glob("*_trainval.txt"):
        file.write_text(file.read_text().replace(" 1\n", "-1\n"))
    refused = _run(checkpoint, voc, "--fast")
    assert isinstance(refused.exception, DataError)
    assert "none of the 4 classes can be scored: absent (trainval has it in 0 images" in str(refused.exception)


def test_wrong_use_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    assert "--cost-choice is for --low-shot" in _run(checkpoint, tmp_path, "--cost-choice", "official").output
    assert isinstance(_run(checkpoint, tmp_path).exception, DataError)
    shown = CliRunner().invoke(cli, ["eval", "voc07", "--help"]).output
    assert all(option in shown for option in ("--low-shot", "--fast", "--cost-choice", "--size"))
