"""`orl-fast export`: mined results as the reference's JSON files."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from orl_fast.mining.pipeline import Stage


def stage_for(shards: Path | None, *, annotations: Path | None = None) -> "Stage":
    """The stage of a shard folder, with the settings of its stage-1 checkpoint where there is one."""
    from orl_fast.mining.pipeline import Stage
    from orl_fast.places import default_shards, mined_folder, stage_1_checkpoint
    from orl_fast.recipe import trained_config
    from orl_fast.shards import ShardIndex

    index = ShardIndex.open(default_shards(shards))
    checkpoint = stage_1_checkpoint(index.path)
    config = trained_config(checkpoint)
    return Stage(index=index, folder=mined_folder(index.path), config=config, checkpoint=checkpoint, annotations=annotations)


@click.command()
@click.argument("what", type=click.Choice(["neighbors", "proposals", "pairs"]))
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("shards", type=click.Path(path_type=Path), required=False)
@click.option("--neighbors", type=click.IntRange(min=1), help="Neighbors per image [default: all that were mined].")
@click.option("--pair-ratio", type=click.FloatRange(0, 1, min_open=True), help="Share of RoIs that become pairs [default: as mined].")
@click.option("--annotations", type=click.Path(path_type=Path), help="COCO file that orders proposals [default: the one packed from].")
def command(what: str, file: Path, shards: Path | None, neighbors: int | None, pair_ratio: float | None, annotations: Path | None) -> None:
    """Write WHAT was mined or imported to FILE, in the JSON format of the reference implementation.

    SHARDS is a shard folder [default: the only one below ./shards].
    """
    from orl_fast.mining.reference_json import export_neighbors, export_pairs, export_proposals

    stage = stage_for(shards, annotations=annotations)
    match what:
        case "neighbors":
            export_neighbors(stage, file, num_neighbors=neighbors)
        case "proposals":
            export_proposals(stage, file)
        case _:
            export_pairs(stage, file, num_neighbors=neighbors, pair_ratio=pair_ratio)
    click.echo(f"written: {file}")
