"""Backbones as files that other toolkits load, each read back and compared before it gets its name."""

import importlib
import io
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
import torchvision
from torch import Tensor

from orl_fast import __version__
from orl_fast.console import log
from orl_fast.errors import ConfigError, DataError
from orl_fast.files import atomic_file
from orl_fast.models.backbone import SMALL_RESNET, TIMM, TimmBackbone, resnet_skeletons, trunk
from orl_fast.models.encoder import Encoder
from orl_fast.models.foreign import ARCHITECTURE, detectron2_name, load_foreign
from orl_fast.models.onnx_model import OnnxModel
from orl_fast.views.normalize import MEAN, STD

State = dict[str, Tensor]

_AUTHOR = "orl-fast"
_TIMM_NAMES = {"mobilenet_v2": "mobilenetv2_100", "mnasnet1_0": "mnasnet_100"}  # where timm's name of torchvision's model is another
_ROUNDING = 1e-5  # of the largest feature, where a toolkit's layers are computed in another order
_OTHERWISE = "export to another toolkit, safetensors or onnx"
_HEADS = ("fc.", "classifier.", "head.", "heads.")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written. `checked`: how it was compared; `loading`: the lines of Python that load it."""

    num_bytes: int
    checked: str
    loading: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Content:
    data: bytes
    check: Callable[[Path], str]  # of the file; says how it was compared
    loading: tuple[str, ...]


def export_backbone(encoder: Encoder, target: str, out: Path, *, source: str, size_px: int = 224) -> Exported:
    """Write the backbone of an encoder for another toolkit, one of `TARGETS`, and compare what its file gives (docs/export.md).

    Args:
        source: where it comes from, for the file's metadata. size_px: of ONNX's images, where the backbone does not take any size.
    Raises:
        ConfigError: the toolkit has no such backbone, or a package is missing. DataError: `out` cannot be written, or its content does not
            give the same features; then there is no file.
    """
    content = TARGETS[target](encoder, out, source, size_px)
    with atomic_file(out) as file:
        file.write(content.data)
        file.flush()
        checked = content.check(Path(file.name)) if Path(file.name).is_file() else "not read back, since it is not a regular file"
    return Exported(num_bytes=len(content.data), checked=checked, loading=content.loading)


def _to_torchvision(encoder: Encoder, out: Path, source: str, size_px: int) -> _Content:
    name = encoder.name.removeprefix(TIMM)
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ConfigError(f"torchvision has no {encoder.name}; export it to safetensors or onnx")
    state, options = _state(encoder), {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **({**options, "init_weights": True} if options else {})).eval()
    theirs = model.state_dict()
    missing = [key for key in theirs if key not in state]
    if state.keys() - theirs.keys() or any(not key.startswith(_HEADS) for key in missing):
        raise ConfigError(f"torchvision's {name} has other weights than {encoder.name}; export it to safetensors or onnx")

    def check(path: Path) -> str:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=False)
        images = _images(299 if name == "inception_v3" else 224)
        with torch.no_grad():
            same = _compared(_torchvision_map(model, images), encoder.backbone(images), "torchvision")
        return f"loaded by torchvision {torchvision.__version__}: {same}"

    settings = "".join(f"{key}={value}" for key, value in options.items())
    loading = [
        f"model = torchvision.models.{name}({settings})",
        f'model.load_state_dict(torch.load("{out}", weights_only=True), strict=False)  # all but {", ".join(missing)}',
    ]
    if isinstance(model, torchvision.models.ResNet):
        loading.append(f"model.fc = torch.nn.Identity()  # images [B, 3, H, W] → features [B, {encoder.num_features}]")
    return _Content(data=_saved(state), check=check, loading=tuple(loading))


def _to_timm(encoder: Encoder, out: Path, source: str, size_px: int) -> _Content:
    timm = _required("timm", "timm")
    name = encoder.name.removeprefix(TIMM)
    name = name if encoder.name.startswith(TIMM) else _TIMM_NAMES.get(name, name)
    if name not in timm.list_models():
        raise ConfigError(f"timm has no {encoder.name}; export it to torchvision, safetensors or onnx")
    model, state = timm.create_model(name, pretrained=False, num_classes=0).eval(), _state(encoder)
    theirs = model.state_dict()
    same_order = [value.shape for value in theirs.values()] == [value.shape for value in state.values()]
    if theirs.keys() != state.keys() and not same_order:
        raise ConfigError(
            f"timm's {name} has other weights than torchvision's; export {encoder.name} to torchvision, safetensors or onnx, or train with "
            f"--set model.backbone={TIMM}{name}"
        )
    if is_renamed := theirs.keys() != state.keys():  # the same layers under other names; if it is the same network, the check below says
        state = dict(zip(theirs, state.values(), strict=True))

    def check(path: Path) -> str:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        images = _images(int(model.default_cfg["input_size"][1]))
        backbone = encoder.backbone
        with torch.no_grad():
            own = backbone.trunk.forward_features(images) if isinstance(backbone, TimmBackbone) else backbone(images)
            same = _compared(model.forward_features(images), own, "timm", exactly=is_renamed)
        return f"loaded by timm {timm.__version__}: {same}"

    loading = (
        f'model = timm.create_model("{name}", num_classes=0)',
        f'model.load_state_dict(torch.load("{out}", weights_only=True))',
        "features = model.eval().forward_features(images)  # before timm's pooling",
    )
    return _Content(data=_saved(state), check=check, loading=loading)


def _to_detectron2(encoder: Encoder, out: Path, source: str, size_px: int) -> _Content:
    state = _resnet_state(encoder, "Detectron2")
    weights = {detectron2_name(name): value.numpy() for name, value in state.items()}
    data = pickle.dumps({"model": weights, "__author__": _AUTHOR, "matching_heuristics": True}, protocol=4)
    if out.suffix != ".pkl":
        log.warning("%s: Detectron2 reads a file of this form only if its name ends with .pkl", out)
    depth = re.match(r"(?:wide_)?resnex?t(\d+)", encoder.name.removeprefix(TIMM))
    basic = "; cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64" if depth and int(depth[1]) < 50 else ""
    loading = (
        f'cfg.MODEL.WEIGHTS, cfg.INPUT.FORMAT = "{out}", "RGB"',
        f"cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = {depth[1] if depth else '…'}, False{basic}",
        f"cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = {_in_bytes(MEAN)}, {_in_bytes(STD)}",
    )
    return _Content(
        data=data,
        check=lambda path: _read_back(path, encoder, encoder.name.removeprefix(TIMM)) + _not_run("Detectron2", encoder),
        loading=loading,
    )


def _to_mmdet(encoder: Encoder, out: Path, source: str, size_px: int) -> _Content:
    kind = "ResNeXt" if "resnext" in encoder.name else "ResNet"
    state = {f"backbone.{name}": value for name, value in _resnet_state(encoder, "MMDetection").items()}
    loading = (
        f'init_cfg = dict(type="Pretrained", checkpoint="{out}", prefix="backbone.")',
        f'backbone = dict(type="{kind}", style="pytorch", init_cfg=init_cfg, …)  # depth and the rest as in your configuration',
        f"data_preprocessor = dict(mean={_in_bytes(MEAN)}, std={_in_bytes(STD)}, bgr_to_rgb=True, …)",
    )
    content = {"meta": {"author": _AUTHOR, "source": source}, "state_dict": state}
    return _Content(
        data=_saved(content),
        check=lambda path: _read_back(path, encoder, encoder.name.removeprefix(TIMM)) + _not_run("MMDetection", encoder),
        loading=loading,
    )


def _to_safetensors(encoder: Encoder, out: Path, source: str, size_px: int) -> _Content:
    metadata = {"format": "pt", ARCHITECTURE: encoder.name, "source": source, "orl-fast": __version__}
    data = safetensors.torch.save({name: value.contiguous() for name, value in _state(encoder).items()}, metadata=metadata)
    model = f"torchvision.models.{encoder.name}()"
    if encoder.name.startswith(TIMM):
        model = f'timm.create_model("{encoder.name.removeprefix(TIMM)}", num_classes=0)'
    elif encoder.name == SMALL_RESNET:
        model = f'orl_fast.models.build_backbone("{encoder.name}")'
    loading = (
        f"model = {model}",
        f'state = safetensors.torch.load_file("{out}")',
        "model.load_state_dict(state, strict=False)  # all but a classifier",
    )
    return _Content(data=data, check=lambda path: _read_back(path, encoder, None), loading=loading)


def _to_onnx(encoder: Encoder, out: Path, source: str, size_px: int) -> _Content:
    model = OnnxModel.export(encoder, source=source, size_px=size_px)
    loading = (
        f'session = onnxruntime.InferenceSession("{out}")',
        f"images = ((pixels / 255 - {list(MEAN)}) / {list(STD)}).transpose(0, 3, 1, 2)  # RGB [B, {model.size}, 3] → [B, 3, {model.size}]",
        'features, feature_map = session.run(None, {"images": images.astype(np.float32)})',
    )
    return _Content(data=model.data, check=lambda path: replace(model, data=path.read_bytes()).check(), loading=loading)


# Functions that make a file's content, by toolkit.
TARGETS: Mapping[str, Callable[[Encoder, Path, str, int], _Content]] = {
    "torchvision": _to_torchvision,
    "timm": _to_timm,
    "detectron2": _to_detectron2,
    "mmdet": _to_mmdet,
    "safetensors": _to_safetensors,
    "onnx": _to_onnx,
}


def _state(encoder: Encoder) -> State:
    """The weights by the names that torchvision or timm gives them."""
    return {name.removeprefix("trunk."): value for name, value in encoder.backbone.state_dict().items()}


def _resnet_state(encoder: Encoder, toolkit: str) -> State:
    name = encoder.name.removeprefix(TIMM)
    if name not in dict(resnet_skeletons()):
        raise ConfigError(
            f"{toolkit} gets torchvision's ResNets, not {encoder.name}, whose names it has otherwise; export to safetensors or onnx"
        )
    return _state(encoder)


def _saved(content: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _read_back(path: Path, encoder: Encoder, name: str | None) -> str:
    """Compare with what `orl-fast eval` would load."""
    found, expected = _state(load_foreign(path, backbone=name, verbose=False).encoder), _state(encoder)
    if found.keys() != expected.keys() or not all(torch.equal(found[key], value) for key, value in expected.items()):
        raise DataError(f"{path}: does not give back the weights that were written; the disk or the memory may be faulty")
    return "read back: the same weights, bit for bit"


def _not_run(toolkit: str, encoder: Encoder) -> str:
    return f"; {toolkit} itself builds no {encoder.name}" if encoder.name == SMALL_RESNET else f"; {toolkit} itself was not run"


def _compared(found: Tensor, expected: Tensor, toolkit: str, *, exactly: bool = False) -> str:
    """How equal features are; DataError if they differ, or, `exactly`, by rounding too."""
    if torch.equal(found, expected):
        return "the same features, bit for bit"
    if found.shape != expected.shape:
        raise DataError(f"{toolkit}'s network gives features of another shape: not exported; {_OTHERWISE}")
    gap = float((found - expected).abs().max() / expected.abs().max())
    if exactly or not gap <= _ROUNDING:
        raise DataError(f"{toolkit}'s network gives other features (they differ by {gap:.2g} of the largest): not exported; {_OTHERWISE}")
    return f"the same features up to rounding ({gap:.1g} of the largest)"


def _images(size_px: int) -> Tensor:
    return torch.randn(2, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))


def _torchvision_map(model: Any, images: Tensor) -> Tensor:
    """What its own forward feeds its pooling; where that is no module, the chain of its children."""
    seen: list[Tensor] = []
    with torch.no_grad():
        if not hasattr(model, "avgpool"):
            return cast(Tensor, trunk(model)(images))
        hook = model.avgpool.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].clone()))
        model(images)
        hook.remove()
    return seen[0]


def _required(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{module} is not installed; pip install 'orl-fast[{extra}]'") from error


def _in_bytes(values: Sequence[float]) -> list[float]:
    return [round(255 * value, 3) for value in values]
