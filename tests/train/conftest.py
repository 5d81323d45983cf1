"""Packed photographs and the tables of stage 2, made up, for tests of whole runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orl_fast.checkpoint import CHECKPOINT
from orl_fast.config import Config
from orl_fast.distributed import Ranks
from orl_fast.shards import ShardIndex
from orl_fast.tables import TableInfo, new_table
from orl_fast.train.loop import Outcome, train
from orl_fast.train.run import Run, open_mined
from orl_fast.train.step import TrainStep
from orl_fast.views.draw import Mined
from orl_fast.views.patches import PATCH_SIDE_PX
from tests.conftest import pack
from tests.synthetic import small_config

NUM_IMAGES = 12
# Of 12 images: 3 steps per epoch.
RUN = [
    "batch_size=4", "image_size_px=32", "patch_size_px=32", "warmup_epochs=1", "log_every_steps=2",
    "mining.num_neighbors=3",
]  # fmt: skip

EACH_EPOCH = ["checkpoint_every_epochs=1"]


def run_config(*overrides: str, epochs: int = 4) -> Config:
    return small_config(*RUN, f"epochs={epochs}", *overrides)


@pytest.fixture(scope="session")
def packed(photo_paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Twelve photographs."""
    return pack(photo_paths[:NUM_IMAGES], tmp_path_factory.mktemp("packed") / "twelve")


@pytest.fixture(scope="session")
def mined(packed: ShardIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two RoIs per image, three neighbors, one pair with each."""
    folder = tmp_path_factory.mktemp("mined")
    write_tables(folder, index=packed.fingerprint, heights=packed.heights, widths=packed.widths)
    return folder


def write_tables(folder: Path, *, index: str, heights: np.ndarray, widths: np.ndarray, num_neighbors: int = 3, encoder: str = "e0") -> None:
    n = len(heights)
    rois = TableInfo(kind="rois", made_from={"index": index}, settings={})
    with new_table(folder / "rois", rois) as out:
        boxes = [[(0, 0, w // 2, h // 2), (w // 4, h // 4, w, h)] for h, w in zip(heights, widths, strict=True)]
        np.save(out / "boxes.npy", np.array(boxes, np.int16).reshape(-1, 4))
        np.save(out / "offsets.npy", np.arange(n + 1, dtype=np.int64) * 2)
    settings = {"num_neighbors": num_neighbors, "pair_ratio": 0.1, "compat": "official"}
    made_from = {"index": index, "rois": rois.fingerprint, "encoder": encoder}
    with new_table(folder / "pairs", TableInfo(kind="pairs", made_from=made_from, settings=settings)) as out:
        total = n * num_neighbors
        np.save(out / "neighbors.npy", (np.arange(n)[:, None] + 1 + np.arange(num_neighbors)) % n)
        np.save(out / "first.npy", np.arange(total, dtype=np.int64).reshape(n, num_neighbors))
        np.save(out / "count.npy", np.ones((n, num_neighbors), np.int32))
        np.save(out / "query_roi.npy", (np.arange(total) % 2).astype(np.int16))
        np.save(out / "partner_roi.npy", (np.arange(total) // 2 % 2).astype(np.int16))
        np.save(out / "similarities.npy", np.linspace(1, 0, total, dtype=np.float32))


def write_patches(folder: Path, tables: Mined, photo: bytes) -> None:
    """One picture, 128 × 128, as the patch of every RoI."""
    num = len(tables.rois.boxes)
    made_from = {"rois": tables.fingerprints["rois"], "pairs": tables.fingerprints["pairs"]}
    with new_table(folder / "patches", TableInfo(kind="patches", made_from=made_from, settings={"side_px": PATCH_SIDE_PX})) as out:
        (out / "patches-000000.tar").write_bytes(photo)  # readers go by offset and size alone
        np.save(out / "roi_row.npy", np.arange(num))
        np.save(out / "shard.npy", np.zeros(num, np.int32))
        np.save(out / "offset.npy", np.zeros(num, np.int64))
        np.save(out / "size.npy", np.full(num, len(photo), np.int32))


def train_run(
    index: ShardIndex,
    folder: Path,
    config: Config,
    *,
    method: str | None = None,
    mined: Path | None = None,
    restart: bool = False,
    max_steps: int | None = None,
) -> Outcome:
    """BYOL, or with mined tables ORL."""
    tables = open_mined(index, mined, config) if mined else None
    run = Run(method=method or ("orl" if mined else "byol"), config=config, folder=folder, mined=tables)
    return train(run, index=index, ranks=Ranks(), restart=restart, max_steps=max_steps)


@contextmanager
def after_step(step: int, action: Callable[[TrainStep], None]) -> Iterator[None]:
    """Do something at the very end of a step (0-based)."""
    inner = TrainStep.__call__

    def call(self: TrainStep, *arguments: Any, **options: Any) -> dict[str, float]:
        logged = inner(self, *arguments, **options)
        if options["step"] == step:
            action(self)
        return logged

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", call)
        yield


@contextmanager
def in_float64() -> Iterator[None]:
    """Train in double precision, so that ranks differ from one process by the order of sums only, and not by what training makes of it."""
    inner = TrainStep.__init__

    def init(self: TrainStep, *arguments: Any, **options: Any) -> None:
        inner(self, *arguments, **options)
        self.method.double()
        for name in ("online", "target"):
            self.method.get_submodule(name).register_forward_pre_hook(lambda _module, inputs: (inputs[0].double(),))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__init__", init)
        yield


@pytest.fixture(scope="session")
def straight(packed: ShardIndex, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The last checkpoint of a BYOL run of nine steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    assert train_run(packed, folder, run_config(*EACH_EPOCH, epochs=3)) == Outcome(first_step=0, step=9, num_steps=9)
    return (folder / CHECKPOINT).read_bytes()
