"""Files and folders are whole or absent, whatever happens while they are written, and a folder has one writer."""

import errno
import fcntl
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from orl_fast.errors import DataError
from orl_fast.files import (
    LOCK_NAME,
    atomic_file,
    atomic_folder,
    human_bytes,
    locked,
    remove_leftovers,
    require_free_space,
    sync_folder,
    write_array,
    write_json,
)


def run(script: str, *arguments: object) -> int:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)], timeout=60).returncode


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="half way"), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError("half way")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["value.json"]


def test_simultaneous_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with atomic_file(path) as one:
        one.write(b"1" * 10)
        one.flush()
        with atomic_file(path) as other:
            other.write(b"2" * 5)
            other.flush()
            assert len(os.listdir(tmp_path)) == 2
        assert path.read_bytes() == b"2" * 5
        one.write(b"1" * 10)
    assert path.read_bytes() == b"1" * 20
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_new_files_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_json(tmp_path / "atomic", {})
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_links_are_followed_and_devices_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "target")
    for value in (1, 2):
        write_json(tmp_path / "link", value)
        assert (tmp_path / "elsewhere" / "target").read_text() == f"{value}\n"
    assert (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        write_json(tmp_path / "pipe", "through")
        assert reader.communicate(timeout=30)[0] == b'"through"\n'
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(DataError, match="disk is full"):
        write_json(Path("/dev/full"), 1)
    with pytest.raises(DataError, match=r"elsewhere: cannot be written \(Is a directory"):
        write_json(tmp_path / "elsewhere", 1)


@pytest.mark.parametrize("hidden", [False, True], ids=["plain", "behind a library's error"])
def test_a_full_disk_is_explained(tmp_path: Path, hidden: bool) -> None:
    with pytest.raises(DataError, match=r"disk is full; free .* and run the same command"), atomic_file(tmp_path / "x") as file:
        try:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            if hidden:
                raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904  torch.save does this
            raise
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


def test_simultaneous_writers_of_one_folder_leave_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "table"
    target.mkdir()
    rename = Path.rename

    def slow_rename(self: Path, new: Path) -> Path:
        done = rename(self, new)
        if self == target and new.suffix == ".replaced" and not (tmp_path / "met").exists():
            (tmp_path / "met").touch()
            with atomic_folder(target) as other:  # comes in while the name is free
                (other / "by").write_text("other")
        return done

    monkeypatch.setattr(Path, "rename", slow_rename)
    with atomic_folder(target) as folder:
        (folder / "by").write_text("first")
    assert (tmp_path / "met").exists()
    assert (target / "by").read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == ["met", "table"]


def test_a_folder_that_cannot_be_replaced_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "table"
    with atomic_folder(target) as folder:
        (folder / "file").write_text("old")
    rename = Path.rename

    def failing(self: Path, new: Path) -> Path:
        if self.suffix == ".partial" and new == target:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, new)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), atomic_folder(target) as folder:
        (folder / "file").write_text("new")
    assert (target / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["table"]


REPLACE = """
    import os, signal, sys
    from pathlib import Path
    from orl_fast.files import atomic_folder
    rename, calls = Path.rename, 0

    def killing(self, new):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, new)

    Path.rename = killing
    with atomic_folder(Path(sys.argv[1])) as folder:
        (folder / "file").write_text("new")
        (folder / "second").write_text("new")
"""


@pytest.mark.parametrize("settle", ["remove_leftovers", "atomic_folder"])
@pytest.mark.parametrize(("killed_at", "kept"), [(1, "old"), (2, "old"), (3, "new"), (4, "new")])
def test_a_killed_replacement_loses_no_folder(tmp_path: Path, killed_at: int, kept: str, settle: str) -> None:
    """SIGKILL before each rename: of the old folder, of the new one (neither has the name), of what is to be deleted; then none."""
    target = tmp_path / "table"
    with atomic_folder(target) as folder:
        (folder / "file").write_text("old")
    assert run(REPLACE, target, killed_at) == (-signal.SIGKILL if killed_at < 4 else 0)
    if killed_at != 2:
        assert (target / "file").read_text() == kept
    if settle == "remove_leftovers":
        (tmp_path / "notes.partial").touch()  # somebody else's
        remove_leftovers(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["notes.partial", "table"]
    else:
        with pytest.raises(RuntimeError), atomic_folder(target):
            raise RuntimeError
    assert (target / "file").read_text() == kept
    assert len(os.listdir(target)) == (2 if kept == "new" else 1)


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
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["array.npy"]


def test_folders_that_cannot_be_synced_are_not_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = [errno.EINVAL, errno.ENOSYS, errno.EIO]
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(codes.pop(0), "fsync")))
    sync_folder(tmp_path)
    sync_folder(tmp_path)
    with pytest.raises(OSError, match="fsync"):
        sync_folder(tmp_path)


