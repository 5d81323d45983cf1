"""OpenMP's threads spin while no other process uses the cores, and sleep otherwise; what a user has set is kept."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from orl_fast import spin
from orl_fast.cores import CpuTimes


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_what_a_user_has_set_is_kept(given: dict[str, str]) -> None:
    environment = {"A": "b", **given}
    spin.allow_spinning(environment)
    assert environment == {"A": "b", **given}


def test_what_libgomp_reads_is_set() -> None:
    environment: dict[str, str] = {}
    spin.allow_spinning(environment)
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}


class Machine:
    """Two cores, of which others use some."""

    def __init__(self) -> None:
        self.others = self._wall_s = self._busy_s = self._own_s = 0.0
        self._until: list[threading.Event] = []

    @property
    def is_asleep(self) -> bool:
        return bool(self._until) and not self._until[-1].is_set()

    def times(self) -> CpuTimes:
        self._wall_s += 1
        self._own_s += 1.7
        self._busy_s += 1.7 + self.others
        return CpuTimes(self._wall_s, self._busy_s, self._own_s)

    def asleep(self) -> threading.Event:
        self._until.append(threading.Event())
        return self._until[-1]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setattr(spin, "cpu_times", found.times)
    monkeypatch.setattr(spin, "_asleep", found.asleep)
    monkeypatch.setattr(spin, "_PERIOD_S", 0.005)
    monkeypatch.setattr(spin, "num_cores", lambda: 2)
    for name, value in spin._SPINNING.items():
        monkeypatch.setenv(name, value)
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_threads_sleep_at_first_and_whenever_others_are_busy(machine: Machine) -> None:
    machine.others = 1.0
    with spin.spinning_while_idle():
        wait_until(lambda: machine.is_asleep)
        time.sleep(0.1)
        assert machine.is_asleep
        machine.others = 0.05
        wait_until(lambda: not machine.is_asleep)
        machine.others = 0.6
        wait_until(lambda: machine.is_asleep)
    assert not machine.is_asleep
    assert "spin" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("change", [{"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_a_users_own_policy_is_not_watched(change: dict[str, str], machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with spin.spinning_while_idle():
        assert "spin" not in {thread.name for thread in threading.enumerate()}


def test_results_do_not_depend_on_it_and_nothing_is_left_behind() -> None:
    code = (
        "import os, sys; from orl_fast.spin import *; allow_spinning(os.environ) if sys.argv[1] == 'spin' else None\n"
        "import threading, torch; torch.manual_seed(0); torch.set_num_threads(2)\n"
        "def work():\n"
        "    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3))\n"
        "    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)\n"
        "    for _ in range(60):\n"
        "        optimizer.zero_grad(); net(torch.randn(8, 3, 48, 48)).square().mean().backward(); optimizer.step()\n"
        "    return sum(p.double().sum().item() for p in net.parameters())\n"
        "with spinning_while_idle(): result = work()\n"
        "print(result, threading.active_count())"
    )
    clean = {name: value for name, value in os.environ.items() if name not in spin._SPINNING}
    ends = [
        subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True, env=clean).stdout
        for how in ("spin", "not")
    ]
    assert ends[0] == ends[1]
    assert ends[0].split()[1] in ("1", "2")  # a second team may still be ending
