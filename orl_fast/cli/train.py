"""`orl-fast train`: stage 1, stage 3, and the other methods."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, get_args

import click

from orl_fast.config import RendererName


@click.command()
@click.argument("shards", type=click.Path(path_type=Path), required=False)
@click.option("--method", help="byol (stage 1), orl (stage 3) or another method [default: the stage that comes next].")
@click.option("--recipe", help="A shipped recipe or a TOML file [default: that of the run to resume, else the method's].")
@click.option("--epochs", type=click.IntRange(min=1), help="Length of the run; short for --set train.epochs=N.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe; repeatable.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Run folder [default: runs/NAME/METHOD].")
@click.option("--mined", type=click.Path(path_type=Path, file_okay=False), help="Tables of orl-fast mine [default: SHARDS/mined].")
@click.option(
    "--max-steps", type=click.IntRange(min=1), help="Stop, and save, once so many steps are done in all; schedules do not change."
)
@click.option("--restart", is_flag=True, help="Discard the existing run and start from scratch.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--renderer", type=click.Choice(get_args(RendererName)), help="View renderer; short for --set loader.renderer=NAME.")
def command(
    shards: Path | None, method: str | None, recipe: str | None, epochs: int | None, overrides: tuple[str, ...], out: Path | None,
    mined: Path | None, max_steps: int | None, restart: bool, device: Literal["auto", "cpu", "cuda"], renderer: str | None,
) -> None:  # fmt: skip
    """Pre-train on packed images: BYOL (stage 1), then, once pairs are mined, ORL (stage 3).

    SHARDS is a shard folder or its name below shards/; it may be left out where there is only one. Run the same command again to resume a
    run that was stopped. Several GPUs: torchrun --nproc-per-node 8 -m orl_fast train ...
    """
    from orl_fast.checkpoint import CHECKPOINT
    from orl_fast.console import log
    from orl_fast.distributed import process_group
    from orl_fast.places import default_shards
    from orl_fast.shards import ShardIndex
    from orl_fast.spin import spinning_while_idle
    from orl_fast.train.loop import train
    from orl_fast.train.run import choose_run

    named = {"train.epochs": epochs, "loader.renderer": renderer}
    overrides = (*(f"{key}={value}" for key, value in named.items() if value is not None), *overrides)
    with process_group(device) as ranks:
        announce = log.info if ranks.is_main else log.debug
        index = ShardIndex.open(default_shards(shards))
        run = choose_run(
            index, method=method, recipe=recipe, overrides=overrides, folder=out, mined=mined, restart=restart, announce=announce
        )
        if ranks.device.type == "cpu" and device == "auto":
            announce("no GPU here: training on the CPU")
        with spinning_while_idle() if ranks.device.type == "cpu" else nullcontext():
            outcome = train(run, index=index, ranks=ranks, restart=restart, max_steps=max_steps)
    code, checkpoint = 128 + outcome.signum if outcome.signum else 0, run.folder / CHECKPOINT
    if not ranks.is_main:
        sys.exit(code)
    if outcome.step < outcome.num_steps:
        click.echo(f"Stopped after step {outcome.step} of {outcome.num_steps}, saved in {run.folder}; run the same command to resume.")
        sys.exit(code)
    already = "was already finished" if outcome.first_step == outcome.num_steps else "is finished"
    following = f"orl-fast eval probe {checkpoint} FOLDER" if run.mined else f"orl-fast mine {index.path}"
    click.echo(f"{run.method} {already}: {outcome.num_steps} steps, {checkpoint}. Next: {following}")
