"""`orl-fast info`: tell what a folder, table, checkpoint or this machine is."""

import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import click

_STACK = ("orl-fast", "torch", "torchvision", "nvidia-dali-cuda130", "webdataset", "numba", "opencv-contrib-python-headless")
_FAISS = ("faiss-gpu", "faiss-cpu")

Lines = list[tuple[str, str]]


@click.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
def command(path: Path | None) -> None:
    """Tell what PATH is: packed photographs, a mined table or all of them, a run or its checkpoint. Without PATH: this machine."""
    lines = _machine() if path is None else _describe(path)
    width = max(len(name) for name, _ in lines) + 2
    for name, text in lines:
        click.echo(f"{name:<{width}}{text}")


def _describe(given: Path) -> Lines:
    from orl_fast.cli.places import MANIFEST, SHARDS_HOME
    from orl_fast.errors import DataError

    path = given if given.exists() else SHARDS_HOME / given
    if not path.exists():
        raise DataError(f"{given}: no such file or folder; give a packed folder, a mined table, or a run folder or its checkpoint.pt")
    path = path.parent if path.name in (MANIFEST, "table.json") else path
    if (path / MANIFEST).is_file():
        return _shards(path)
    if (path / "table.json").is_file():
        return _table(path)
    if any(path.glob("*/table.json")):
        return [line for folder in sorted(path.glob("*/table.json")) for line in _table(folder.parent)]
    if path.is_file() or (path / "checkpoint.pt").is_file():
        return _checkpoint(path / "checkpoint.pt" if path.is_dir() else path)
    raise DataError(f"{given}: neither packed photographs nor a mined table nor a run of orl-fast; orl-fast shard packs a folder of images")


def _shards(path: Path) -> Lines:
    from orl_fast.cli.places import mined_folder
    from orl_fast.files import human_bytes
    from orl_fast.shards import ShardIndex
    from orl_fast.tables import table_info

    index = ShardIndex.open(path)
    manifest, heights, widths = index.manifest, index.heights, index.widths
    tables = [kind for kind in ("neighbors", "rois", "pairs", "patches") if table_info(mined_folder(path) / kind) is not None]
    reencoded = ", ".join(f"{count} {reason}" for reason, count in manifest.reencoded.items()) or "none"
    return [
        ("packed photographs", str(path)),
        ("images", f"{len(index):,} in {index.num_shards} shards, {human_bytes(manifest.num_bytes)}"),
        ("sizes", f"{widths.min()} to {widths.max()} px wide, {heights.min()} to {heights.max()} px high"),
        ("original bytes", f"{manifest.num_original:,}"),
        ("re-encoded", reencoded),
        ("quarantined", str(len(manifest.quarantined))),
        *(("", f"{entry.file_name!r}: {entry.reason}") for entry in manifest.quarantined[:10]),
        *(("source", f"{source.folder}: {source.num_packed:,} images") for source in manifest.sources),
        ("fingerprint", index.fingerprint),
        ("mined", ", ".join(tables) or f"nothing yet; orl-fast mine {path}"),
    ]


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
    from orl_fast.config import config_from_dict
    from orl_fast.models import read_checkpoint

    values = read_checkpoint(path)
    config = config_from_dict(values["config"], where=str(path))
    metrics = path.parent / "metrics.jsonl"
    last: dict[str, Any] = {}
    if metrics.is_file() and (told := metrics.read_text().splitlines()):
        last = json.loads(told[-1])
    progress = f", epoch {last['epoch']:.4g} of {config.train.epochs}, loss {last['loss']:.3f}" if {"epoch", "loss"} <= last.keys() else ""
    views = f"{config.views.image_size_px} px" + (f" and {config.views.patch_size_px} px" if values["method"] == "orl" else "")
    return [
        ("checkpoint", str(path)),
        ("method", values["method"]),
        ("trained", f"{values['step']:,} steps of {config.train.batch_size} images{progress}"),
        ("backbone", f"{config.model.backbone}, views of {views}, compat {config.compat}, seed {config.train.seed}"),
        ("made from", f"index {values['index']}"),
        *(("", f"{name} {found}") for name, found in values["mined"].items()),
        ("versions", ", ".join(f"{name} {version}" for name, version in values["versions"].items())),
        ("recipe", str(path.parent / "recipe.toml") if (path.parent / "recipe.toml").is_file() else "in the checkpoint"),
    ]


def _machine() -> Lines:
    import platform

    import torch

    from orl_fast.files import human_bytes
    from orl_fast.train.distributed import Ranks

    threads = Ranks().num_threads
    disk = shutil.disk_usage(Path.cwd())
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    has_gpu = torch.cuda.is_available()
    renderer = "whichever of CPU and GPU renders faster in a short trial" if has_gpu else f"the CPU, with {threads} threads"
    return [
        ("machine", f"{platform.machine()}, {platform.system()} {platform.release()}, Python {platform.python_version()}"),
        ("cores", f"{threads} for this process, {os.cpu_count()} in all"),
        ("memory", human_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))),
        ("disk", f"{human_bytes(disk.free)} free of {human_bytes(disk.total)} at {Path.cwd()}"),
        *(("GPU", f"{gpu.name}, {human_bytes(gpu.total_memory)}") for gpu in gpus),
        *([] if has_gpu else [("GPU", "none that torch can use")]),
        *((name, _version(name) or "not installed") for name in _STACK),
        ("faiss", next((f"{name} {version}" for name in _FAISS if (version := _version(name))), "not installed")),
        ("DALI decodes", _trial(_decode)),
        ("faiss searches", _trial(_search)),
        ("here, orl-fast", f"trains on {'the GPU in bf16' if has_gpu else 'the CPU'}, views are rendered by {renderer},"),
        ("", f"mines with {threads} processes, neighbors are searched on {'the GPU' if has_gpu else 'the CPU'}"),
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _trial(work: Any) -> str:
    """What a part of the stack says when it is used: whatever it raises is the answer here."""
    try:
        return str(work())
    except Exception as error:
        return f"no: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _decode() -> str:
    import io

    import numpy as np
    from PIL import Image

    from orl_fast.views.cpu import CpuRenderer
    from orl_fast.views.plan import center_crops

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "gray").save(buffer, "JPEG")

    class Source:
        def view(self, _i: int, /) -> np.ndarray[Any, np.dtype[np.uint8]]:
            return np.frombuffer(buffer.getvalue(), np.uint8)

    side = np.array([32], np.int32)
    renderer = CpuRenderer(Source(), num_threads=1)
    try:
        rendered = renderer.render(center_crops(np.zeros(1, np.int64), heights=side, widths=side, resize_px=32, crop_px=32))
    finally:
        renderer.close()
    return "yes" if len(rendered.rows) else "no: a plain JPEG is refused"


def _search() -> str:
    import numpy as np
    import torch

    from orl_fast.mining.neighbors import find_neighbors

    on_gpu = torch.cuda.is_available()
    features = np.eye(8, dtype=np.float32)
    list(find_neighbors(features, num_neighbors=2, use_gpu=on_gpu, num_threads=1))
    return "yes, on the GPU" if on_gpu else "yes, on the CPU"
