"""Normalization against torchvision's."""

import torch
from torchvision.transforms import functional as tv

from orl_fast.views.normalize import normalize


def test_normalization_is_torchvisions_and_keeps_the_memory_format() -> None:
    views = torch.randint(0, 256, (5, 3, 20, 17), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = tv.normalize(views / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for layout in (torch.contiguous_format, torch.channels_last):
        given = views.contiguous(memory_format=layout)
        assert torch.allclose(normalize(given), expected, atol=1e-5)
        assert normalize(given).is_contiguous(memory_format=layout)
        assert torch.equal(normalize(given, torch.bfloat16), normalize(given).to(torch.bfloat16))
        assert normalize(given, torch.bfloat16).is_contiguous(memory_format=layout)
