"""What several tests share: real photographs where they are at hand, and the switch for tests that need a GPU."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line has it; read when torch is imported
_SHARED = Path(os.environ.get("ORL_FAST_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def coco128() -> Path:
    """128 real COCO photographs in COCO's own layout."""
    folder = _SHARED / "data" / "coco128"
    if not (folder / "train2017").is_dir():
        pytest.skip(f"no photographs at {folder}; set ORL_FAST_SHARED to the folder that holds data/coco128")
    return folder


@pytest.fixture(scope="session")
def photo_paths(coco128: Path) -> list[Path]:
    """The photographs' files, sorted."""
    return sorted((coco128 / "train2017").glob("*.jpg"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
