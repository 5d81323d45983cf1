import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mining_world import ALL, CONFIG, NUM_IMAGES, SHARD_SIZE, World, draw_scene, mine, save_checkpoint

from orl_fast.console import log
from orl_fast.shards import write_shards


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    images = folder / "scenes"
    images.mkdir()
    for i in range(NUM_IMAGES):
        draw_scene(i).save(images / f"scene{i:03d}.jpg", quality=90)
    write_shards([images], folder / "shards" / "scenes", shard_size=SHARD_SIZE, num_workers=1)
    checkpoint = save_checkpoint(folder / "runs" / "scenes" / "byol" / "checkpoint.pt", CONFIG)
    return World(folder=folder, images=images, shards=folder / "shards" / "scenes", checkpoint=checkpoint, config=CONFIG)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on the number of threads: one, as in the processes that tests start with OMP_NUM_THREADS=1."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture(scope="session")
def mined(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tables of the world; not to be changed."""
    folder = tmp_path_factory.mktemp("mined")
    mine(world, folder, ALL)
    return folder


@pytest.fixture
def copy(mined: Path, tmp_path: Path) -> Path:
    """A copy of the mined tables, to be changed."""
    for table in mined.iterdir():
        if table.is_dir():
            shutil.copytree(table, tmp_path / table.name)
    return tmp_path


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What is logged during a test, from INFO on."""
    found: list[str] = []
    handler, level = logging.Handler(), log.level
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel("INFO")
    yield found
    log.removeHandler(handler)
    log.setLevel(level)
