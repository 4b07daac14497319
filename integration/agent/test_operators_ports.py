"""cni-portmap publish beside an agent: no runtime knows of those ports, so only the agent can restore them."""
import pathlib

import lab
import pytest
from lab.agent import Agent
from lab.clinic import Clinic
from lab.libcni_cache import Cache


@pytest.fixture
def clinic(bin_dir, tmp_path):
    """A container with a published port, libcni's file of it, and an agent."""
    with Clinic(bin_dir) as there:
        Cache(tmp_path).remember(there.web)
        with Agent(pathlib.Path(bin_dir).parent / "sbin/cni-portmap", cache=tmp_path) as there.agent:
            yield there


def publish(clinic, *words):
    done = clinic.command("publish", "--cache", clinic.agent.cache, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_comes_back(clinic):
    """After a flush, with real packets, also where an overrun or a reload has come before; publish says so."""
    said = publish(clinic, "web", "9090:80", "127.0.0.1:9091:80")
    assert "the agent restores it" in said and "publish it again" not in said
    before = lab.table()
    for _ in range(2):
        lab.nft_script("flush ruleset")
        assert lab.until(lambda: lab.table() == before), clinic.agent.log
        assert clinic.answers(port=9090) and clinic.answers(path="localhost", port=9091) and clinic.answers()


def test_what_unpublish_removes_does_not(clinic):
    """Nor what the container's DEL removes."""
    before = lab.table()
    publish(clinic, "web", "9090:80")
    assert not clinic.command("unpublish", "web").returncode
    lab.nft_script("flush ruleset")
    assert lab.until(lambda: lab.table() == before), clinic.agent.log
    clinic.agent.catch_up()
    assert lab.table() == before and not clinic.answers(port=9090)
    publish(clinic, "web", "9090:80")
    clinic.network.delete(clinic.web.id, clinic.web.namespace.path, clinic.web.ports)
    lab.nft_script("flush ruleset")
    clinic.agent.catch_up()
    assert "/web" not in lab.table()


def test_publish_says_whether_an_agent_heals(clinic):
    """Not one that an administrator has told to rest, and not one that has ended."""
    for _ in range(2):
        lab.nft("delete", "table", *lab.TABLE.split())
        assert lab.until(lambda: lab.table() or "resume" in clinic.agent.log)
    assert clinic.agent.logs("agent --resume")
    assert "publish it again" in publish(clinic, "web", "9090:80")
    assert not clinic.command("agent", "--resume").returncode
    assert "the agent restores it" in publish(clinic, "web", "9091:80")
    clinic.agent.stop()
    assert "publish it again" in publish(clinic, "web", "9092:80")
