"""`orl-fast export`: mined results as the reference's JSON files."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from orl_fast.mining.stage import Stage


def stage_for(shards: Path | None, *, overrides: tuple[str, ...] = (), annotations: Path | None = None) -> "Stage":
    """The stage of a packed folder, with the settings of its stage-1 checkpoint where there is one."""
    from orl_fast.cli.mine import mining_config
    from orl_fast.cli.places import default_checkpoint, default_shards, mined_folder
    from orl_fast.mining.stage import Stage
    from orl_fast.shards import ShardIndex

    index = ShardIndex.open(default_shards(shards))
    checkpoint = default_checkpoint(index.path, "byol")
    config = mining_config(checkpoint, overrides=overrides)
    return Stage(index=index, folder=mined_folder(index.path), config=config, checkpoint=checkpoint, annotations=annotations)


@click.command()
@click.argument("what", type=click.Choice(["neighbors", "proposals", "pairs"]))
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("shards", type=click.Path(path_type=Path), required=False)
@click.option("--neighbors", type=click.IntRange(min=1), help="Neighbors per image [default: as configured].")
@click.option("--pair-ratio", type=click.FloatRange(0, 1, min_open=True), help="Share of RoIs that become pairs [default: as configured].")
@click.option("--annotations", type=click.Path(path_type=Path), help="COCO file that orders proposals [default: the one packed from].")
def command(what: str, file: Path, shards: Path | None, neighbors: int | None, pair_ratio: float | None, annotations: Path | None) -> None:
    """Write WHAT was mined to FILE, in the JSON format of the reference implementation.

    SHARDS is a packed folder [default: the only one below ./shards].
    """
    from orl_fast.mining.reference_json import export_neighbors, export_pairs, export_proposals

    named = {"mining.num_neighbors": neighbors, "mining.pair_ratio": pair_ratio}
    overrides = tuple(f"{key}={value}" for key, value in named.items() if value is not None)
    stage = stage_for(shards, overrides=overrides, annotations=annotations)
    {"neighbors": export_neighbors, "proposals": export_proposals, "pairs": export_pairs}[what](stage, file)
    click.echo(f"written: {file}")
