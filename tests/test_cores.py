"""Affinity and container quotas limit the cores that are used."""

import os
from pathlib import Path

import pytest

from orl_fast import cores


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        pytest.param("", {}, 64, id="no control groups"),
        pytest.param("0::/\n", {"cpu.max": "max 100000"}, 64, id="v2, no limit"),
        pytest.param("0::/\n", {"cpu.max": "200000 100000\n"}, 2, id="v2"),
        pytest.param("0::/\n", {"cpu.max": "150000 100000"}, 2, id="rounded up"),
        pytest.param("0::/\n", {"cpu.max": "5000 100000"}, 1, id="at least one"),
        pytest.param("0::/\n", {"cpu.max": "12800000 100000"}, 64, id="more than there are"),
        pytest.param("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3, id="v2, a group around it"),
        pytest.param("0::/a/b\n", {"a/cpu.max": "900000 100000", "a/b/cpu.max": "400000 100000"}, 4, id="v2, the tightest"),
        pytest.param("0::/kubepods/pod1\n", {"cpu.max": "800000 100000"}, 8, id="v2, a path of the host"),
        pytest.param(
            "3:memory:/x\n2:cpu,cpuacct:/docker/1\n0::/\n",
            {"cpu/docker/1/QUOTA": "250000", "cpu/docker/1/PERIOD": "50000\n"},
            5,
            id="v1",
        ),
        pytest.param("1:cpu:/docker/1\n", {"cpu/QUOTA": "600000", "cpu/PERIOD": "100000"}, 6, id="v1, path of the host"),
        pytest.param("1:cpu:/\n", {"cpu/QUOTA": "-1", "cpu/PERIOD": "100000"}, 64, id="v1, no limit"),
        pytest.param("4:cpuset:/\n", {"cpuset/QUOTA": "100000", "cpuset/PERIOD": "100000"}, 64, id="another controller"),
    ],
)
def test_quotas_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membership: str, files: dict[str, str], expected: int) -> None:
    (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "groups" / name.replace("QUOTA", "cpu.cfs_quota_us").replace("PERIOD", "cpu.cfs_period_us")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(cores, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(cores, "_MEMBERSHIP", tmp_path / "membership")
    assert cores.num_cores() == expected


def test_affinity_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= cores.num_cores() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert cores.num_cores() == 1


def test_busy_time_is_that_of_this_processs_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "cpu  9 9 9 9\ncpu0 100 0 50 800 30 0 20 0 7 7\ncpu1 200 0 50 500 0 0 0 10 0 0\ncpu10 5 5 5 5 5 5 5 5 5 5\nintr 5\n"
    monkeypatch.setattr(cores, "_read", lambda _: text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert cores.cpu_times().busy_s == (170 + 260) / os.sysconf("SC_CLK_TCK")


def test_cores_of_which_nothing_is_known_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_read", lambda _: "")
    before, after = cores.cpu_times(), cores.cpu_times()
    assert after.busy_s - before.busy_s == pytest.approx((after.wall_s - before.wall_s) * (os.cpu_count() or 1))


def test_own_work_is_counted_as_busy_and_as_own() -> None:
    before = cores.cpu_times()
    while cores.cpu_times().own_s < before.own_s + 0.3:
        sum(range(10_000))
    after = cores.cpu_times()
    assert after.own_s - before.own_s > 0.29
    assert after.busy_s - before.busy_s >= 0.2
