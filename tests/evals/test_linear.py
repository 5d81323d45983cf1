"""Linear classifiers: against a plain reimplementation, two ranks against one, killed and resumed."""

import json
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from orl_fast.distributed import process_group
from orl_fast.errors import DataError
from orl_fast.evals import Context, linear, supervised
from orl_fast.evals.labelled_shards import LabelledShards, LabelledShardsOptions, _column, open_labelled_shards
from orl_fast.evals.linear import Options, level_classifiers, run, summary
from orl_fast.evals.pooling import pool_levels
from orl_fast.evals.supervised import CROP_AND_FLIP, Schedule, lighting_shifts, top_accuracies, train
from orl_fast.shards import ShardReader
from orl_fast.shards.labels import write_classes
from orl_fast.views import Batch
from orl_fast.views.loader import ViewLoader
from orl_fast.views.plan import center_crops
from orl_fast.views.reference import ReferenceRenderer
from orl_fast.views.specs import RandomCrop, ViewSpec
from tests.evals.drawn_classes import context, draw_splits, small_encoder
from tests.ranks import run_ranks, start_rank

CLASSES = {"n00000001": (9, 4), "n00000002": (8, 4), "n00000003": (8, 3)}
OPTIONS: dict[str, Any] = {"size_px": 32, "batch_size": 8, "epochs": 4, "seed": 5}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed, with labels."""
    root = tmp_path_factory.mktemp("linear")
    draw_splits(root / "data", CLASSES)
    _open(root / "data", shards=root / "shards")
    return root / "shards"


def _open(data: Path, **options: Path) -> LabelledShards:
    return open_labelled_shards(data, LabelledShardsOptions(**options), context())


def _batches(labelled: LabelledShards, options: Options, *, num_steps: int, **augmentation: Any) -> list[Batch]:
    spec = ViewSpec(name="view", size_px=options.size_px, source=RandomCrop(), stream=1, **augmentation)
    part = labelled.train
    with ViewLoader.open(
        part.index, [spec], batch_size=options.batch_size, seed=options.seed, rows=part.rows, num_threads=1, num_steps=num_steps
    ) as loader:
        return list(loader)


def test_training_is_that_of_a_plain_reimplementation(shards: Path) -> None:
    labelled, options, encoder = _open(shards), Options(**OPTIONS), small_encoder()
    schedule = Schedule(epochs=4, milestones=(2, 3), gamma=0.1)
    heads = level_classifiers(encoder, num_classes=3, size_px=32, seed=1)
    assert all(0.008 < layer.weight.std() < 0.012 and not layer.bias.any() for layer in heads.linears)
    weights = [layer.weight.detach().clone() for layer in heads.linears]
    biases = [layer.bias.detach().clone() for layer in heads.linears]
    optimizer = torch.optim.SGD(
        [{"params": list(heads.parameters()), "initial_lr": 0.3}], lr=0.3, momentum=0.9, nesterov=True, weight_decay=1e-2
    )
    train(
        heads, optimizer, schedule, labelled, options, context(), batch_size=8, augmentation=linear._COLORS, lighting=True,
        prepare=encoder.levels, what="test",
    )  # fmt: skip

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    velocities = [torch.zeros_like(value) for value in (*weights, *biases)]
    steps_per_epoch = 25 // 8
    for step, batch in enumerate(_batches(labelled, options, num_steps=4 * steps_per_epoch, augmentation=linear._COLORS)):
        epoch = step // steps_per_epoch
        shift = torch.from_numpy(lighting_shifts(5, epoch, batch.rows)).float()[:, :, None, None]
        with torch.no_grad():
            maps = encoder.levels((batch.views["view"].float() / 255 + shift - mean) / std)
        labels = torch.tensor([int(labelled.train.index.file_names[row].split("/")[0][-1]) - 1 for row in batch.rows.tolist()])
        lr = 0.3 * 0.1 ** ((epoch >= 2) + (epoch >= 3))
        gradients: list[torch.Tensor] = []
        for weight, bias, level in zip(weights, biases, maps, strict=True):
            normalized = (level - level.mean((0, 2, 3), keepdim=True)) / (level.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
            features = pool_levels([normalized])[0]
            probabilities = F.softmax(features @ weight.T + bias, dim=1) - F.one_hot(labels, 3)
            gradients += [probabilities.T @ features / 8, probabilities.mean(0)]
        for i, value in enumerate([value for pair in zip(weights, biases, strict=True) for value in pair]):
            gradient = gradients[i] + 1e-2 * value
            velocities[i] = gradient.clone() if step == 0 else 0.9 * velocities[i].view_as(value) + gradient
            value -= lr * (gradient + 0.9 * velocities[i])
    for layer, weight, bias in zip(heads.linears, weights, biases, strict=True):
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.bias.detach(), bias, rtol=1e-4, atol=1e-5)


def test_accuracies_are_those_of_torchvisions_evaluation_views(shards: Path) -> None:
    labelled, encoder = _open(shards), small_encoder()
    heads = level_classifiers(encoder, num_classes=3, size_px=32, seed=2).eval()
    found, counted = top_accuracies(
        lambda images: heads(encoder.levels(images)), labelled.val, Options(**OPTIONS, renderer="reference"), context(),
        num_outputs=4, num_classes=3,
    )  # fmt: skip
    index, rows = labelled.val.index, labelled.val.rows
    plan = center_crops(rows, heights=index.heights, widths=index.widths, resize_px=37, crop_px=32)
    with ShardReader(index) as reader:
        pixels = ReferenceRenderer(reader).render(plan).views["view"].float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        logits = heads(encoder.levels((pixels - mean) / std))
    expected = [(each.argmax(1).numpy() == labelled.val.labels[rows]).mean() for each in logits]
    assert found[:, 0] == pytest.approx(expected)
    assert found[:, 1].tolist() == [1, 1, 1, 1]  # of three classes, the five best are all
    assert counted == {"num_val": 11, "num_undecodable": 0}


def test_colors_are_learned_and_values_say_what_was_taken(shards: Path, tmp_path: Path) -> None:
    values = run(small_encoder(), shards, Options(**OPTIONS, lr=0.1), context(tmp_path))
    assert values["top1"] == values[f"top1_level{values['best_level']:g}"] == max(v for k, v in values.items() if k.startswith("top1_"))
    assert values["top1"] > 0.8
    assert (values["num_train"], values["num_val"], values["num_classes"], values["epochs"], values["batch_size"]) == (25, 11, 3, 4, 8)
    assert "11 validated, 3 classes; 0 images skipped" in summary(values)
    assert run(small_encoder(), shards, Options(**OPTIONS, lr=0.1), context(tmp_path)) == values  # nothing is left to train


def _saved(work: Path) -> dict[str, Any]:
    return torch.load(work / "checkpoint.pt")["parts"]["model"]  # type: ignore[no-any-return]


def _main(module: str, shards: str, work: str, options: str, save_every_s: str = "600") -> None:
    """An evaluation as one of the ranks that torchrun starts; prints its values, and what it says of a folder without labels."""
    supervised.Training.open = partial(supervised.Training.open, save_every_s=float(save_every_s))  # type: ignore[method-assign]
    evaluation: Any = sys.modules[f"orl_fast.evals.{module}"]
    with process_group("cpu") as ranks:
        at = Context(device=ranks.device, num_threads=1, ranks=ranks, work=Path(work))
        chosen = evaluation.Options.model_validate_json(options)
        values = evaluation.run(small_encoder(), Path(shards), chosen, at)
        with pytest.raises(DataError) as refused:  # the first rank reads labels: what it refuses, all refuse
            evaluation.run(small_encoder(), Path(work), chosen, at)
    sys.stdout.write(json.dumps([values, str(refused.value)]) + "\n")


def arguments(module: str, shards: Path, work: Path, options: dict[str, Any], *, save_every_s: float = 600) -> list[str]:
    given = [module, str(shards), str(work), json.dumps(options, default=str), str(save_every_s)]
    code = f"import orl_fast.evals.{module}; from tests.evals.test_linear import _main; _main(*{given!r})"
    return ["-c", code]


def require_equal_after_a_kill(module: str, shards: Path, folder: Path, options: dict[str, Any]) -> None:
    """Kill an evaluation in the middle and resume it: the weights are bit for bit those of a straight one."""
    evaluation: Any = sys.modules[f"orl_fast.evals.{module}"]
    chosen = evaluation.Options.model_validate_json(json.dumps(options, default=str))
    straight = evaluation.run(small_encoder(), shards, chosen, context(folder / "straight"))
    process = start_rank(arguments(module, shards, folder / "killed", options, save_every_s=0))
    deadline = time.monotonic() + 90
    while not (folder / "killed" / "checkpoint-previous.pt").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    total = torch.load(folder / "straight" / "checkpoint.pt")["step"]
    assert 0 < torch.load(folder / "killed" / "checkpoint.pt")["step"] < total
    assert evaluation.run(small_encoder(), shards, chosen, context(folder / "killed")) == straight
    one, other = _saved(folder / "straight"), _saved(folder / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)


def require_two_ranks_as_one(module: str, shards: Path, folder: Path, options: dict[str, Any], *, tolerance: float) -> None:
    evaluation: Any = sys.modules[f"orl_fast.evals.{module}"]
    alone = evaluation.run(
        small_encoder(), shards, evaluation.Options.model_validate_json(json.dumps(options, default=str)), context(folder / "alone")
    )
    command = arguments(module, shards, folder / "ranks", options)
    for code, output in run_ranks(command, command):
        assert code == 0, output
        values, refused = json.loads(output.splitlines()[-1])
        assert "has no train/, and no list of train images is given" in refused
        assert {key: value for key, value in values.items() if "top" not in key and key != "best_level"} == {
            key: value for key, value in alone.items() if "top" not in key and key != "best_level"
        }
        assert values["top1"] == pytest.approx(alone["top1"], abs=1.5 / 11)
    one, other = _saved(folder / "alone"), _saved(folder / "ranks")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_a_killed_evaluation_ends_as_a_straight_one(shards: Path, tmp_path: Path) -> None:
    require_equal_after_a_kill("linear", shards, tmp_path, OPTIONS | {"epochs": 40})


def test_two_ranks_learn_what_one_learns(shards: Path, tmp_path: Path) -> None:
    require_two_ranks_as_one("linear", shards, tmp_path, OPTIONS, tolerance=1e-4)


def test_a_training_of_other_labels_is_not_resumed(shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "shards"
    shutil.copytree(shards, other)
    run(small_encoder(), shards, Options(**OPTIONS | {"epochs": 1}), context(tmp_path / "work"))
    labelled = _open(other)
    (other / "labels.json").unlink()
    labelled.train.labels[labelled.train.rows[0]] = 1 - labelled.train.labels[labelled.train.rows[0]] % 2
    write_classes(labelled.train.index, _column(labelled))
    with pytest.raises(DataError, match=r"begun with images and batches .* now .*remove .*work"):
        run(small_encoder(), other, Options(**OPTIONS | {"epochs": 1}), context(tmp_path / "work"))


def test_images_that_cannot_be_decoded_are_skipped_and_counted(shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "shards"
    shutil.copytree(shards, damaged)
    labelled = _open(damaged)
    index = labelled.train.index
    with index.shard_paths[0].open("r+b") as tar:
        for row in (labelled.train.rows[3], labelled.val.rows[2]):
            tar.seek(int(index.offsets[row]))
            tar.write(bytes(int(index.sizes[row])))
    values = run(small_encoder(), damaged, Options(**OPTIONS), context(tmp_path / "work"))
    assert (values["num_val"], values["num_undecodable"]) == (10, 1)
    assert np.isfinite(list(values.values())).all()


def test_plain_crops_are_what_the_other_data_sets_get() -> None:
    assert linear.PROTOCOLS["places205"].augmentation == linear.PROTOCOLS["inat18"].augmentation == CROP_AND_FLIP
    assert (CROP_AND_FLIP.flip_prob, CROP_AND_FLIP.jitter_prob, CROP_AND_FLIP.grayscale_prob, CROP_AND_FLIP.blur_prob) == (0.5, 0, 0, 0)
