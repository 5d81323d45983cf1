"""Draws the pictures of docs/mining.md into its own folder: python docs/figures/draw_mining.py (a minute; nothing is downloaded)."""

import io
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.untrained import write_untrained
from orl_fast.config import Config
from orl_fast.demo.scenes import write_scenes
from orl_fast.mining.pipeline import STEPS, Stage
from orl_fast.mining.rois import open_boxes
from orl_fast.recipe import load_config
from orl_fast.report import COLORS, Cell, Grid, draw_grid, pair_grid, save_picture
from orl_fast.shards import ShardIndex, ShardReader, write_shards
from orl_fast.tables import BoxTable, PairTable

HERE = Path(__file__).parent
NUM_SCENES, SHOWN, FIRST = 80, (3, 17, 40), 20
SETTINGS = ["mining.min_side_px=28", "mining.max_rois=12", "mining.num_neighbors=3", "mining.roi_size_px=32"]


def main() -> None:
    config = load_config("tiny", overrides=SETTINGS)
    with tempfile.TemporaryDirectory() as name:
        stage = mined(Path(name), config)
        rois, pairs = BoxTable.open(stage.folder / "rois"), PairTable.open(stage.folder / "pairs")
        save_picture(draw_grid(box_grid(stage, rois)).quantize(96), HERE / "mining-rois.png")
        title = "Corresponding RoIs (untrained network)"
        grid = pair_grid(stage.index, rois, pairs, images=SHOWN, num_neighbors=3, title=title)
        save_picture(draw_grid(grid).quantize(96), HERE / "mining-pairs.png")


def mined(folder: Path, config: Config) -> Stage:
    """Drawn scenes, packed, and mined with the random weights that a run starts from."""
    write_scenes(folder / "scenes", num_scenes=NUM_SCENES, seed=0)
    write_shards([folder / "scenes"], folder / "shards", num_workers=1)
    write_untrained(folder / "checkpoint.pt", config)
    index = ShardIndex.open(folder / "shards")
    stage = Stage(index=index, folder=folder / "mined", config=config, checkpoint=folder / "checkpoint.pt")
    stage.run(STEPS)
    return stage


def box_grid(stage: Stage, rois: BoxTable) -> Grid:
    """Scenes, all of their proposals, and the RoIs kept of them."""
    grid = Grid(
        title="Proposals and RoIs",
        note="Selective search proposes hundreds of boxes; the filter keeps those that are large, compact and different enough.",
        headings=["scene", "proposals", "RoIs"],
    )
    proposals = open_boxes(stage.folder / "proposals", 0)
    with ShardReader(stage.index) as reader:
        for row in SHOWN:
            image = decoded(reader, row)
            kept = [(box, COLORS[i % len(COLORS)]) for i, box in enumerate(rois.of(row).tolist())]
            cells = [Cell(image=image, caption=stage.index.file_names[row])]
            cells.append(
                Cell(image=image, boxes=[(box, "#ffffff") for box in proposals.of(row).tolist()], caption=f"{len(proposals.of(row))}")
            )
            grid.rows.append([*cells, Cell(image=image, boxes=kept, caption=f"{len(kept)}")])
    return grid


def decoded(reader: ShardReader, row: int) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(reader.read(row))).convert("RGB"))


if __name__ == "__main__":
    main()
