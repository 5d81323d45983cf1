"""`orl-fast mine`: stage 2, all of it or one step."""

import datetime
import difflib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from orl_fast.config import Config
    from orl_fast.mining.parts import Share
    from orl_fast.train.distributed import DeviceChoice, Ranks

STEPS = ("features", "neighbors", "proposals", "rois", "pairs", "patches")


@click.command()
@click.argument("arguments", metavar="[STEP] [SHARDS]", nargs=-1)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Of stage 1 [default: runs/NAME/byol/checkpoint.pt].")
@click.option("--recipe", help="Take the mining settings from a recipe instead of the checkpoint.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override one setting, e.g. mining.max_rois=50; repeatable.")
@click.option("--neighbors", type=click.IntRange(min=1), help="Neighbors per image.")
@click.option("--pair-ratio", type=click.FloatRange(0, 1, min_open=True), help="Share of the RoIs that become pairs.")
@click.option("--compat", type=click.Choice(["official", "paper"]), help="Share of the query's RoIs (official) or of all entries (paper).")
@click.option("--proposals", type=click.Choice(["fast", "opencv", "coco-annotations"]), help="Where boxes come from.")
@click.option("--annotations", type=click.Path(path_type=Path), help="COCO file of ground-truth boxes [default: the one packed from].")
@click.option("--patches", is_flag=True, help="Also pack partner patches, which spare training a second decode.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes and threads [default: one per core].")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--exact-limit", type=click.IntRange(min=1), help="Images up to which neighbors are searched exactly [default: 4 million].")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where the tables go [default: SHARDS/mined].")
def command(
    arguments: tuple[str, ...],
    checkpoint: Path | None,
    recipe: str | None,
    overrides: tuple[str, ...],
    neighbors: int | None,
    pair_ratio: float | None,
    compat: str | None,
    proposals: str | None,
    annotations: Path | None,
    patches: bool,
    workers: int | None,
    device: "DeviceChoice",
    exact_limit: int | None,
    out: Path | None,
) -> None:
    """Find each image's neighbors and corresponding RoIs (stage 2), from a stage-1 checkpoint.

    SHARDS is a packed folder [default: the only one below ./shards]. STEP is one of features, neighbors, proposals, rois, pairs, patches;
    without it, all steps run, and those that are up to date are skipped. A run that was stopped goes on where it stopped. Under torchrun,
    processes share the shards.
    """
    from orl_fast.cli.places import default_checkpoint, default_shards, mined_folder
    from orl_fast.console import log
    from orl_fast.mining.neighbors import EXACT_LIMIT
    from orl_fast.mining.stage import Stage
    from orl_fast.shards import ShardIndex
    from orl_fast.train.distributed import process_group

    step, given = _parse(arguments)
    steps = (step,) if step else STEPS if patches else STEPS[:-1]
    index = ShardIndex.open(default_shards(given))
    checkpoint = checkpoint or default_checkpoint(index.path, "byol")
    named = {"mining.num_neighbors": neighbors, "mining.pair_ratio": pair_ratio, "compat": compat, "mining.proposals": proposals}
    overrides += tuple(f"{key}={value}" for key, value in named.items() if value is not None)
    with process_group(device) as ranks:
        stage = Stage(
            index=index,
            folder=out or mined_folder(index.path),
            config=mining_config(checkpoint, recipe=recipe, overrides=overrides),
            checkpoint=checkpoint,
            annotations=annotations,
            keep_imported=proposals is None,
            device=ranks.device,
            num_workers=workers or ranks.num_threads,
            exact_limit=exact_limit or EXACT_LIMIT,
            share=_share(ranks),
        )
        if not ranks.is_main:
            log.setLevel("WARNING")
        if device == "auto" and ranks.device.type == "cpu":
            log.info("no GPU here: mining on the CPU")
        stage.run(steps)
    if ranks.is_main:
        for line in stage.summary():
            click.echo(line)
        if not step:
            click.echo(f"Next: orl-fast train {index.path}")


def mining_config(checkpoint: Path, *, recipe: str | None = None, overrides: tuple[str, ...] = ()) -> "Config":
    """The recipe's settings; without one, those that the checkpoint was trained with; the defaults where there is none."""
    from orl_fast.config import config_from_dict, load_config, with_overrides
    from orl_fast.models import read_checkpoint

    if recipe is not None or not checkpoint.exists():
        return load_config(recipe, overrides=overrides)
    trained = config_from_dict(read_checkpoint(checkpoint)["config"], where=str(checkpoint))
    return with_overrides(trained, overrides)


def _parse(arguments: tuple[str, ...]) -> tuple[str | None, Path | None]:
    """The step and the shards, either of which may be left out."""
    step = arguments[0] if arguments and arguments[0] in STEPS else None
    rest = arguments[1:] if step else arguments
    near = [] if step or not rest or Path(rest[0]).exists() else difflib.get_close_matches(rest[0], STEPS, n=1)
    if near or len(rest) > 1:
        raise click.UsageError(f"{rest[0]!r} is no step; " + (f"did you mean {near[0]!r}?" if near else f"steps are {', '.join(STEPS)}"))
    return step, Path(rest[0]) if rest else None


def _share(ranks: "Ranks") -> "Share":
    """How these processes wait for each other: for days if need be, as the shards of one may take longer than those of another."""
    import torch.distributed as dist

    from orl_fast.mining.parts import Share

    if ranks.world_size == 1:
        return Share()
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    return Share(rank=ranks.rank, world_size=ranks.world_size, barrier=partial(dist.barrier, group))
