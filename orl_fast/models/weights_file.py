"""Weights out of files that others wrote, whatever wrote them, without running code of theirs: torch, pickle and safetensors.

A pickle is a program. Files of torch are read by `torch.load(weights_only=True)`, others by an unpickler that calls nothing but
stand-ins of this module: arrays are rebuilt from their bytes, and what training frameworks add (arguments, logs) becomes an empty dict.
Any other name is refused.
"""

import io
import pickle
import pickletools
import re
import tarfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from orl_fast.errors import DataError

_REMEDY = "where the file comes from, save the weights alone: torch.save(model.state_dict(), 'weights.pt')"
_ZIP, _PICKLE, _LEGACY = b"PK\x03\x04", b"\x80", b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the last: the number that torch < 1.6 begins with
_OTHERS = {  # what else a file may begin with: what it is, and what to do
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"\x89HDF": "an HDF5 file (Keras); convert it to safetensors first",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; run git lfs pull",
    b"<": "a web page, not weights; download the file again",
}
_DAMAGE = (RuntimeError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError,
           NotImplementedError, AssertionError, ImportError, OverflowError, MemoryError, safetensors.SafetensorError)  # fmt: skip
_NUM_LEGACY_PICKLES = 5  # a number, the protocol, the system, the object, the names of its storages
_MAX_DEPTH = 16  # of nested containers
# Objects that frameworks put next to weights. None is needed, so that an empty dict stands for each.
_NEEDLESS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|collections\.defaultdict|pathlib\.\w+|datetime\.\w+|__main__\.\w+"
    r"|numpy\.dtypes\.\w+|numpy\.core\.multiarray\.scalar|builtins\.(bool|complex|dict|float|frozenset|int|list|object|set|slice|str|tuple)"
    r"|(addict|easydict|lightning|lightning_fabric|lightning_utilities|ml_collections|mmcv|mmengine|omegaconf|pytorch_lightning|yacs)\..+"
)


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """The tensors of a file, on the CPU, by their full names: the keys of nested containers joined by dots."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)  # of safetensors


def read_weights(path: Path) -> WeightsFile:
    """Read a file of torch (zip, or older than 1.6), pickle or safetensors, recognized by its first bytes.

    Raises:
        DataError: it is none of these, is damaged, wants to call something, or holds no tensors; the message has a remedy.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if start[8:9] == b"{" or path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as opened:
                metadata = opened.metadata() or {}
            return _checked(WeightsFile(path=path, tensors=load_file(path), metadata=metadata))
        if start.startswith(_ZIP):
            return _checked(WeightsFile(path=path, tensors=_tensors(_read_torch(path, _zip_globals(path)))))
        if start.startswith(_PICKLE) or path.suffix in (".pkl", ".pickle"):
            content = _read_torch(path, _legacy_globals(path)) if _LEGACY in start else _read_pickle(path)
            return _checked(WeightsFile(path=path, tensors=_tensors(content)))
        known = (what for magic, what in _OTHERS.items() if start.startswith(magic))
        tar = "a tar archive; unpack it, or load and save it with the version of torch that wrote it (0.1)"
        what = next(known, "") or (tar if tarfile.is_tarfile(path) else "not a file of torch, pickle or safetensors; give another one")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (pickle.UnpicklingError, RecursionError, *_DAMAGE) as error:
        text = str(error).rpartition("WeightsUnpickler error: ")[2] or type(error).__name__  # torch's advice before it is to run the code
        reason = text.splitlines()[0]
        if name := re.search(r"GLOBAL ([\w.]+)", text):
            raise DataError(f"{path}: {_wants(name[1])}") from error
        raise DataError(f"{path}: damaged, or not a file of weights ({reason}); download or copy it again; or, {_REMEDY}") from error
    raise DataError(f"{path}: {what if start else 'an empty file; download or copy it again'}")


def _checked(file: WeightsFile) -> WeightsFile:
    if not file.tensors:
        raise DataError(f"{file.path}: holds no tensors; {_REMEDY}")
    if "" in file.tensors:
        raise DataError(f"{file.path}: is a single tensor without a name, not the weights of a network; {_REMEDY}")
    return file


def _wants(name: str) -> str:
    return f"wants to call {name}, which weights do not need; nothing was run, and the file is refused; {_REMEDY}"


