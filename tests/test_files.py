"""Files are whole or absent, whatever happens while they are written."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from orl_fast.errors import DataError
from orl_fast.files import atomic_file, atomic_folder, human_bytes, require_free_space, write_array, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="half way"), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError("half way")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["value.json"]


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="disk is full"), atomic_file(tmp_path / "x") as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "table"
    for content in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / "file").write_text(content)
        assert (target / "file").read_text() == content
    with pytest.raises(RuntimeError, match="stop"), atomic_folder(target) as folder:
        (folder / "file").write_text("three")
        raise RuntimeError("stop")
    assert (target / "file").read_text() == "two"
    assert os.listdir(tmp_path) == ["table"]


def test_a_killed_writer_leaves_whole_files(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import numpy as np
        from pathlib import Path
        from orl_fast.files import write_array
        i = 0
        while True:
            write_array(Path({str(tmp_path)!r}) / "array.npy", np.full(200_000, i))
            i += 1
        """
    )
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "array.npy").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    values = np.load(tmp_path / "array.npy")
    assert len(values) == 200_000
    assert values.min() == values.max()


def test_free_space_is_asked_before(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "yet" / "there", num_bytes=1, purpose="a test")
    with pytest.raises(DataError, match=r"a test takes 1000\.0 PB|a test takes .* TB"):
        require_free_space(tmp_path, num_bytes=10**18, purpose="a test")


def test_arrays_come_back(tmp_path: Path) -> None:
    write_array(tmp_path / "a.npy", np.arange(5))
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2, 3, 4]
    assert human_bytes(3_100_000_000) == "3.1 GB"
