"""From bytes to the network's input, on the device that holds them."""

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB


def normalize(views: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(x / 255 - mean) / std by channel, computed in float32: [B, 3, H, W] of `dtype`, device and memory format kept, from uint8."""
    # Two constants, one multiply-add: scale = 1 / (255 std), shift = -mean / std.
    scale = torch.tensor([1 / (255 * std) for std in STD]).to(views.device, non_blocking=True).view(3, 1, 1)
    shift = torch.tensor([-mean / std for mean, std in zip(MEAN, STD, strict=True)]).to(views.device, non_blocking=True).view(3, 1, 1)
    pixels = views.to(torch.float32, copy=True)
    return torch.addcmul(shift, pixels, scale, out=pixels).to(dtype)  # in place: on a CPU, fresh memory costs more than the arithmetic