def _read_torch(path: Path, names: Iterable[str]) -> Any:
    """What `torch.save` wrote, and which uses these names."""
    found = [(_stand_in(name), name) for name in sorted(set(names))]
    both = [(stand_in, written) for stand_in, name in found if stand_in for written in {name, name.replace("numpy.core", "numpy._core")}]
    with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([*both, _Array, _Dtype]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _zip_globals(path: Path) -> list[str]:
    """The names in the pickle of a zip archive of torch; compares its checksums where it has them, as torch.load does not."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        pickled = next((entry for entry in entries if entry.filename.endswith("/data.pkl")), None)
        if pickled is None:
            raise DataError(f"{path}: a zip archive, but not of torch; unpack it, or give another file")
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise DataError(f"{path}: a TorchScript program; {_REMEDY}")
        for entry in entries:
            if entry.is_dir() or entry.external_attr & 0x10:  # for which torch.load gives what was in memory
                raise zipfile.BadZipFile(f"{entry.filename} is marked as a folder")
            if not entry.CRC:  # written without checksums (torch.serialization.set_crc32_options)
                del entry.CRC
                continue
            with archive.open(entry) as part:
                while part.read(1 << 20):
                    pass
        with archive.open(pickled) as part:
            return list(_globals(io.BytesIO(part.read())))


def _legacy_globals(path: Path) -> list[str]:
    with path.open("rb") as file:
        return [name for _ in range(_NUM_LEGACY_PICKLES) for name in _globals(file)]


def _globals(file: Any) -> Iterator[str]:
    """The names that the next pickle of a file uses."""
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "STACK_GLOBAL":
            raise pickle.UnpicklingError("saved with pickle_protocol=4 or newer, which torch.load(weights_only=True) does not read")
        if opcode.name == "GLOBAL":
            yield _plain_name(*str(argument).split(" ", 1))


def _plain_name(module: str, name: str) -> str:
    return f"{module.replace('__builtin__', 'builtins').replace('numpy._core', 'numpy.core')}.{name}"  # as Python 3 and NumPy 1 call it


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        full = _plain_name(module, name)
        found = _stand_in(full)
        if found is None:
            raise pickle.UnpicklingError(f"GLOBAL {full}")
        return found


def _read_pickle(path: Path) -> Any:
    file: BinaryIO
    with path.open("rb") as file:
        return _Unpickler(file, encoding="latin1").load()  # as NumPy's arrays out of Python 2 need it


class _Dtype:
    """Stands for numpy.dtype: plain numbers alone."""

    def __init__(self, text: str, *_: Any) -> None:
        self.text, self.order = str(text), "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = "=" if state[1] == "|" else str(state[1])

    def numpy(self) -> np.dtype[Any]:
        order: Any = self.order
        found = np.dtype(self.text).newbyteorder(order)
        if found.kind not in "fiub":
            raise ValueError(f"an array of {found}")
        return found


class _Array:
    """Stands for numpy.ndarray, from its bytes."""

    def __init__(self, *_: Any) -> None:
        self.values: NDArray[Any] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, content = state
        self._set(content.encode("latin1") if isinstance(content, str) else content, dtype, shape, "F" if is_fortran else "C")

    def _set(self, content: Any, dtype: Any, shape: tuple[int, ...], order: Any) -> None:
        found = np.frombuffer(content, dtype.numpy()).reshape(shape, order=order)
        self.values = found.astype(found.dtype.newbyteorder("="))

    @classmethod
    def from_buffer(cls, content: Any, dtype: Any, shape: tuple[int, ...], order: Any) -> "_Array":
        array = cls()
        array._set(content, dtype, shape, order)
        return array


class _Needless:
    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()  # which takes entries and attributes


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes in {encoding}")
    return text.encode(encoding)


def _no_bytes() -> bytes:
    return b""  # so protocol 2 writes them


def _stand_in(name: str) -> Any:
    """What is called in place of a pickle's global; None: the name is refused (or known to torch)."""
    plain = {
        "collections.OrderedDict": OrderedDict, "numpy.dtype": _Dtype, "numpy.ndarray": _Array, "_codecs.encode": _latin1,
        "builtins.bytes": _no_bytes, "numpy.core.multiarray._reconstruct": _Array, "numpy.core.numeric._frombuffer": _Array.from_buffer,
    }  # fmt: skip
    return plain.get(name) or (_Needless if _NEEDLESS.fullmatch(name) else None)


def _tensors(value: Any, name: str = "", depth: int = 0) -> dict[str, Tensor]:
    if isinstance(value, _Array):
        return {name: torch.from_numpy(np.ascontiguousarray(value.values).reshape(value.values.shape))}
    if isinstance(value, Tensor):
        return {name: value.detach()}
    found: dict[str, Tensor] = {}
    if isinstance(value, Mapping) and depth < _MAX_DEPTH:
        for key, entry in value.items():
            found |= _tensors(entry, f"{name}.{key}" if name else str(key), depth + 1)
    return found
