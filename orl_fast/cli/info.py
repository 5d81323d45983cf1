"""`orl-fast info`: show information about a dataset, table, checkpoint or this machine."""

import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

_STACK = (
    "orl-fast", "torch", "torchvision", "nvidia-dali-cuda130", "webdataset", "numba", "opencv-contrib-python-headless", "faiss-gpu", "timm",
)  # fmt: skip

if TYPE_CHECKING:
    from orl_fast.shards import ShardIndex

Lines = list[tuple[str, str]]


@click.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
def command(path: Path | None) -> None:
    """Show information about PATH: a dataset, a mined table or all of them, a run or its checkpoint. Without PATH: this machine."""
    lines = _machine() if path is None else _describe(path)
    width = max(len(name) for name, _ in lines) + 2
    for name, text in lines:
        click.echo(f"{name:<{width}}{text}")


def _describe(given: Path) -> Lines:
    from orl_fast.checkpoint import checkpoint_path
    from orl_fast.errors import DataError
    from orl_fast.places import SHARDS_HOME
    from orl_fast.shards.index import MANIFEST_NAME

    path = given if given.exists() else SHARDS_HOME / given
    path = path.parent if path.name in (MANIFEST_NAME, "table.json") else path
    if (path / MANIFEST_NAME).is_file():
        return _shards(path)
    if tables := sorted(path.glob("table.json")) or sorted(path.glob("*/table.json")):
        return [line for table in tables for line in _table(table.parent)]
    if checkpoint_path(path).is_file():
        return _checkpoint(checkpoint_path(path))
    raise DataError(f"{given}: not a dataset, a mined table, or a run or checkpoint of orl-fast; give one of these")


def _shards(path: Path) -> Lines:
    from orl_fast.files import human_bytes
    from orl_fast.places import mined_folder
    from orl_fast.shards import ShardIndex
    from orl_fast.tables import table_info

    index = ShardIndex.open(path)
    manifest, heights, widths = index.manifest, index.heights, index.widths
    tables = [kind for kind in ("neighbors", "rois", "pairs", "patches") if table_info(mined_folder(path) / kind) is not None]
    reencoded = ", ".join(f"{count} {reason}" for reason, count in manifest.reencoded.items()) or "none"
    return [
        ("dataset", str(path)),
        ("images", f"{len(index):,} in {index.num_shards} shards, {human_bytes(manifest.num_bytes)}"),
        ("sizes", f"{widths.min()} to {widths.max()} px wide, {heights.min()} to {heights.max()} px high"),
        ("original bytes", f"{manifest.num_original:,}"),
        ("re-encoded", reencoded),
        ("quarantined", str(len(manifest.quarantined))),
        *(("", f"{entry.file_name!r}: {entry.reason}") for entry in manifest.quarantined[:10]),
        *(("source", f"{source.folder}: {source.num_packed:,} images") for source in manifest.sources),
        ("fingerprint", index.fingerprint),
        ("pixels", _pixels(index)),
        ("mined", ", ".join(tables) or f"nothing yet; orl-fast mine {path}"),
    ]


def _pixels(index: "ShardIndex") -> str:
    from orl_fast.files import human_bytes
    from orl_fast.shards.pixels import PixelStore

    store = PixelStore.find(index)
    if store is None:
        return f"not stored; orl-fast pixels {index.path}"
    info = store.info
    smaller = f", sides of at most {info.max_side} px" if info.max_side else ""
    share = f"{info.num_stored:,} of {info.num_images:,} images ({info.num_stored / info.num_images:.0%})"
    return f"{share}, {human_bytes(info.num_bytes)} in {store.folder}{smaller}"


def _table(path: Path) -> Lines:
    import numpy as np

    from orl_fast.tables import open_array, table_info

    info = table_info(path)
    assert info is not None  # its table.json was seen
    lines = [("table", f"{info.kind} ({path})")]
    for file in sorted(path.glob("*.npy")):
        array = open_array(path, file.stem)
        lines.append(("", f"{file.name}: {' × '.join(f'{side:,}' for side in array.shape)} {array.dtype}"))
    if (path / "offsets.npy").is_file():
        counts = np.diff(open_array(path, "offsets"))
        lines.append(("per image", f"{counts.mean():.1f} on average, {counts.min()} to {counts.max()}"))
    lines += [("made from", f"{name} {found}") for name, found in info.made_from.items()]
    lines += [("settings", ", ".join(f"{key} = {value}" for key, value in info.settings.items()) or "none")]
    return [*lines, ("fingerprint", info.fingerprint)]


def _checkpoint(path: Path) -> Lines:
    from orl_fast.checkpoint import read_header

    values = read_header(path)
    config, metrics = values["config"], path.parent / "metrics.jsonl"
    records = metrics.read_text().splitlines() if metrics.is_file() else []
    last: dict[str, Any] = json.loads(records[-1]) if records else {}
    has_loss = {"epoch", "loss"} <= last.keys()
    loss = f", epoch {last['epoch']:.4g} of {config['train']['epochs']}, loss {last['loss']:.3f}" if has_loss else ""
    return [
        ("checkpoint", str(path)),
        ("method", values["method"]),
        ("trained", f"{values['step']:,} of {values['num_steps']:,} steps of {config['train']['batch_size']} images{loss}"),
        ("backbone", f"{values['encoder']['backbone']}, projector {' → '.join(map(str, values['encoder']['projector']['widths']))}"),
        ("views", f"{config['views']['image_size_px']} px, variant {config['variant']}, rendered by {values['renderer']}"),
        ("made from", f"index {values['index']}"),
        *(("", f"{name} {found}") for name, found in values["mined"].items()),
        ("seed", str(config["train"]["seed"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in values["versions"].items())),
        ("recipe", str(path.parent / "recipe.toml") if (path.parent / "recipe.toml").is_file() else "in the checkpoint"),
    ]


def _machine() -> Lines:
    import platform

    import torch

    from orl_fast.cores import num_cores
    from orl_fast.files import human_bytes

    cores, disk = num_cores(), shutil.disk_usage(Path.cwd())
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    renderer = "the faster of CPU and GPU, measured when a run starts" if gpus else f"the CPU, {cores} threads"
    return [
        ("machine", f"{platform.machine()}, {platform.system()} {platform.release()}, Python {platform.python_version()}"),
        ("cores", f"{cores} for this process, {os.cpu_count()} in all"),
        ("memory", human_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))),
        ("disk", f"{human_bytes(disk.free)} free of {human_bytes(disk.total)} at {Path.cwd()}"),
        *(("GPU", f"{gpu.name}, {human_bytes(gpu.total_memory)}") for gpu in gpus),
        *([] if gpus else [("GPU", "none that torch can use")]),
        *((name, _version(name)) for name in _STACK),
        ("training", "on the GPU in bf16" if gpus else "on the CPU"),
        ("rendering", renderer),
        ("mining", f"{cores} processes, neighbors on the {'GPU' if gpus else 'CPU'}"),
    ]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
