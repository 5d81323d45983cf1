"""`orl-fast mine`: stage 2, all of it or one step."""

import difflib
from pathlib import Path
from typing import Literal

import click

STEPS = ("features", "neighbors", "proposals", "rois", "pairs", "patches")


@click.command()
@click.argument("arguments", metavar="[STEP] [SHARDS]", nargs=-1)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Of stage 1 [default: that of runs/NAME/byol, or of another method].")
@click.option("--recipe", help="Take the mining settings from a recipe instead of the checkpoint.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override one setting, e.g. mining.max_rois=50; repeatable.")
@click.option("--neighbors", type=click.IntRange(min=1), help="Neighbors per image.")
@click.option("--pair-ratio", type=click.FloatRange(0, 1, min_open=True), help="Share of the RoIs that become pairs.")
@click.option(
    "--variant", "--compat", type=click.Choice(["official", "paper"]), help="Pairs: a share of the query's RoIs, or of all entries."
)
@click.option("--proposals", type=click.Choice(["fast", "opencv", "coco-annotations"]), help="Where boxes come from.")
@click.option("--annotations", type=click.Path(path_type=Path), help="COCO file of ground-truth boxes [default: the one packed from].")
@click.option("--patches", is_flag=True, help="Also pack partner patches, which saves a second decode during training.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes and threads of each rank [default: one per core].")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--exact-limit", type=click.IntRange(min=1), help="Images up to which neighbors are searched exactly [default: 4 million].")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where the tables go [default: SHARDS/mined].")
def command(
    arguments: tuple[str, ...], checkpoint: Path | None, recipe: str | None, overrides: tuple[str, ...], neighbors: int | None,
    pair_ratio: float | None, variant: str | None, proposals: str | None, annotations: Path | None, patches: bool, workers: int | None,
    device: Literal["auto", "cpu", "cuda"], exact_limit: int | None, out: Path | None,
) -> None:  # fmt: skip
    """Find each image's neighbors and corresponding RoIs (stage 2), from a stage-1 checkpoint.

    SHARDS is a shard folder [default: the only one below ./shards]. STEP is one of features, neighbors, proposals, rois, pairs, patches;
    without it, all steps run, and those that are up to date are skipped. An interrupted run resumes where it stopped. Tables of other
    settings are kept in mined/KIND@FINGERPRINT. Under torchrun, processes share the shards.
    """
    from orl_fast.console import log
    from orl_fast.distributed import process_group
    from orl_fast.mining.executor import EXECUTORS
    from orl_fast.mining.neighbors import EXACT_LIMIT
    from orl_fast.mining.pipeline import Stage
    from orl_fast.places import default_shards, mined_folder, stage_1_checkpoint
    from orl_fast.recipe import trained_config
    from orl_fast.shards import ShardIndex

    step, given = _parse(arguments)
    steps = (step,) if step else STEPS if patches else STEPS[:-1]
    index = ShardIndex.open(default_shards(given))
    checkpoint = checkpoint or stage_1_checkpoint(index.path)
    named = {"mining.num_neighbors": neighbors, "mining.pair_ratio": pair_ratio, "variant": variant, "mining.proposals": proposals}
    overrides += tuple(f"{key}={value}" for key, value in named.items() if value is not None)
    with process_group(device) as ranks:
        if not ranks.is_main:
            log.setLevel("WARNING")
        executor = EXECUTORS["torchrun" if ranks.world_size > 1 else "processes"]
        stage = Stage(
            index=index,
            folder=out or mined_folder(index.path),
            config=trained_config(checkpoint, recipe=recipe, overrides=overrides),
            checkpoint=checkpoint,
            annotations=annotations,
            keep_imported=proposals is None,
            exact_limit=exact_limit or EXACT_LIMIT,
            executor=executor(device=ranks.device, num_workers=workers or ranks.num_threads),
        )
        if device == "auto" and ranks.device.type == "cpu":
            log.info("no GPU found: mining on the CPU")
        stage.run(steps)
    if ranks.is_main:
        for line in stage.summary():
            click.echo(line)
        if not step:
            click.echo(f"Next: orl-fast train {index.path}")


def _parse(arguments: tuple[str, ...]) -> tuple[str | None, Path | None]:
    """The step and the shards, either of which may be left out."""
    step = arguments[0] if arguments and arguments[0] in STEPS else None
    rest = arguments[1:] if step else arguments
    near = [] if step or not rest or Path(rest[0]).exists() else difflib.get_close_matches(rest[0], STEPS, n=1)
    if near or len(rest) > 1:
        raise click.UsageError(f"{rest[0]!r} is not a step; " + (f"did you mean {near[0]!r}?" if near else f"steps are {', '.join(STEPS)}"))
    return step, Path(rest[0]) if rest else None
