"""The sections of a configuration, with the paper's numbers as defaults: ORL for a ResNet-50 on COCO, as the published tables were made.

A method adds a section of its own (`Method.Settings`); `orl_fast.recipe` puts all of them together and reads recipes.
"""

import hashlib
import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Variant = Literal["official", "paper"]
RendererName = Literal["auto", "cpu", "gpu", "reference", "dali-cpu"]


def _ascending(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError("write the smaller number first")
    return values


_AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
_Ascending = AfterValidator(_ascending)
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
SizePx = Annotated[int, Field(ge=8, le=2048)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
ProbPair = Annotated[tuple[UnitInterval, UnitInterval], _AsTuple]
Span = Annotated[tuple[Positive, Positive], _AsTuple, _Ascending]
Share = Annotated[float, Field(gt=0, le=1)]
ShareSpan = Annotated[tuple[Share, Share], _AsTuple, _Ascending]
Sigma = Annotated[float, Field(gt=0, le=8)]


class Section(BaseModel):
    """Named values, checked when they are set, never changed afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


AnySection = TypeVar("AnySection", bound=Section)


class ViewsConfig(Section):
    """How views are drawn (paper, appendix A). Probabilities hold two values: for the first view and for the second."""

    image_size_px: SizePx = 224
    patch_size_px: SizePx = 96
    crop_area: ShareSpan = (0.08, 1.0)
    crop_aspect: Span = (3 / 4, 4 / 3)
    flip_prob: UnitInterval = 0.5
    jitter_prob: UnitInterval = 0.8
    brightness: UnitInterval = 0.4
    contrast: UnitInterval = 0.4
    saturation: UnitInterval = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1  # turns
    grayscale_prob: UnitInterval = 0.2
    blur_sigma_px: Annotated[tuple[Sigma, Sigma], _AsTuple, _Ascending] = (0.1, 2.0)
    blur_prob: ProbPair = (1.0, 0.1)
    solarize_prob: ProbPair = (0.0, 0.2)
    roi_shift: UnitInterval = 0.5  # of the RoI's sides, to either side
    roi_area: Span = (0.5, 2.0)  # of the RoI's area
    roi_aspect: Span = (0.5, 2.0)  # absolute, not relative to the RoI's own
    roi_min_iou: UnitInterval = 0.5  # not required with variant = "paper"
    roi_attempts: Count = 200


class ModelConfig(Section):
    """Backbone (see `orl_fast.models.backbone`) and the widths of the heads."""

    backbone: str = "resnet50"
    projector_hidden: Count = 4096
    projector_out: Count = 256
    predictor_hidden: Count = 4096


class OptimConfig(Section):
    """SGD with linear warm-up and cosine decay, and the momentum of the target network."""

    lr_per_256: Positive = 0.2  # learning rate = lr_per_256 * global batch / 256
    momentum: UnitInterval = 0.9
    weight_decay: NonNegative = 1e-4  # on all parameters, batch norm and biases included
    warmup_epochs: NonNegative = 4.0
    cosine: Literal["auto", "epoch", "step"] = "auto"  # auto: per epoch as the reference implementation has it; "paper": per step
    ema_momentum: UnitInterval = 0.99  # at step 0; rises to 1 at the last step


class TrainConfig(Section):
    """The run: length, batch, numerics, checkpoints and logs."""

    epochs: Count = 800
    batch_size: Count = 512  # global: over all ranks and accumulated micro-batches
    accumulate: Count = 1  # micro-batches per optimizer step and rank
    seed: Seed = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on the CPU
    channels_last: bool = True
    compile: bool = False
    sync_bn: bool = True  # batch statistics over all ranks
    joined_views: bool = False  # one forward pass per view size; departs from the paper: batch statistics are shared by the views
    log_every_steps: Count = 50
    checkpoint_every_epochs: Count = 10
    checkpoint_every_min: NonNegative = 10.0  # and this often, so that a kill costs minutes; 0: after epochs only
    keep_every_epochs: Annotated[int, Field(ge=0)] = 0  # also keep epoch-NNNN.pt this often; 0: only the latest two checkpoints

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size = {self.batch_size} is not a multiple of accumulate = {self.accumulate}; change one")
        return self


class LoaderConfig(Section):
    """The renderer of the views and its threads. Renderers of one plan differ by rounding; everything else changes the speed alone."""

    renderer: RendererName = "auto"  # auto: measured once, when a run starts, and kept by it
    num_threads: Annotated[int, Field(ge=0)] = 0  # 0: the cores of this process, shared among its node's ranks
    prefetch: Count = 2  # batches rendered ahead
    hw_decoder_load: UnitInterval = 0.65  # share of JPEGs for the GPU's hardware decoder
    source: str = "mmap"  # where encoded images are read from, a key of `orl_fast.views.choose.SOURCES`
    pixels: Literal["auto", "always", "never"] = "auto"  # read stored pixels, "auto": as far as that is faster than decoding
    pixels_dir: str = ""  # where they are, if not where orl-fast pixels last put them
    use_patches: bool = True  # partner patches from patches-*.tar where they were packed


class MiningConfig(Section):
    """Stage 2: correspondence discovery (paper, section 3.2; appendix B)."""

    resize_px: SizePx = 256  # image features: Resize, then CenterCrop
    crop_px: SizePx = 224
    num_neighbors: Count = 10
    proposals: Literal["fast", "opencv", "coco-annotations"] = "fast"
    min_side_px: Count = 96
    max_aspect: Annotated[float, Field(ge=1)] = 3.0
    max_iou: UnitInterval = 0.5
    max_rois: Count = 100
    roi_size_px: SizePx = 224  # RoI features
    pair_ratio: Share = 0.1
    encode_batch: Count = 256  # views encoded at once
    proposal_seed: Seed = 0  # of the order of proposals

    @model_validator(mode="after")
    def _crop_within(self) -> Self:
        if self.crop_px > self.resize_px:
            raise ValueError(f"crop_px = {self.crop_px} exceeds resize_px = {self.resize_px}")
        return self


class Config(Section):
    """What every run has; a recipe's sections bear these names. Methods' own sections are added by `orl_fast.recipe`."""

    variant: Variant = "official"  # "paper": pairs are a share of all entries, jittered RoIs need no overlap, cosine per step
    views: ViewsConfig = ViewsConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    loader: LoaderConfig = LoaderConfig()
    mining: MiningConfig = MiningConfig()

    def section(self, kind: type[AnySection]) -> AnySection:
        """The section of this very class, for example a method's own; its defaults where there is none."""
        return next((value for value in vars(self).values() if type(value) is kind), None) or kind()


def digest(value: Any) -> str:
    """A short fingerprint of plain data (dicts, lists, scalars), the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
