"""Checkpoints: read back as they were written, or refused; never anything in between."""

import errno
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from orl_fast.checkpoint import CHECKPOINT, FORMAT, checkpoint_path, read_checkpoint, read_header, write_checkpoint
from orl_fast.errors import DataError, MissingStageError
from orl_fast.models import Mlp

HEADER: dict[str, Any] = {
    "method": "byol", "step": 3, "num_steps": 9, "encoder": {"backbone": "resnet18", "projector": {"widths": [4, 2]}, "prefix": "online."},
    "config": {"train": {"epochs": 3}, "views": {"crop_area": [0.08, 1.0]}}, "index": "f00", "mined": {"rois": "a"}, "renderer": "cpu",
    "versions": {"torch": "x"},
}  # fmt: skip


def _write(path: Path, **changes: object) -> Path:
    torch.manual_seed(0)
    head = Mlp((12, 9, 5))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    head(torch.randn(6, 12)).sum().backward()
    optimizer.step()
    write_checkpoint(path, HEADER | changes, model=head.state_dict(), optimizer=optimizer.state_dict())
    return path


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def test_it_holds_what_was_written_for_torch_and_for_others(tmp_path: Path) -> None:
    path = _write(tmp_path / CHECKPOINT)
    values = read_checkpoint(path)
    assert {key: values[key] for key in HEADER} == HEADER
    assert values["format"] == FORMAT
    assert values["model"].keys() == Mlp((12, 9, 5)).state_dict().keys()
    assert values["optimizer"]["state"]
    assert equal(torch.load(path, weights_only=True), values)
    assert read_header(path) == HEADER | {"format": FORMAT}
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.read("archive/orl-fast.json")) == read_header(path)
    assert checkpoint_path(tmp_path) == checkpoint_path(path) == path


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    expected = _write(tmp_path / "a.pt").read_bytes()
    assert _write(tmp_path / "other name").read_bytes() == expected
    assert _write(tmp_path / "a.pt", renderer="".join(["c", "pu"]), method="".join(["by", "ol"])).read_bytes() == expected  # other objects


def test_a_flipped_byte_anywhere_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    whole = _write(tmp_path / "whole.pt").read_bytes()
    expected, rng, num_refused = read_checkpoint(tmp_path / "whole.pt"), np.random.default_rng(0), 0
    header = read_header(tmp_path / "whole.pt")
    path = tmp_path / "flipped.pt"
    entries = [match.start() for match in re.finditer(b"PK\x01\x02", whole)]
    # Also what checksums do not see: an entry's way of compression, and its mark as a folder, which torch gives unset memory for.
    flips = [(at + 10, 3) for at in entries] + [(at + 38, 4) for at in entries]
    flips += [(int(at), int(rng.integers(8))) for at in rng.choice(len(whole), 300, replace=False)]
    for position, bit in flips:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        for read, wanted in ((read_checkpoint, expected), (read_header, header)):
            try:
                found = read(path)
            except DataError:
                num_refused += 1
            else:
                assert equal(found, wanted), position
    assert num_refused > 150  # the rest fell into the padding between tensors, or is not read


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = _write(tmp_path / "whole.pt").read_bytes()
    path = tmp_path / "cut.pt"
    for length in [0, 1, 100, *np.random.default_rng(1).integers(0, len(whole), 30), len(whole) - 1]:
        path.write_bytes(whole[:length])
        for read in (read_checkpoint, read_header):
            with pytest.raises(DataError, match=r"cut\.pt"):
                read(path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingStageError, match=r"there is no checkpoint; run orl-fast train"):
        read_checkpoint(tmp_path / CHECKPOINT)
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({**HEADER, "format": 1, "model": {}, "optimizer": {}}, tmp_path / "earlier.pt")  # as orl-fast 0.1 wrote them
    for name, message in {"text": "damaged or not a checkpoint", "other": "not a checkpoint", "list": "not a checkpoint"}.items():
        for read in (read_checkpoint, read_header):
            with pytest.raises(DataError, match=message):
                read(tmp_path / f"{name}.pt")
    with pytest.raises(DataError, match=f"checkpoint format 1, this version reads {FORMAT}"):
        read_checkpoint(tmp_path / "earlier.pt")
    later = _write(tmp_path / "later.pt", renderer="cpu")
    monkey = {**read_checkpoint(later)}
    del monkey["renderer"]
    torch.save(monkey, tmp_path / "part.pt")
    with pytest.raises(DataError, match="renderer is missing"):
        read_checkpoint(tmp_path / "part.pt")


def test_an_error_while_writing_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / CHECKPOINT)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        _write(path, step={1, 2})  # JSON holds no sets
    with pytest.raises((AttributeError, pickle.PicklingError)):
        write_checkpoint(path, HEADER, model={"a": torch.ones(1000), "b": lambda: 0}, optimizer={})

    def full(*_: object, **__: object) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0")  # noqa: B904  as torch does

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DataError, match="the disk is full"):
        _write(path, step=4)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT]


@pytest.mark.parametrize("kind", ["zip", "older", "safetensors"])
def test_weights_of_another_toolkit_are_not_to_be_removed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "moco.pth"
    if kind == "safetensors":
        save_file({"conv1.weight": torch.ones(2)}, path)
    else:
        torch.save({"conv1.weight": torch.ones(2)}, path, _use_new_zipfile_serialization=kind == "zip")
    for read in (read_header, read_checkpoint):
        with pytest.raises(DataError, match=r"not a checkpoint .*; give a run of orl-fast train") as caught:
            read(path)
        assert "remove" not in str(caught.value)
