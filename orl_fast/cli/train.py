"""`orl-fast train`: stage 1 and stage 3."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orl_fast.cli.places import default_shards, mined_folder, run_folder
from orl_fast.config import RENDERERS, load_config

if TYPE_CHECKING:
    from orl_fast.train.distributed import DeviceChoice

DEFAULT_RECIPE = "coco-r50"
CHECKPOINT, RECIPE = "checkpoint.pt", "recipe.toml"


@click.command()
@click.argument("shards", type=click.Path(path_type=Path), required=False)
@click.option("--method", type=click.Choice(["byol", "orl"]), help="Stage 1 or stage 3 [default: the stage that comes next].")
@click.option("--recipe", help="A shipped recipe or a TOML file [default: that of the run at hand, else coco-r50].")
@click.option("--epochs", type=click.IntRange(min=1), help="Length of the run; short for --set train.epochs=N.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe; repeatable.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Run folder [default: runs/NAME/METHOD].")
@click.option("--mined", type=click.Path(path_type=Path, file_okay=False), help="Tables of orl-fast mine [default: SHARDS/mined].")
@click.option(
    "--max-steps", type=click.IntRange(min=1), help="Stop, and save, once so many steps are done in all; schedules do not change."
)
@click.option("--restart", is_flag=True, help="Forget the run folder's earlier run instead of going on with it.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--renderer", type=click.Choice(RENDERERS), help="Who renders the views; short for --set loader.renderer=NAME.")
def command(
    shards: Path | None,
    method: str | None,
    recipe: str | None,
    epochs: int | None,
    overrides: tuple[str, ...],
    out: Path | None,
    mined: Path | None,
    max_steps: int | None,
    restart: bool,
    device: "DeviceChoice",
    renderer: str | None,
) -> None:
    """Pre-train on packed photographs: BYOL (stage 1), then, once pairs are mined, ORL (stage 3).

    SHARDS is a packed folder or its name below shards/; it may be left out where there is only one. A run that was stopped goes on when the
    same command is given again. Several GPUs: torchrun --nproc-per-node 8 -m orl_fast.cli.main train ...
    """
    from orl_fast.console import log
    from orl_fast.shards import ShardIndex
    from orl_fast.train.distributed import process_group
    from orl_fast.train.loop import train
    from orl_fast.train.stage import mined_overrides, next_method, open_mined, warn_if_mined_elsewhere

    shards = default_shards(shards)
    mined = mined or mined_folder(shards)
    extra = [f"train.epochs={epochs}"] if epochs else []
    extra += [f"loader.renderer={renderer}"] if renderer else []
    with process_group(device) as ranks:
        say = log.info if ranks.is_main else log.debug
        index = ShardIndex.open(shards)
        if method is None:
            method, reason = next_method(index, mined)
            say("%s: %s", "stage 1, BYOL" if method == "byol" else "stage 3, ORL", reason)
            if method == "orl" and ranks.is_main:
                warn_if_mined_elsewhere(mined, run_folder(shards, "byol") / CHECKPOINT)
        folder = out or run_folder(shards, method)
        if recipe is None:
            recipe = _earlier_recipe(method, folder, shards, restart=restart)
            extra = [*(mined_overrides(mined) if method == "orl" else ()), *extra]
        say("recipe: %s%s", recipe, f", with {', '.join([*extra, *overrides])}" if extra or overrides else "")
        config = load_config(recipe, overrides=[*extra, *overrides])
        tables = open_mined(index, mined, config) if method == "orl" else None
        if ranks.device.type == "cpu" and device == "auto":
            say("no GPU here: training on the CPU")
        outcome = train(method, config, index=index, folder=folder, mined=tables, ranks=ranks, restart=restart, max_steps=max_steps)
    if not ranks.is_main:
        sys.exit(128 + outcome.signum if outcome.signum else 0)
    if outcome.step < outcome.num_steps:
        click.echo(f"Stopped after step {outcome.step} of {outcome.num_steps}, saved in {folder}; run the same command again to go on.")
        sys.exit(128 + outcome.signum if outcome.signum else 0)
    already = "was finished before" if outcome.first_step == outcome.num_steps else "is finished"
    following = f"orl-fast mine {shards}" if method == "byol" else f"orl-fast eval probe {folder / CHECKPOINT} FOLDER"
    click.echo(f"{method} {already}: {outcome.num_steps} steps, {folder / CHECKPOINT}. Next: {following}")


def _earlier_recipe(method: str, folder: Path, shards: Path, *, restart: bool) -> str:
    """What a run without --recipe goes by: the run that it goes on with; for stage 3, stage 1; else the paper."""
    going_on = folder / RECIPE if (folder / CHECKPOINT).is_file() and not restart else None
    stage_1 = run_folder(shards, "byol") / RECIPE if method == "orl" else None
    return next((str(path) for path in (going_on, stage_1) if path is not None and path.is_file()), DEFAULT_RECIPE)