HOLD = """
    import sys
    from pathlib import Path
    from orl_fast.files import locked
    with locked(Path(sys.argv[1]), what="orl-fast mine"):
        print("held", flush=True)
        sys.stdin.read()
        if sys.argv[2:] == ["fail"]:
            sys.exit(3)
"""


def hold(folder: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(folder), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with hold(folder) as process:
        for _ in range(3):  # refused again and again: a refusal must not disturb the lock
            with (
                pytest.raises(DataError, match=rf"run: orl-fast mine \(process {process.pid} on .*\) is writing here; wait"),
                locked(folder, what="x"),
            ):
                pass
            assert os.listdir(folder) == [LOCK_NAME]
        process.kill()
    with locked(folder, what="orl-fast train"):
        assert (folder / LOCK_NAME).read_text().startswith("orl-fast train (process")
        with pytest.raises(DataError, match=r"orl-fast train \(process"), locked(folder, what="x"):
            pass
    assert (folder / LOCK_NAME).read_bytes() == b""


def test_a_failed_writer_leaves_no_trace_of_its_own(tmp_path: Path) -> None:
    for folder, left in ((tmp_path / "a" / "b", []), (tmp_path / "c", ["c"])):
        if left:
            folder.mkdir()
        with pytest.raises(RuntimeError), locked(folder, what="x"):
            raise RuntimeError
        assert os.listdir(tmp_path) == left
    with pytest.raises(RuntimeError), locked(folder, what="x"):
        (folder / "result").touch()
        raise RuntimeError
    assert sorted(os.listdir(folder)) == [LOCK_NAME, "result"]


def test_the_lock_of_a_removed_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder fails and removes file and folder between our opening the file and our locking it."""
    folder, real = tmp_path / "run", fcntl.flock
    process = hold(folder, "fail")

    def flock(file: object, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        process.communicate()
        assert process.returncode == 3
        assert not folder.exists()
        real(file, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(folder, what="us"):
        with pytest.raises(DataError, match=r"us \(.* is writing here"), locked(folder, what="x"):
            pass
        assert os.listdir(folder) == [LOCK_NAME]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    warnings: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("orl_fast"), "handle", warnings.append)
    with locked(tmp_path / "run", what="x"):
        (tmp_path / "run" / "result").touch()
    assert [record.getMessage() for record in warnings] == [
        f"{tmp_path / 'run'}: this file system has no locks ({os.strerror(code)}); let only one orl-fast command write here at a time"
    ]
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(DataError, match="cannot be locked"), locked(tmp_path / "run", what="x"):
        pass


def test_folders_that_cannot_be_locked_are_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(DataError, match=r"cannot be written \(.*\); choose another folder"), locked(folder, what="x"):
            pass
    with pytest.raises(DataError, match="cannot be written"):
        write_json(tmp_path / "file" / "value.json", 1)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("place", ["/proc/value", "/proc/nowhere/value", "/sys/value", "socket", "socket/value"])
def test_where_nothing_can_be_created_is_explained(place: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(DataError, match=rf"{place}: cannot be written \(.*\); choose another folder"):
            write_json(tmp_path / place, 1)
        if place != "socket":
            with pytest.raises(DataError, match=rf"{place}: cannot be written"), atomic_folder(tmp_path / place):
                pass
    assert os.listdir(tmp_path) == ["socket"]


def test_errors_within_the_block_are_not_taken_for_those_of_the_place(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_file(tmp_path / "x"):
        (tmp_path / "elsewhere").read_bytes()


def test_free_space_is_checked_first(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "yet" / "there", num_bytes=1, purpose="a test")
    with pytest.raises(DataError, match=r"a test takes 1\.0 EB, "):
        require_free_space(tmp_path, num_bytes=10**18, purpose="a test")


def test_arrays_are_read_back(tmp_path: Path) -> None:
    write_array(tmp_path / "a.npy", np.arange(5))
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2, 3, 4]
    assert human_bytes(3_100_000_000) == "3.1 GB"
