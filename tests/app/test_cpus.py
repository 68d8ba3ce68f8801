"""CPUs are those that a container grants."""

import os

import pytest

from app import cpus
from app.cpus import own_cpus, usable_cpus


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Pretends a machine of 8 CPUs, whose files the test writes."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cpus, "PROC", tmp_path / "proc")
    monkeypatch.setattr(cpus, "SYS", tmp_path / "cgroup")

    def write(groups, **files):
        for path, text in {"proc/self/cgroup": groups, **files}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)

    return write


def test_this_machine():
    assert 1 <= usable_cpus() <= os.cpu_count()


def test_without_control_groups_affinity_counts(machine):
    assert usable_cpus() == 8


@pytest.mark.parametrize(
    ("quota", "usable"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("nonsense", 8)],
)
def test_version_2(machine, quota, usable):
    machine("0::/\n", **{"cgroup/cpu.max": quota})
    assert usable_cpus() == usable


def test_the_narrowest_group_counts(machine):
    machine(
        "0::/pods/mine\n",
        **{
            "cgroup/pods/mine/cpu.max": "max 100000",
            "cgroup/pods/cpu.max": "300000 100000",
            "cgroup/cpu.max": "600000 100000",
        },
    )
    assert usable_cpus() == 3


@pytest.mark.parametrize(("quota", "usable"), [("-1", 8), ("50000", 1), ("400000", 4)])
def test_version_1(machine, quota, usable):
    """As a container sees it: its path is the host's, and its files are at the root."""
    machine(
        "5:cpuset:/\n3:cpu,cpuacct:/docker/0123\n0::/\n",
        **{"cgroup/cpu/cpu.cfs_quota_us": quota, "cgroup/cpu/cpu.cfs_period_us": "100000"},
    )
    assert usable_cpus() == usable


def test_several_processes_share_them(machine):
    machine("0::/\n", **{"cgroup/cpu.max": "500000 100000"})
    assert [usable_cpus(processes) for processes in (1, 2, 3, 9)] == [5, 2, 1, 1]


@pytest.mark.parametrize(("quota", "own"), [("max 100000", 8), ("800000 100000", 8), ("750000 100000", 0)])
def test_cpus_are_our_own_where_nobody_has_time_on_them(machine, quota, own):
    machine("0::/\n", **{"cgroup/cpu.max": quota})
    assert own_cpus() == list(range(own))
    assert own_cpus(processes=2) == []
