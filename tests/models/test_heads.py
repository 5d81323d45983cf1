import math

import pytest
import torch
from torch import nn

from orl_fast.config import Config
from orl_fast.methods.byol import predictor
from orl_fast.models import Mlp
from orl_fast.models.heads import pool


def test_byols_heads_have_the_papers_layers() -> None:
    head = Mlp((2048, 4096, 256))
    assert {name: tuple(value.shape) for name, value in head.named_parameters()} == {
        "0.weight": (4096, 2048), "0.bias": (4096,), "1.weight": (4096,), "1.bias": (4096,), "3.weight": (256, 4096)
    }  # fmt: skip
    assert sum(parameter.numel() for parameter in predictor(Config()).parameters()) == 256 * 4096 + 3 * 4096 + 4096 * 256


@pytest.mark.parametrize(
    ("widths", "options", "kinds"),
    [
        ((6, 5), {}, [nn.Linear]),
        ((6, 5), {"last_norm": True}, [nn.Linear, nn.BatchNorm1d]),
        ((6, 7, 5), {"last_bias": True}, [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]),
        ((6, 7, 7, 5), {"last_norm": True}, [*[nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2, nn.Linear, nn.BatchNorm1d]),
    ],
)
def test_a_perceptron_of_any_depth_is_its_settings(widths: tuple[int, ...], options: dict[str, bool], kinds: list[type[nn.Module]]) -> None:
    head = Mlp(widths, **options)
    assert [type(layer) for layer in head] == kinds
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [layer.bias is not None for layer in linear] == [True] * (len(linear) - 1) + [options.get("last_bias", False)]
    assert [type(layer) for layer in Mlp(**head.settings)] == kinds
    assert head(torch.randn(4, 6)).shape == (4, 5)


def test_layers_are_kaiming_normal_fan_in() -> None:
    torch.manual_seed(0)
    linear = Mlp((500, 400, 300))[0]
    assert isinstance(linear, nn.Linear)
    assert linear.weight.std().item() == pytest.approx(math.sqrt(2 / 500), rel=0.02)
    assert (linear.bias == 0).all()


def test_pooling_is_the_mean_over_places() -> None:
    features = torch.arange(2 * 3 * 2 * 2, dtype=torch.float32).view(2, 3, 2, 2)
    assert pool(features).tolist() == [[1.5, 5.5, 9.5], [13.5, 17.5, 21.5]]
