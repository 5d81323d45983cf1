"""The choice of renderers and sources, with stubs for what only a GPU machine has."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from orl_fast.config import LoaderConfig
from orl_fast.errors import ConfigError
from orl_fast.views import Batch, ViewPlan, choose
from orl_fast.views.choose import faster_renderer, open_renderer, open_source
from orl_fast.views.cpu import CpuRenderer
from orl_fast.views.gpu import _Graph
from tests.conftest import pack
from tests.views.conftest import Photos, byol_plan, only

_GPU = torch.device("cuda")


@pytest.fixture
def trial(photos: Photos) -> ViewPlan:
    return byol_plan(np.arange(2), photos, only(image_size_px=32))


@pytest.mark.parametrize("kind", ["auto", "cpu", "reference", "dali-cpu"])
def test_every_kind_renders_the_plan(kind: str, photos: Photos, trial: ViewPlan) -> None:
    renderer = open_renderer(kind, photos, LoaderConfig(), num_threads=2)
    assert {name: tuple(view.shape) for name, view in renderer.render(trial).views.items()} == {
        "view1": (2, 3, 32, 32),
        "view2": (2, 3, 32, 32),
    }
    renderer.close()


def test_what_cannot_be_opened_is_refused_with_the_choices(photos: Photos, trial: ViewPlan) -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        open_renderer("gpu", photos, LoaderConfig())
    with pytest.raises(ConfigError, match=r"loader.renderer = 'gpuu': use one of auto, cpu, gpu, reference, dali-cpu"):
        open_renderer("gpuu", photos, LoaderConfig())
    assert faster_renderer(photos, LoaderConfig(), trial=trial) == "cpu"


def test_an_unknown_source_is_refused(photo_paths: list[Path], tmp_path: Path) -> None:
    index = pack(photo_paths[:2], tmp_path / "two")
    with pytest.raises(ConfigError, match=r"loader.source = 'mmpa': use one of mmap"):
        open_source(index, LoaderConfig(source="mmpa"))


class _Machine:
    """A machine with a GPU: renderers that take so many seconds, and note what happens to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, seconds: dict[str, float], fails: str = "") -> None:
        self.log: list[str] = []
        self._seconds, self._fails, self._last = seconds, fails, ""
        monkeypatch.setattr(choose, "open_renderer", self._open)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(choose.timeit, "repeat", self._timed)

    def _timed(self, function: Callable[[], None], *, number: int, repeat: int) -> list[float]:
        for _ in range(number * repeat):
            function()
        return [self._seconds[self._last] * number * (1 + i) for i in range(repeat)]

    def _open(self, kind: str, *_: object, **__: object) -> "_Stub":
        self.log.append(f"open {kind}")
        return _Stub(self, kind)

    def render(self, kind: str, plan: ViewPlan) -> Batch:
        if kind == self._fails:
            raise RuntimeError(f"{kind}: driver too old\nand much more")
        self._last = kind
        nothing = np.empty(0, np.int64)
        return Batch(views={}, rows=plan.rows, bad_rows=nothing, bad_sources=nothing)


class _Stub:
    def __init__(self, machine: _Machine, kind: str) -> None:
        self._machine, self._kind = machine, kind

    def render(self, plan: ViewPlan) -> Batch:
        return self._machine.render(self._kind, plan)

    def close(self) -> None:
        self._machine.log.append(f"close {self._kind}")


_BOTH_CLOSED = ["open cpu", "close cpu", "open gpu", "close gpu"]


@pytest.mark.parametrize(("seconds", "expected"), [({"cpu": 0.2, "gpu": 0.1}, "gpu"), ({"cpu": 0.1, "gpu": 0.2}, "cpu")])
def test_the_faster_renderer_is_chosen_and_both_are_closed(
    seconds: dict[str, float],
    expected: str,
    photos: Photos,
    trial: ViewPlan,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "orl_fast")
    machine = _Machine(monkeypatch, seconds=seconds)
    assert faster_renderer(photos, LoaderConfig(), trial=trial, device=_GPU) == expected
    assert machine.log == _BOTH_CLOSED
    rates = {kind: f"{kind} {2 / value:.0f} samples/s" for kind, value in seconds.items()}
    assert f"rendered on the {expected.upper()}: measured {rates['cpu']}, {rates['gpu']}" in caplog.text


def test_a_gpu_that_cannot_render_leaves_the_cpu(
    photos: Photos, trial: ViewPlan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine = _Machine(monkeypatch, seconds={"cpu": 1.0}, fails="gpu")
    assert faster_renderer(photos, LoaderConfig(), trial=trial, device=_GPU) == "cpu"
    assert machine.log == _BOTH_CLOSED
    assert [record.getMessage() for record in caplog.records] == [
        "the GPU cannot render here (gpu: driver too old); views are rendered on the CPU"
    ]


def test_a_cpu_that_cannot_render_is_an_error_and_closed(photos: Photos, trial: ViewPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = _Machine(monkeypatch, seconds={"gpu": 1.0}, fails="cpu")
    with pytest.raises(RuntimeError, match="driver too old"):
        faster_renderer(photos, LoaderConfig(), trial=trial, device=_GPU)
    assert machine.log == ["open cpu", "close cpu"]


def test_a_graph_that_cannot_be_built_is_not_hidden_by_its_fallback(
    photos: Photos, trial: ViewPlan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The real renderers: the GPU's renders single batches on the CPU where its graph refuses them."""

    def broken(self: _Graph, plan: ViewPlan) -> Batch:
        raise RuntimeError("nvJPEG: driver too old")

    def without_pinned_memory(source: Photos, *, num_threads: int, pin_memory: bool) -> CpuRenderer:
        assert pin_memory
        return CpuRenderer(source, num_threads=num_threads)

    monkeypatch.setattr(_Graph, "run", broken)
    monkeypatch.setattr("orl_fast.views.cpu.CpuRenderer", without_pinned_memory)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert faster_renderer(photos, LoaderConfig(), trial=trial, device=_GPU, num_threads=2) == "cpu"
    assert "the GPU cannot render here (nvJPEG: driver too old); views are rendered on the CPU" in caplog.text


@pytest.mark.gpu
def test_the_faster_renderer_of_this_machine_is_measured(photos: Photos, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "orl_fast")
    trial = byol_plan(np.arange(len(photos)), photos, only(image_size_px=224))
    assert faster_renderer(photos, LoaderConfig(), trial=trial, device=_GPU) in ("cpu", "gpu")
    assert caplog.text.count("samples/s") == 2
