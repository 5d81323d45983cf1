"""Compiled kernels are never those of other sources, and are stored wherever there is a place for them."""

import ast
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numba
import pytest

import orl_fast
from orl_fast.kernel_cache import kernel_sources, set_up_kernel_cache

PACKAGE = Path(orl_fast.__file__).parent
PROBE = """
import numba
from orl_fast.philox import uniform

@numba.njit(cache=True)
def probe():
    return uniform(1, 2, 3, 4, 5)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package with a kernel of its own, which uses one of another file."""
    shutil.copytree(PACKAGE, tmp_path / "tree" / "orl_fast", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tree" / "orl_fast" / "probe.py").write_text(PROBE)
    return tmp_path / "tree"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package; NUMBA_CACHE_DIR is not set, and is restored afterwards."""
    for name, text in {"__init__": "", "kernel": "from orl_fast.constant import C\nimport numba", "constant": "C = 1", "other": ""}.items():
        (tmp_path / "orl_fast" / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / "orl_fast" / f"{name}.py").write_text(text)
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(numba.config, "CACHE_DIR", numba.config.CACHE_DIR)
    return tmp_path / "orl_fast"


def folder_of(package: Path) -> Path:
    set_up_kernel_cache(package)
    assert os.environ["NUMBA_CACHE_DIR"] == numba.config.CACHE_DIR
    return Path(os.environ["NUMBA_CACHE_DIR"])


def test_a_changed_constant_reaches_the_kernels_of_other_files(tree: Path) -> None:
    def draw() -> float:
        script = "from orl_fast.probe import probe; print(probe())"
        environment = {**os.environ, "PYTHONPATH": str(tree), "NUMBA_CACHE_DIR": ""}
        return float(subprocess.run([sys.executable, "-c", script], env=environment, cwd=tree, check=True, capture_output=True).stdout)

    before = draw()
    assert 0 < before < 1
    philox = tree / "orl_fast" / "philox.py"
    text = philox.read_text()
    assert "_UNIT = 2.0**-53" in text
    philox.write_text(text.replace("_UNIT = 2.0**-53", "_UNIT = 2.0**-54"))
    assert draw() == before / 2
    philox.write_text(text)
    assert draw() == before
    assert len(list((tree / "orl_fast" / "__pycache__").glob("numba-*"))) == 2


UNPRIVILEGED = """
import multiprocessing, os, sys
from orl_fast.probe import probe
def work(_):
    from pathlib import Path
    assert list(Path(os.environ["NUMBA_CACHE_DIR"]).rglob("probe*.nbc"))
    return probe()
if __name__ == "__main__":
    value = probe()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(work, range(4)) == [value] * 4
    assert os.path.isdir(os.environ["NUMBA_CACHE_DIR"])
    print(os.environ["NUMBA_CACHE_DIR"], oct(os.stat(os.path.dirname(os.environ["NUMBA_CACHE_DIR"])).st_mode))
"""


def test_nothing_writable_but_the_temporary_folder_is_enough(tree: Path, tmp_path: Path) -> None:
    """With one warning, though worker processes import the package too."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root writes to any folder, and there is no setpriv to take that away")
    (tmp_path / "run.py").write_text(UNPRIVILEGED)
    for folder in (tmp_path / "home", tmp_path / "tmp"):
        folder.mkdir()
    places = [tmp_path / "home", *(path for path in (tree, *tree.rglob("*")) if path.is_dir())]
    for place in places:
        place.chmod(0o555)
    environment = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    environment |= {
        "PYTHONPATH": str(tree),
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [*(drop if os.geteuid() == 0 else ()), sys.executable, str(tmp_path / "run.py")]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    finally:
        for place in places:
            place.chmod(0o755)
    assert done.returncode == 0, done.stderr
    used, mode = done.stdout.split()
    assert Path(used).is_relative_to(tmp_path / "tmp")
    assert mode == "0o40700"
    assert done.stderr.count("set NUMBA_CACHE_DIR to a folder that can be written") == len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path / "tmp") == []


def test_the_folder_is_named_after_the_kernels_sources(package: Path) -> None:
    first = folder_of(package)
    assert first.parent == package / "__pycache__"
    (package / "other.py").write_text("changed = 1")
    assert folder_of(package) == first
    (package / "constant.py").write_text("C = 2")
    assert folder_of(package) != first
    (package / "constant.py").write_text("C = 1")
    assert folder_of(package) == first


def test_the_users_folder_is_the_parent_also_for_child_processes(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "mine"))
    folder = folder_of(package)
    assert folder.parent == tmp_path / "mine"
    assert folder_of(package) == folder  # as a child, which finds the keyed folder in its environment
    (package / "constant.py").write_text("C = 2")
    other = folder_of(package)
    assert other != folder
    assert other.parent == tmp_path / "mine"
    shutil.rmtree(tmp_path / "mine")  # a temporary folder of a parent process that has ended is not used again
    assert folder_of(package).parent == package / "__pycache__"


def test_places_that_cannot_be_written_are_passed_over(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "__pycache__").write_text("a file")
    assert folder_of(package).parent == tmp_path / "user" / "orl-fast"
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # invalid by the XDG specification
    monkeypatch.chdir(tmp_path)
    parent = folder_of(package).parent
    assert parent.name.startswith("orl-fast-")
    assert not (tmp_path / "relative").exists()
    shutil.rmtree(parent)


def test_folders_of_other_users_are_passed_over(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numba would fall back to caches that it does not key by all sources, so one subfolder that cannot be written is enough."""
    folder = folder_of(package)
    (folder / "views_1234").mkdir()
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.setattr(os, "access", lambda path, _: path != folder / "views_1234")
    assert folder_of(package).parent == tmp_path / "user" / "orl-fast"


def test_folders_that_were_not_used_for_a_week_are_removed(package: Path) -> None:
    parent = package / "__pycache__"
    names = {f"numba-{'0' * 16}": 8, f"numba-{'1' * 16}": 6, "numba-of-the-user": 99}
    for name, days in names.items():
        (parent / name).mkdir(parents=True)
        os.utime(parent / name, (time.time() - days * 86_400,) * 2)
    folder = folder_of(package)
    left = {folder.name, f"numba-{'1' * 16}", "numba-of-the-user"}
    assert set(os.listdir(parent)) == left
    os.utime(folder, (0, 0))
    folder_of(package)
    assert time.time() - folder.stat().st_mtime < 3600  # marked as in use


def test_kernel_sources_are_closed_under_imports() -> None:
    """Against a parser: nothing that they import is missing."""
    sources = kernel_sources(PACKAGE)
    assert {PACKAGE / "philox.py", PACKAGE / "views" / "kernels.py"} <= set(sources)
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative imports are not followed"
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                module = PACKAGE.parent.joinpath(*name.split(".")).with_suffix(".py")
                assert module in sources or not module.is_file() or not module.is_relative_to(PACKAGE), (path, name)


def test_help_imports_neither_numba_nor_torch() -> None:
    script = "import sys\ntry:\n    main()\nfinally:\n    assert not {'numba', 'torch', 'numpy'} & sys.modules.keys()"
    command = [sys.executable, "-c", f"from orl_fast.cli.main import main\n{script}", "--help"]
    assert "Usage" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
