"""The online network, its moving average, and the schedule of the average's momentum."""

import itertools
import json

import pytest
import torch
from torch import Tensor

from orl_fast.models import Network, ema_momentum, frozen_copy, project, update_target


def _networks() -> tuple[Network, Network]:
    torch.manual_seed(0)
    online = Network("resnet18", (16, 8))
    return online, frozen_copy(online)


def _views() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 32, 32, generator=generator) * scale for scale in (1, 3)]


@pytest.mark.parametrize("options", [{}, {"last_bias": True}, {"last_bias": True, "last_norm": True}])
def test_a_description_in_json_builds_the_same_network(options: dict[str, bool]) -> None:
    network = Network("resnet10_small", (24, 24, 12), **options).eval()
    rebuilt = Network.from_description(json.loads(json.dumps(network.description))).eval()
    assert rebuilt.description == network.description
    rebuilt.load_state_dict(network.state_dict())
    assert torch.equal(rebuilt(_views()[0]), network(_views()[0]))


def test_it_is_backbone_then_pool_then_projector() -> None:
    network = _networks()[0].eval()
    with torch.no_grad():
        features = network.backbone(_views()[0])
        assert torch.equal(network(_views()[0]), network.projector(features.mean(dim=(2, 3))))


def test_target_starts_equal_and_is_averaged() -> None:
    online, target = _networks()
    for one, other in zip(online.parameters(), target.parameters(), strict=True):
        assert torch.equal(one, other)
        assert not other.requires_grad
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(torch.randn_like(parameter))
    expected = [parameter.double() for parameter in target.parameters()]
    for momentum in (0.99, 0.25, 1.0):
        update_target(target, online, momentum=momentum)
        for i, (found, new) in enumerate(zip(target.parameters(), online.parameters(), strict=True)):
            expected[i] = momentum * expected[i] + (1 - momentum) * new.detach().double()
            torch.testing.assert_close(found.double(), expected[i], rtol=1e-5, atol=1e-6)


def test_buffers_come_from_the_targets_own_forwards() -> None:
    online, target = _networks()
    project(online, _views())
    project(target, _views()[:1])
    update_target(target, online, momentum=0.0)
    assert online.projector[1].num_batches_tracked == 2
    assert target.projector[1].num_batches_tracked == 1
    assert not torch.equal(target.projector[1].running_mean, online.projector[1].running_mean)


def test_joined_views_share_their_batch_statistics() -> None:
    online, _ = _networks()
    apart, together = project(online, _views()), project(online, _views(), joined=True)
    assert [projection.shape for projection in together] == [projection.shape for projection in apart]
    assert not torch.allclose(apart[0], together[0], atol=1e-3)
    online.eval()
    for one, other in zip(project(online, _views()), project(online, _views(), joined=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert project(online, [], joined=True) == []


def test_momentum_rises_from_its_base_towards_one() -> None:
    momenta = [ema_momentum(step, num_steps=1000, base=0.99) for step in range(1001)]
    assert momenta[0] == pytest.approx(0.99, rel=1e-12)
    assert momenta[500] == pytest.approx(0.995, rel=1e-12)
    assert momenta[1000] == 1
    assert all(earlier < later for earlier, later in itertools.pairwise(momenta))
