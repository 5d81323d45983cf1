"""Files of weights are read without running what they bring."""

import argparse
import collections
import io
import os
import pickle
import sys
import tarfile
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from orl_fast.errors import DataError
from orl_fast.models.weights_file import read_weights


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class HistoryBuffer:
    """As mmengine has it in its checkpoints; the reader does not have mmengine."""

    __module__ = "mmengine.logging"

    def __init__(self) -> None:
        self.history = np.arange(3.0)


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "float32": rng.normal(size=(2, 3)).astype(np.float32),
        "float16": rng.normal(size=3).astype(np.float16),
        "fortran": np.asfortranarray(rng.normal(size=(4, 5))),
        "big": rng.normal(size=4).astype(">f4"),
        "scalar": np.array(7, np.int64),
        "bool": np.array([True, False]),
        "empty": np.empty((0, 3), np.float32),
    }


def same(found, expected) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), array)
        assert found[name].shape == array.shape


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_out_of_a_pickle(protocol: int, tmp_path: Path):
    path, content = tmp_path / "weights.pkl", {"model": arrays(), "__author__": "someone", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    same(read_weights(path).tensors, {f"model.{name}": array for name, array in arrays().items()})


def test_arrays_out_of_python_2s_pickle(tmp_path: Path):
    """As `cPickle.dump(..., protocol=2)` of Python 2 writes strings: bytes, here those of two float32."""
    raw = np.array([1.5, -2.0], np.float32).tobytes()
    dtype = b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x02t" + dtype + b"\x89U\x08" + raw + b"tb"
    (tmp_path / "old.pkl").write_bytes(b"\x80\x02}U\x06conv_w" + array + b"s.")
    assert read_weights(tmp_path / "old.pkl").tensors["conv_w"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize("is_zip", [True, False])
def test_torchs_files_with_what_frameworks_add(is_zip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = types.ModuleType("mmengine.logging")
    monkeypatch.setattr(module, "HistoryBuffer", HistoryBuffer, raising=False)
    monkeypatch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    weights = {"conv.weight": torch.randn(2, 3), "half": torch.ones(2, dtype=torch.bfloat16), "count": torch.tensor(3)}
    extra = {
        "args": argparse.Namespace(lr=0.1, folder=tmp_path),
        "logs": collections.defaultdict(list, loss=[np.float64(0.5)]),
        "message_hub": {"loss": HistoryBuffer()},
        "array": np.arange(6.0).reshape(2, 3),
        "epoch": 3,
    }
    parameter = torch.nn.Parameter(torch.zeros(2))
    content = {"state_dict": collections.OrderedDict(weights), "ema": {"w": parameter}, "optimizer": {"state": {0: {"m": torch.ones(1)}}}}
    torch.save(content | extra, tmp_path / "weights.pth.tar", _use_new_zipfile_serialization=is_zip)
    monkeypatch.undo()
    found = read_weights(tmp_path / "weights.pth.tar").tensors
    assert set(found) == {"state_dict.conv.weight", "state_dict.half", "state_dict.count", "ema.w", "optimizer.state.0.m", "array"}
    assert all(torch.equal(found[f"state_dict.{name}"], value) for name, value in weights.items())
    assert torch.equal(found["array"], torch.arange(6.0, dtype=torch.float64).reshape(2, 3))
    assert not found["ema.w"].requires_grad


def test_safetensors_with_their_metadata(tmp_path: Path):
    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors", metadata={"architecture": "resnet18"})
    (tmp_path / "named-otherwise").write_bytes((tmp_path / "w.safetensors").read_bytes())
    for name in ("w.safetensors", "named-otherwise"):
        found = read_weights(tmp_path / name)
        assert (list(found.tensors), found.metadata) == (["a"], {"architecture": "resnet18"})


def save_as(kind: str, content: object, path: Path) -> None:
    match kind:
        case "pickle":
            path.write_bytes(pickle.dumps(content))
        case "pickle 2":
            path.write_bytes(pickle.dumps(content, protocol=2))
        case _:
            torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["pickle", "pickle 2", "zip", "legacy"])
@pytest.mark.parametrize("place", ["value", "within an array"])
def test_what_wants_to_run_is_refused_by_name(kind: str, place: str, tmp_path: Path):
    evil = Evil(tmp_path / "touched")
    content = {"weight": np.array([evil], object)} if place == "within an array" else {"weight": torch.ones(1).numpy(), "more": evil}
    save_as(kind, content, tmp_path / "weights.pkl")
    with pytest.raises(DataError, match=r"weights.pkl: wants to call posix.mkdir, .* nothing was run.* save the weights alone"):
        read_weights(tmp_path / "weights.pkl")
    assert not (tmp_path / "touched").exists()
    assert pickle.loads(pickle.dumps(evil)) is None  # it does run when it is unpickled
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize("text", [b"cos\nsystem\n(S'true'\ntR.", b"cposix\nsystem\n(S'true'\ntR.", b"cnumpy.testing\nrunstring\n(tR."])
def test_names_of_harmless_looking_modules_are_refused(text: bytes, tmp_path: Path):
    (tmp_path / "a.pkl").write_bytes(text)
    name = text.decode().split("\n")
    with pytest.raises(DataError, match=f"wants to call {name[0][1:]}.{name[1]}, "):
        read_weights(tmp_path / "a.pkl")


def test_objects_and_odd_bytes_within_arrays_are_refused(tmp_path: Path):
    for i, array in enumerate((np.array([{}], object), np.array(["text"]), np.array([1j]), np.array(["2020"], "M8[Y]"))):
        (tmp_path / f"{i}.pkl").write_bytes(pickle.dumps({"w": array}))
        with pytest.raises(DataError, match="damaged, or not a file of weights"):
            read_weights(tmp_path / f"{i}.pkl")


def test_a_whole_model_is_answered_with_what_to_save(tmp_path: Path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(DataError, match=r"wants to call torch.nn.modules.linear.Linear, .*torch.save\(model.state_dict\(\)"):
        read_weights(tmp_path / "model.pt")
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(DataError, match="a TorchScript program"):
        read_weights(tmp_path / "script.pt")


def tar_of_weights() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return file.getvalue()


def zip_of_arrays() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.ones(2))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x1f\x8b\x08\x00", "compressed with gzip; unpack it first"),
        (b"\x89HDF\r\n", "an HDF5 file"),
        (tar_of_weights(), "a tar archive"),
        (zip_of_arrays(), "a zip archive, but not of torch"),
        (b"some text", "not a file of torch, pickle or safetensors"),
        (b"\x80\x04}", "damaged"),
        (b"PK\x03\x04 and no more", "damaged"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{and no more", "damaged"),
        (pickle.dumps({"a": 1, "b": [2]}), "holds no tensors"),
        (pickle.dumps([1, 2]), "holds no tensors"),
    ],
)
def test_other_files_are_refused_with_a_remedy(content: bytes, message: str, tmp_path: Path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match=f"file: .*{message}"):
        read_weights(tmp_path / "file")


def test_damage_is_noticed_by_checksums_where_there_are_any(tmp_path: Path):
    torch.save({"a": torch.arange(1000.0)}, tmp_path / "good.pt")
    content = bytearray((tmp_path / "good.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        entry = max(archive.infolist(), key=lambda each: each.file_size)
    content[entry.header_offset + 3000] ^= 1
    (tmp_path / "bad.pt").write_bytes(content)
    (tmp_path / "short.pt").write_bytes(content[:2000])
    for name in ("bad.pt", "short.pt"):
        with pytest.raises(DataError, match="damaged"):
            read_weights(tmp_path / name)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(1000.0)}, tmp_path / "without.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_weights(tmp_path / "without.pt").tensors["a"].sum() == 499500


@pytest.mark.parametrize("content", [{"a": torch.ones(1)}, {"a": Evil(Path("never"))}])
def test_newer_pickles_of_torch_are_refused_with_a_remedy(content: object, tmp_path: Path):
    """torch.load(weights_only=True) reads protocols 2 and 3 alone."""
    torch.save(content, tmp_path / "w.pt", pickle_protocol=4)
    with pytest.raises(DataError, match=r"saved with pickle_protocol=4 or newer.*; or, where the file comes from, save the weights alone"):
        read_weights(tmp_path / "w.pt")


def test_containers_within_themselves_end(tmp_path: Path):
    loop: dict[str, object] = {"a": np.ones(1)}
    loop["again"] = loop
    (tmp_path / "loop.pkl").write_bytes(pickle.dumps(loop))
    assert "again.again.a" in read_weights(tmp_path / "loop.pkl").tensors
