"""`orl-fast show`: pictures of mined pairs and of augmented views."""

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from orl_fast.shards import ShardIndex


@click.group()
def command() -> None:
    """Draw pictures: mined pairs, augmented views."""


def _common(function: Any) -> Any:
    options = (
        click.argument("shards", type=click.Path(path_type=Path), required=False),
        click.option("--images", metavar="NAME,...", help="Which images: keys, file names or row numbers [default: drawn at random]."),
        click.option("--num", "num_images", type=click.IntRange(1, 100), default=6, show_default=True, help="How many random ones."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
        click.option("--mined", type=click.Path(path_type=Path, file_okay=False), help="Tables of orl-fast mine [default: SHARDS/mined]."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@command.command()
@_common
@click.option("--neighbors", type=click.IntRange(1, 20), default=4, show_default=True, help="Neighbors of each image.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("pairs.png"), show_default=True)
def pairs(shards: Path | None, images: str | None, num_images: int, seed: int, mined: Path | None, neighbors: int, out: Path) -> None:
    """Each image next to its neighbors, with the best pair's two boxes in one color."""
    from orl_fast.places import default_shards, mined_folder
    from orl_fast.report import draw_grid, pair_grid, save_picture
    from orl_fast.shards import ShardIndex
    from orl_fast.tables import BoxTable, PairTable, open_info

    index = ShardIndex.open(default_shards(shards))
    mined = mined or mined_folder(index.path)
    remedy = f"orl-fast mine {index.path}"
    for kind in ("rois", "pairs"):
        open_info(mined / kind, kind, made_from={"index": index.fingerprint}, remedy=remedy)
    chosen = _choose(index, images, num_images=num_images, seed=seed)
    tables = BoxTable.open(mined / "rois"), PairTable.open(mined / "pairs")
    grid = pair_grid(index, *tables, images=chosen, num_neighbors=neighbors, title=f"Corresponding RoIs of {index.path.resolve().name}")
    save_picture(draw_grid(grid), out)
    click.echo(f"{out}: {len(chosen)} images with their first neighbors")


@command.command()
@_common
@click.option("--method", help="The method whose views are drawn [default: the stage that comes next].")
@click.option("--recipe", help="A shipped recipe or a TOML file [default: that of the run of this method, else the method's].")
@click.option("--epoch", type=click.IntRange(min=0), default=0, show_default=True, help="The epoch whose views are drawn.")
@click.option("--renderer", type=click.Choice(["cpu", "reference", "gpu", "dali-cpu"]), default="cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("views.png"), show_default=True)
def views(
    shards: Path | None, images: str | None, num_images: int, seed: int, mined: Path | None, method: str | None, recipe: str | None,
    epoch: int, renderer: str, out: Path,
) -> None:  # fmt: skip
    """Each image with its crop boxes, and its views as a training with this seed and recipe sees them."""
    import numpy as np

    from orl_fast.console import log
    from orl_fast.distributed import process_group
    from orl_fast.methods import METHODS
    from orl_fast.places import default_shards
    from orl_fast.report import draw_grid, render_views, save_picture, view_grid
    from orl_fast.shards import ShardIndex
    from orl_fast.train.run import choose_run
    from orl_fast.views.draw import draw_plan

    index = ShardIndex.open(default_shards(shards))
    run = choose_run(index, method=method, recipe=recipe, mined=mined, announce=log.debug)
    specs, rows = METHODS[run.method].views(run.config), np.array(_choose(index, images, num_images=num_images, seed=seed), np.int64)
    with process_group() as ranks:
        plan = draw_plan(rows, specs, seed=seed, epoch=epoch, heights=index.heights, widths=index.widths, mined=run.mined)
        batch = render_views(index, plan, mined=run.mined, loader=run.config.loader, kind=renderer, device=ranks.device)
    title = f"Views of {run.method.upper()}: epoch {epoch}, seed {seed}, {renderer} renderer"
    patches = run.mined.patches if run.mined else None
    save_picture(draw_grid(view_grid(index, plan, batch, specs=specs, title=title, patches=patches)), out)
    click.echo(f"{out}: {len(rows)} images, {len(specs)} views each")


def _choose(index: "ShardIndex", names: str | None, *, num_images: int, seed: int) -> list[int]:
    """Rows by key, file name or number; else drawn at random, in order."""
    import numpy as np

    from orl_fast.errors import DataError

    if names is None:
        drawn = np.random.default_rng(seed).permutation(len(index))[:num_images]
        return sorted(drawn.tolist())
    keys, files = {key: row for row, key in enumerate(index.keys)}, {file: row for row, file in enumerate(index.file_names)}
    rows = []
    for name in (name.strip() for name in names.split(",")):
        row = keys.get(name, files.get(name, int(name) if name.isdecimal() and int(name) < len(index) else None))
        if row is None:
            near = difflib.get_close_matches(name, list(keys), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"give a key, a file name, or a row from 0 to {len(index) - 1}"
            raise DataError(f"--images {name}: {index.path} holds no such image; {hint}")
        rows.append(row)
    return rows
