"""The folder of numba's compiled kernels, named after their sources, so that kernels compiled from other sources are never loaded.

numba recompiles a kernel when its own file changes, but not when a kernel or constant changes that the file imports.
"""

import atexit
import hashlib
import logging
import os
import re
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

_UNUSED_S = 7 * 24 * 3600
_NAMES = f"numba-{'[0-9a-f]' * 16}"


def set_up_kernel_cache(package: Path) -> None:
    """Set NUMBA_CACHE_DIR for this process and its children. Call it before numba is imported.

    The cache is in a NUMBA_CACHE_DIR of the user's own, else next to the package, else in the user's cache folder, else in a private
    temporary folder: the first of these that can be written.
    """
    texts = (f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0" for path in kernel_sources(package))
    name = f"numba-{hashlib.sha256(b''.join(texts)).hexdigest()[:16]}"
    parents = [package / "__pycache__", Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "orl-fast")]
    given = Path(os.environ.get("NUMBA_CACHE_DIR", ""))
    if re.fullmatch(_NAMES, given.name):  # set by a parent process
        given = given.parent if given.is_dir() else Path()
    if given.name:
        parents.insert(0, given.absolute())
    folder = next((parent / name for parent in parents if parent.is_absolute() and _usable(parent / name)), None)
    os.environ["NUMBA_CACHE_DIR"] = str(folder or _temporary_folder(name))
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]


def kernel_sources(package: Path) -> list[Path]:
    """The files that hold kernels and the files that these import, directly or not: all that compiled code depends on."""
    texts = {path: path.read_bytes() for path in package.rglob("*.py")}
    waiting = [path for path, text in texts.items() if re.search(rb"^\s*(?:import|from) numba\b", text, re.MULTILINE)]
    found: set[Path] = set()
    while waiting:
        found.add(path := waiting.pop())
        for name in re.findall(rb"^\s*(?:import|from) orl_fast([.\w]*)", texts[path], re.MULTILINE):
            target = package.joinpath(*name.decode().split(".")[1:])
            module = target.with_suffix(".py")
            imported = {module} if module in texts else {path for path in texts if target in path.parents}
            waiting += imported - found
    return sorted(found)


def _usable(folder: Path) -> bool:
    """Create the folder if possible, mark it as in use, and remove those that were not used for a week when it is new."""
    try:
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        usable = all(os.access(place, os.W_OK) for place in (folder, *folder.iterdir()) if place.is_dir())
    except OSError:
        return False
    for old in folder.parent.glob(_NAMES) if new else ():
        with suppress(OSError):
            if old.stat().st_mtime < time.time() - _UNUSED_S:
                shutil.rmtree(old)
    return usable


def _temporary_folder(name: str) -> Path:
    import tempfile  # rarely needed, and every start of the command line would pay for it

    parent, creator = tempfile.mkdtemp(prefix="orl-fast-"), os.getpid()
    atexit.register(lambda: shutil.rmtree(parent, ignore_errors=True) if os.getpid() == creator else None)
    message = "compiled kernels cannot be stored, so every start takes a minute longer; set NUMBA_CACHE_DIR to a folder that can be written"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        logging.getLogger("orl_fast").warning(message)
    (folder := Path(parent, name)).mkdir()
    return folder
