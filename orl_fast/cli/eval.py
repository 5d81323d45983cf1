"""`orl-fast eval`: score a backbone."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from orl_fast.evals import LabelledFeatures
    from orl_fast.train.distributed import DeviceChoice

_NAMES = {"top1": "top-1", "mean_class_accuracy": "mean per class", "chance": "chance"}


@click.command()
@click.argument("kind", type=click.Choice(["probe", "knn"]))
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path), required=False)
@click.option("--annotations", type=click.Path(path_type=Path), help="COCO-style annotation file: its boxes are the objects.")
@click.option("--images", type=click.Path(path_type=Path), help="Where that file's images lie.")
@click.option("--test", type=click.Path(path_type=Path), help="Test data like DATA [default: a part of DATA is held out].")
@click.option("--test-images", type=click.Path(path_type=Path), help="Where the images of a test annotation file lie.")
@click.option("--held-out", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.3, show_default=True, help="That part.")
@click.option("--random-init", is_flag=True, help="Also score the same backbone untrained.")
@click.option("--size", "size_px", type=click.IntRange(min=8), help="Side of the encoded views, px [default: as in mining].")
@click.option("--cost", type=click.FloatRange(0, min_open=True), help="probe: scikit-learn's C [default: chosen by validation].")
@click.option("--neighbors", type=click.IntRange(min=1), default=20, show_default=True, help="knn: how many vote.")
@click.option("--temperature", type=click.FloatRange(0, min_open=True), default=0.07, show_default=True, help="knn: of the votes.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the held-out part and the validation.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads that read and render [default: one per core].")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Also write the values to this file.")
def command(
    kind: str,
    checkpoint: Path,
    data: Path | None,
    annotations: Path | None,
    images: Path | None,
    test: Path | None,
    test_images: Path | None,
    held_out: float,
    random_init: bool,
    size_px: int | None,
    cost: float | None,
    neighbors: int,
    temperature: float,
    seed: int,
    workers: int | None,
    device: "DeviceChoice",
    json_file: Path | None,
) -> None:
    """Score the frozen backbone of CHECKPOINT (checkpoint.pt or its run folder) on labelled DATA.

    \b
    probe   logistic regression on standardized features
    knn     weighted nearest neighbors by cosine similarity

    DATA is a folder with one subfolder of images per class, or a COCO folder or annotation file, whose ground-truth boxes are cut out and
    labelled by category. Parts are held out by image, so that no image is learnt from and tested on. Unreadable images are skipped.
    """
    source = data or annotations
    if source is None or (data is not None and annotations is not None):
        raise click.UsageError("give either DATA or --annotations FILE")
    from orl_fast.evals import encode_labelled, knn, linear_probe, open_labelled, split_by_image, with_test
    from orl_fast.files import write_json
    from orl_fast.models import load_encoder
    from orl_fast.models.encoder import random_encoder
    from orl_fast.train.distributed import process_group

    encoder = load_encoder(checkpoint)
    objects = open_labelled(source, images=images)
    if test:
        labelled = with_test(objects, open_labelled(test, images=test_images))
    else:
        labelled = split_by_image(objects, held_out=held_out, seed=seed)

    def score(features: "LabelledFeatures") -> dict[str, float]:
        if kind == "knn":
            return knn(features.train, features.test, num_neighbors=neighbors, temperature=temperature)
        return linear_probe(features.train, features.test, cost=cost, seed=seed)

    encoders = {str(checkpoint): encoder} | ({"random initialization": random_encoder(encoder.config)} if random_init else {})
    with process_group(device) as ranks:
        found = {}
        for name, one in encoders.items():
            threads = workers or ranks.num_threads
            found[name] = score(encode_labelled(one, labelled, size_px=size_px, device=ranks.device, num_threads=threads))
    if json_file:
        write_json(json_file, {"eval": kind, "data": str(source), "test": str(test) if test else None, "seed": seed, "results": found})
    _show(kind, found)


def _show(kind: str, found: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Linear probe" if kind == "probe" else "Nearest neighbors", title_justify="left")
    table.add_column("backbone", overflow="fold")
    for heading in _NAMES.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, values in found.items():
        table.add_row(name, *(f"{100 * values[key]:.1f} %" for key in _NAMES))
    console = Console(highlight=False)
    console.print(table)
    first = next(iter(found.values()))
    settings = f"C = {first['cost']:g}" if kind == "probe" else f"k = {first['num_neighbors']:g}, temperature {first['temperature']:g}"
    console.print(
        f"{first['num_train']:g} objects learnt from, {first['num_test']:g} tested, {first['num_classes']:g} classes; "
        f"{first['num_skipped']:g} unreadable images skipped; {settings}. Chance: always the most frequent class.",
        soft_wrap=True,
    )
