"""The bundle's plugin beside an agent, the bundle's own or one that was installed from the sources."""
import lab
import pytest
from lab import Host, Pod
from lab.agent import Agent


@pytest.mark.parametrize("whose", ["the bundle's", "the sources'"])
def test_it_is_known(install, tmp_path, whose):
    """What its ADD has published comes back after a flush, and what its DEL has removed does not."""
    install()
    web, db = Pod("web", "8080:80", "127.0.0.1:8081:81"), Pod("db", "5432:5432")
    host = Host(tmp_path / "bin/portmap")
    with Agent(tmp_path / "sbin/cni-portmap" if whose == "the bundle's" else lab.ROOT / "scripts/cni-portmap") as agent:
        host.add(web, db)
        before = lab.table()
        lab.nft_script("flush ruleset")
        assert lab.until(lambda: lab.table() == before), agent.log
        assert not host.call("CHECK", web).code
        host.delete(web)
        assert lab.chains() == [db.chain]
        before = lab.table()
        lab.nft_script("flush ruleset")
        assert lab.until(lambda: lab.table() == before), agent.log
        assert agent.log.count("map elements") == 2, agent.log
