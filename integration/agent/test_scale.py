"""cni-portmap agent with 10,000 containers: everything comes back, and nothing overflows."""
import json
import os

import lab
from lab import Pod
from lab.agent import Agent

from cni_portmap import cni, config, ruleset
from cni_portmap.linux.kernel import Kernel

CONTAINERS = 10000


def attachment(index, inode):
    pod = Pod(f"pod{index}", f"{10000 + index}:80", f"{10000 + index}:81/udp",
              ips=(f"10.{20 + index // 65536}.{index // 256 % 256}.{index % 256}/8",), netns="/run/netns/all")
    found = config.parse(cni.Request("ADD", "1.1.0", pod.environ("X"), json.loads(pod.stdin("ADD")), "{}"))
    found.inode = inode
    return found


def test_ten_thousand(host):
    """Twice: the first heal is of what was read, the second of what was heard. The buffer holds a whole flush."""
    inode = os.stat(lab.Namespace("all").path).st_ino
    with Kernel().lock():
        kernel = Kernel()
        kernel.transact(ruleset.base({name: ruleset.shared_rules(name, []) for name in ruleset.SHARED}))
        for start in range(0, CONTAINERS, 1000):
            kernel.transact("".join(ruleset.attach(attachment(index, inode)) for index in range(start, start + 1000)))
        kernel.close()
    before = lab.table()
    with Agent(host.cli) as agent:
        assert agent.logs(f"keeps {CONTAINERS} attachments")
        for number in 1, 2:
            lab.nft_script("flush ruleset")
            lab.keep_conntrack()
            assert lab.until(lambda: agent.log.count("restored") == number, 180), agent.log  # noqa: B023
            assert lab.table() == before
        assert "reading the table again" not in agent.log
        web = Pod("web", "8080:80")
        host.add(web)
        host.delete(web)
        assert agent.process.poll() is None
