"""Fine-tuning on listed images: lists, a plain reimplementation, two ranks against one, killed and resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from orl_fast.console import log
from orl_fast.errors import DataError
from orl_fast.evals.labelled_shards import LabelledShards, LabelledShardsOptions, open_labelled_shards
from orl_fast.evals.semi import Options, classifier, listed_alone, run, summary
from orl_fast.evals.supervised import CROP_AND_FLIP
from orl_fast.views.loader import ViewLoader
from orl_fast.views.specs import RandomCrop, ViewSpec
from tests.evals.drawn_classes import context, draw_splits, small_encoder
from tests.evals.test_layouts import warnings  # noqa: F401  a fixture
from tests.evals.test_linear import require_equal_after_a_kill, require_two_ranks_as_one

CLASSES = {"n00000001": (12, 4), "n00000002": (12, 4), "n00000003": (12, 3)}
LISTED = [f"n0000000{c}_{i}.jpg" for c in (1, 2, 3) for i in (0, 3, 5, 8)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("semi")
    draw_splits(root / "data", CLASSES)
    for split in ("train", "val"):  # ImageNet's names differ between the parts
        if split == "val":
            for file in (root / "data" / split).glob("*/*.jpg"):
                file.rename(file.with_name(f"val_{file.name}"))
    open_labelled_shards(root / "data", LabelledShardsOptions(shards=root / "shards"), context())
    (root / "list.txt").write_text("\n".join(LISTED) + "\n")
    return root / "shards"


def _options(shards: Path, **changes: Any) -> dict[str, Any]:
    return {"label_list": shards.parent / "list.txt", "size_px": 32, "batch_size": 4, "epochs": 3, "seed": 5, "head_lr": 0.1} | changes


def _open(shards: Path) -> LabelledShards:
    return open_labelled_shards(shards, LabelledShardsOptions(), context())


def _listed(shards: Path, path: Path, *lines: str) -> set[str]:
    path.write_text("\n".join(lines))
    found = listed_alone(_open(shards), path)
    assert found.classes == tuple(CLASSES)
    names = [found.train.index.file_names[row] for row in found.train.rows.tolist()]
    assert [found.classes[found.train.labels[row]] for row in found.train.rows] == [name.split("/")[0] for name in names]
    return {Path(name).name for name in names}


def test_lists_of_names_paths_and_labels(shards: Path, tmp_path: Path, warnings: list[str]) -> None:  # noqa: F811
    expected = {"n00000001_3.jpg", "n00000002_0.jpg", "n00000003_7.jpg"}
    for lines in (
        ("n00000001_3.jpg", "n00000002_0.jpg", "n00000003_7.jpg", "n00000001_3.jpg"),
        ("n00000001/n00000001_3.jpg 0", "train/n00000002/n00000002_0.jpg 1", "n00000003_7.jpg,2"),
    ):
        assert _listed(shards, tmp_path / "list.txt", *lines) == expected
    assert any("1 lines that repeat an image" in message for message in warnings)
    assert _listed(shards, tmp_path / "list.txt", "n00000001_3.jpg", "n00000001_4.jpg") == {"n00000001_3.jpg", "n00000001_4.jpg"}
    assert any("2 of 3 classes have no listed image" in message for message in warnings)


def test_lists_of_other_data_are_refused(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    with pytest.raises(
        DataError, match=r"of its 3 lines, 1 name no training image, 0 several, 0 are no file names, for example n9_1\.JPEG"
    ):
        _listed(shards, path, "n00000001_3.jpg", "n00000002_0.jpg", "n9_1.JPEG")
    with pytest.raises(DataError, match="1 name no training image"):  # those of the validation part are not trained on
        _listed(shards, path, "n00000001_3.jpg", "val_n00000001_0.jpg")
    with pytest.raises(DataError, match="2 are no file names"):
        _listed(shards, path, "n00000001", "3 images")
    with pytest.raises(DataError, match="lists 1 training images; at least 2"):
        _listed(shards, path, "n00000001_3.jpg")
    with pytest.raises(DataError, match="cannot be read"):
        listed_alone(_open(shards), tmp_path / "missing.txt")


def test_names_that_repeat_need_their_class_folder(tmp_path: Path) -> None:
    draw_splits(tmp_path / "data", {"cat": (3, 2), "dog": (3, 2)})
    for file in (tmp_path / "data").glob("*/*/*.jpg"):
        file.rename(file.with_name(file.name.split("_")[1]))
    labelled = open_labelled_shards(tmp_path / "data", LabelledShardsOptions(shards=tmp_path / "shards"), context())
    path = tmp_path / "list.txt"
    path.write_text("cat/0.jpg\ndog/2.jpg\n")
    assert len(listed_alone(labelled, path).train) == 2
    path.write_text("0.jpg\n2.jpg\n")
    with pytest.raises(DataError, match="0 name no training image, 2 several"):
        listed_alone(labelled, path)


def test_fine_tuning_is_that_of_a_plain_loop(shards: Path, tmp_path: Path) -> None:
    options = Options.model_validate(_options(shards, epochs=5))
    values = run(small_encoder(), shards, options, context(tmp_path / "work"))
    labelled = listed_alone(_open(shards), options.label_list)
    model = classifier(small_encoder(), num_classes=3, seed=5).train()
    parts = [list(model.backbone.parameters()), list(model.head.parameters())]
    momenta = [[torch.zeros_like(value) for value in part] for part in parts]
    spec = ViewSpec(name="view", size_px=32, source=RandomCrop(), augmentation=CROP_AND_FLIP, stream=1)
    mean, std = (torch.tensor(given).view(3, 1, 1) for given in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with ViewLoader.open(
        labelled.train.index, [spec], batch_size=4, seed=5, rows=labelled.train.rows, num_threads=1, num_steps=15
    ) as loader:
        for step, batch in enumerate(loader):
            labels = torch.tensor([int(labelled.train.index.file_names[row].split("/")[0][-1]) - 1 for row in batch.rows.tolist()])
            loss = F.cross_entropy(model((batch.views["view"].float() / 255 - mean) / std), labels)
            model.zero_grad()
            loss.backward()
            factor = 0.2 ** ((step >= 9) + (step >= 12))  # 12 and 16 of 20 epochs: 3 and 4 of 5
            with torch.no_grad():
                for part, velocities, lr in zip(parts, momenta, (0.01, 0.1), strict=True):
                    for value, velocity in zip(part, velocities, strict=True):
                        velocity.mul_(0.9).add_(value.grad + 1e-4 * value)  # 12 of 36 images: not few
                        value -= lr * factor * velocity
    saved = torch.load(tmp_path / "work" / "checkpoint.pt")["parts"]["model"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert (values["num_train"], values["num_val"], values["weight_decay"], values["batch_size"]) == (12, 11, 1e-4, 4)
    assert "12 images trained on for 5 epochs, weight decay 0.0001; 11 validated" in summary(values)


def test_few_listed_images_get_no_weight_decay(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(log, "info", lambda message, *given: messages.append(message % given))
    monkeypatch.setattr("orl_fast.evals.semi._FEW", 0.4)  # 12 of 36; 5 % in earnest, between 1 % and 10 %
    assert run(small_encoder(), shards, Options.model_validate(_options(shards, epochs=1)), context())["weight_decay"] == 0
    assert "12 of 36 training images are listed (33.3 %); weight decay 0" in messages
    given = Options.model_validate(_options(shards, epochs=1, weight_decay=0.01))
    assert run(small_encoder(), shards, given, context())["weight_decay"] == 0.01


def test_a_killed_fine_tuning_ends_as_a_straight_one(shards: Path, tmp_path: Path) -> None:
    require_equal_after_a_kill("semi", shards, tmp_path, _options(shards, epochs=20))


def test_two_ranks_fine_tune_as_one(shards: Path, tmp_path: Path) -> None:
    require_two_ranks_as_one("semi", shards, tmp_path, _options(shards), tolerance=2e-3)
