"""Backbones as ONNX models, run by ONNX Runtime for comparison."""

import importlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orl_fast.errors import ConfigError, DataError
from orl_fast.models.backbone import Backbone
from orl_fast.models.encoder import Encoder
from orl_fast.models.heads import pool
from orl_fast.views.normalize import MEAN, STD

_OPSET = 18
_TOLERANCE = 1e-4  # of the largest feature: other kernels sum in another order


@dataclass(frozen=True, kw_only=True)
class OnnxModel:
    """An ONNX file: "images" [B, 3, H, W], normalized floats, RGB → "features" [B, C], average-pooled, and "feature_map" [B, C, h, w]."""

    data: bytes
    features: nn.Module
    size_px: int
    is_free: bool  # whether it takes images of any size

    @classmethod
    def export(cls, encoder: Encoder, *, source: str, size_px: int) -> "OnnxModel":
        """Export with a free batch, and free image sizes where the backbone allows it; else images have `size_px` a side.

        ConfigError: a package is missing, or torch cannot export the backbone.
        """
        for name in ("onnx", "onnxscript"):
            _require(name)
        encoder.backbone.require_size(size_px, setting="side of the images (--size)")
        features, reason = _Features(encoder.backbone).eval(), ""
        for is_free in (True, False):
            try:
                data = _exported(features, size_px, is_free=is_free, metadata={"architecture": encoder.name, "source": source})
                model = cls(data=data, features=features, size_px=size_px, is_free=is_free)
                model.check()
                return model
            except DataError:
                if not is_free:
                    raise
            except Exception as error:  # exporters raise anything at all for what they cannot do
                reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ConfigError(f"torch cannot export {encoder.name} to ONNX ({reason}); export it to torchvision, timm or safetensors")

    @property
    def size(self) -> str:
        return "H, W" if self.is_free else f"{self.size_px}, {self.size_px}"

    def check(self) -> str:
        """Run it on batches and images of several sizes; says how it was compared. DataError: it gives other features."""
        what = "batch and image size are free" if self.is_free else f"the batch is free, images have {self.size_px} × {self.size_px} px"
        try:
            runtime = importlib.import_module("onnxruntime")
        except ImportError:
            return f"not run, since onnxruntime is not installed; {what}"
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        session = runtime.InferenceSession(self.data, options, providers=["CPUExecutionProvider"])
        # Half of the size again: of patches of 14 or 16 px, a multiple too.
        for num, height in ((2, self.size_px), (1, self.size_px * 3 // 2 if self.is_free else self.size_px)):
            images = torch.randn(num, 3, height, self.size_px, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                expected = [each.numpy() for each in self.features(images)]
            found = session.run(["features", "feature_map"], {"images": images.numpy()})
            gap = max(_gap(*pair) for pair in zip(found, expected, strict=True))
            if not gap <= _TOLERANCE:
                raise DataError(f"ONNX Runtime gives other features: they differ by {gap:.2g} of the largest; not exported")
        return f"run by ONNX Runtime {runtime.__version__}: the same features up to rounding; {what}"


class _Features(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        feature_map = self.backbone(images)
        return pool(feature_map), feature_map


def _exported(features: nn.Module, size_px: int, *, is_free: bool, metadata: Mapping[str, str]) -> bytes:
    dim = torch.export.Dim.DYNAMIC
    images = torch.zeros(2, 3, size_px, size_px)
    with _quiet():
        program: Any = torch.onnx.export(
            features,
            (images,),
            input_names=["images"],
            output_names=["features", "feature_map"],
            opset_version=_OPSET,
            dynamo=True,
            dynamic_shapes=({0: dim, **({2: dim, 3: dim} if is_free else {})},),
            verbose=False,
        )
    model = program.model_proto
    symbols = [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim]
    names = {symbol: name for symbol, name in zip(symbols, ("batch", "", "height", "width"), strict=True) if symbol}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):  # torch calls them s34 and the like
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\bs\d+\b", lambda found: names.get(found[0], found[0]), dim.dim_param)
    known = {**metadata, "input": "images [B, 3, H, W] float32, RGB, (pixels / 255 - mean) / std", "mean": str(MEAN), "std": str(STD)}
    for key, value in known.items():
        model.metadata_props.add(key=key, value=value)
    return bytes(model.SerializeToString())


def _gap(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12)) if found.shape == expected.shape else np.inf


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings, which are about its own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _require(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{module} is not installed; pip install 'orl-fast[onnx]'") from error
