"""What the reference plugin has left: whose it is, and what the verbs do with it. The kernel only records."""
import contextlib
import json
import socket

import pytest
from helpers import CHAIN, PORT, VARIABLES, RecordingKernel, attachment, configuration, elements, respond, verdicts

from cni_portmap import cni, libcni_cache, reference, ruleset
from cni_portmap.cli import main as cli
from cni_portmap.libcni_cache import Gone, Skipped
from cni_portmap.linux import legacy
from cni_portmap.reference import IPTABLES, NFTABLES, Leftover
from cni_portmap.verbs import adopt as adopting
from cni_portmap.verbs import leftovers
from cni_portmap.verbs.add import add
from cni_portmap.verbs.flows import Released
from cni_portmap.verbs.restore import restore

LOCAL = socket.inet_aton("127.0.0.1")
WEB, OLD, ELSEWHERE = map(socket.inet_aton, ("10.88.0.2", "10.88.0.9", "10.89.0.2"))
WEB6 = socket.inet_pton(socket.AF_INET6, "fd88::2")
RELEASED_CHAINS = "CNI-DN-a8ad6c92904ddb84b2f5b", "CNI-SN-a8ad6c92904ddb84b2f5b"  # written by 1.1.1 and 1.9.1


def left(container_id="web-1", network="lab", *targets, backend=IPTABLES, port=8080, host=b"", protocol=6):
    """A leftover with a rule for each of the addresses `targets`."""
    found = Leftover(backend, 4, container_id, "" if backend == NFTABLES else network)
    for handle, target in enumerate(targets or (WEB,)):
        found.forwards.append((protocol, host, port, target))
        found.rules.append(("hostports", handle, target))
    return found


def kernel_with(*found, **answers):
    """A host where the reference plugin has left this, until it is removed."""
    here = [*found]

    def wanted(choose, own=("", "")):
        return [each for each in here if choose(each.network, each.container_id)
                or (each.network, each.container_id) == own]

    def remove(generation, gone):
        here[:] = [each for each in here if each.container_id not in {one.container_id for one in gone}]
        return True
    return RecordingKernel(has_reference=True, leftovers=wanted, remove_leftovers=remove,
                           wait_for_leftover=lambda leftover, seconds: seconds, **answers)


@pytest.fixture(autouse=True)
def libcni(monkeypatch):
    """What libcni's files say: the deaths they prove, and the addresses of containers by network."""
    class Files:
        deaths: dict[str, str] = {}  # noqa: RUF012
        addresses: dict[str, dict[str, set[bytes]]] = {}  # noqa: RUF012
    files = Files()
    files.deaths, files.addresses = {}, {}
    monkeypatch.setattr(libcni_cache, "proof_of_death", lambda container_id, kernel: files.deaths.get(container_id, ""))
    monkeypatch.setattr(libcni_cache, "addresses_of",
                        lambda container_id, *_: {network: {*ips} for network, ips in
                                                  files.addresses.get(container_id, {}).items()})
    return files


# --- names ----------------------------------------------------------------------------------------------------

def test_chains_of():
    """The names that the real plugin has given."""
    assert reference.chains_of("testnet", "0123456789abcdef" * 4) == RELEASED_CHAINS


@pytest.mark.parametrize("comment, owner", [
    ('dnat name: "net" id: "web-1"', ("net", "web-1")), ('snat name: "net" id: "web-1"', ("net", "web-1")),
    ('dnat name: "net" id: "web-', ("", "")), ('dnat name: "a b" id: "web-1"', ("", "")),
    ('dnat name: "net" id: ""', ("", "")), ("CNI portfwd masquerade mark", ("", "")), ("", ("", ""))])
def test_owner_in(comment, owner):
    """Only a comment that the plugin could have written has an owner."""
    assert reference.owner_in(comment) == owner


# --- DEL and GC -----------------------------------------------------------------------------------------------

def removed(kernel):
    """What was removed: (container, its rules)."""
    return [(leftover.container_id, [handle for _, handle, _ in leftover.rules])
            for _, _, found in kernel.named("remove_leftovers") for leftover in found]


@pytest.mark.parametrize("backend", [IPTABLES, NFTABLES])
def test_delete(backend):
    """DEL removes the container's, under the lock, and then the flows that led there."""
    kernel = kernel_with(left(backend=backend, protocol=17), left("other", backend=backend))
    assert respond("DEL", configuration(), kernel) == (0, None)
    assert removed(kernel) == [("web-1", [0])]
    order = [name for name, *_ in kernel.calls]
    assert order.index("lock") < order.index("generation") < order.index("remove_leftovers") < \
        order.index("unlock") < order.index("delete_flows")
    [(_, protocol, filters, _)] = kernel.named("delete_flows")
    assert protocol == 17 and isinstance(filters.__self__, Released) and filters() == [(4, 8080, b"", WEB)]


def test_delete_without_leftovers():
    """Where the plugin was, and has left nothing of this container, the lock is not taken."""
    kernel = kernel_with(left("other"))
    assert respond("DEL", configuration(), kernel) == (0, None)
    assert not kernel.named("lock", "remove_leftovers")


def test_delete_in_another_network(libcni):
    """A rule of backend nftables does not record its network: libcni's files tell by the address."""
    libcni.addresses["web-1"] = {"lab": {WEB}, "far": {ELSEWHERE}}
    kernel = kernel_with(left("web-1", "lab", WEB, ELSEWHERE, backend=NFTABLES), left("web-1", "far"))
    assert respond("DEL", configuration(), kernel) == (0, None)
    assert removed(kernel) == [("web-1", [0])]


def test_delete_tries_again_and_gives_up():
    """Where the rules change each time between reading and writing, DEL ends with an error."""
    kernel = RecordingKernel(has_reference=True, leftovers=lambda *_: [left()], remove_leftovers=False, generation=7)
    status, document = respond("DEL", configuration(), kernel)
    assert (status, document["code"]) == (1, 11)
    assert [call[1] for call in kernel.named("remove_leftovers")] == [7] * 5 + [0] * 5


@pytest.mark.parametrize("known, gone", [
    ({}, [("old", [0])]), ({"lab": {OLD}}, [("old", [0])]), ({"far": {OLD}}, []),
    ({"lab": {OLD}, "far": {ELSEWHERE}}, [("old", [0])]), ({"lab": {ELSEWHERE}, "far": {OLD}}, [])])
def test_gc_of_nftables(libcni, known, gone):
    """GC takes a container that is not valid, unless libcni knows it in another network."""
    libcni.addresses["old"] = known
    kernel = kernel_with(left("old", "", OLD, backend=NFTABLES), left(backend=NFTABLES), left("x", "another"))
    valid = [{"containerID": "web-1", "ifname": "eth0"}]
    assert respond("GC", configuration(**{"cni.dev/valid-attachments": valid}), kernel) == (0, None)
    assert removed(kernel) == gone


# --- ADD ------------------------------------------------------------------------------------------------------

def publish(kernel, **keys):
    try:
        add(attachment(PORT, **keys), kernel)
    except cni.CniError as error:
        return error
    return None


@pytest.mark.parametrize("forward", [
    {"port": 8080}, {"port": 8080, "host": LOCAL}])
def test_add_waits_and_is_refused(forward):
    """101 for a container that is not provably dead, after four seconds without the lock; nothing is written."""
    kernel = kernel_with(left("other", "lab", OLD, **forward))
    error = publish(kernel)
    assert error.code == 101 and "reference plugin portmap for container other, network lab" in error.msg
    assert "waited 4 s" in error.msg and "cni-portmap adopt" in error.details
    assert kernel.written == [] and not removed(kernel)
    [(_, _, seconds)] = kernel.named("wait_for_leftover")
    assert seconds == 4
    depth = 0
    for name, *_ in kernel.calls:
        depth += (name == "lock") - (name == "unlock")
        assert not (depth and name == "wait_for_leftover")


@pytest.mark.parametrize("forward", [{"port": 8081}, {"port": 8080, "protocol": 17}])
def test_add_beside_others(forward):
    """Other ports are no conflict, and libcni is not asked."""
    kernel = kernel_with(left("other", "lab", OLD, **forward))
    assert publish(kernel) is None and len(kernel.written) == 2 and not removed(kernel)


def test_add_takes_the_port_of_the_dead(libcni):
    """The dead one's rules go in the same call, after ours are written; the flows to its other ports too."""
    libcni.deaths["other"] = "its interface veth9 on this host is gone"
    dead = left("other", "lab", OLD, protocol=17, port=5353)
    dead.forwards.append((6, b"", 8080, OLD))
    kernel = kernel_with(dead)
    assert publish(kernel) is None and removed(kernel) == [("other", [0])]
    order = [name for name, *_ in kernel.calls]
    assert order.index("transact") < order.index("remove_leftovers")
    assert [filters() for _, _, filters, _ in kernel.named("delete_flows")] == [[(4, 5353, b"", OLD)]]


def test_add_replaces_its_own():
    """What was left of the same container goes once it is published; flows to ports that stay are kept."""
    kernel = kernel_with(left())
    assert publish(kernel) is None and removed(kernel) == [("web-1", [0])]
    assert not kernel.named("delete_flows", "wait_for_leftover")


@pytest.mark.parametrize("port, code", [(9090, 0), (8080, 101)])
def test_an_operator_publishes_beside_it(port, code):
    """What the container's runtime has published by the reference plugin stays; the same port is refused."""
    web = attachment(PORT)
    web.by_operator = True
    kernel = kernel_with(left(port=port))
    with pytest.raises(cni.CniError) if code else contextlib.nullcontext() as refused:
        add(web, kernel)
    assert not code or refused.value.code == code
    assert not removed(kernel) and bool(kernel.written) == (not code)


def test_check():
    """104, and what to do."""
    status, document = respond("CHECK", configuration(PORT), kernel_with(left()))
    assert (status, document["code"]) == (1, 104) and "cni-portmap adopt" in document["details"]


def test_never_there(kernel):
    """Where the plugin never was, nothing more is asked of the kernel."""
    assert respond("DEL", configuration(), kernel) == (0, None)
    assert kernel.calls == [("has_chain", CHAIN), ("has_chain", f"p{CHAIN[1:]}"), ("has_reference",)]


# --- iptables-legacy ------------------------------------------------------------------------------------------

SAVED = f"""*nat
:PREROUTING ACCEPT [0:0]
:{RELEASED_CHAINS[0]} - [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A {RELEASED_CHAINS[0]} -s 127.0.0.1/32 -p tcp -m tcp --dport 8080 -j CNI-HOSTPORT-SETMARK
-A {RELEASED_CHAINS[0]} -d 127.0.0.1/32 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.88.0.2:80
-A {RELEASED_CHAINS[0]} -p udp -m udp --dport 53 -j DNAT --to-destination 10.88.0.2:53
-A {RELEASED_CHAINS[0]} -p tcp -m tcp --dport 80:90 -j DNAT --to-destination 10.88.0.2:80
-A {RELEASED_CHAINS[0]} -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.88.0.2-10.88.0.9:80
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \\"testnet\\" id: \\"{'0123456789abcdef' * 4}\\"" -m \
multiport --dports 8080 -j {RELEASED_CHAINS[0]}
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \\"x\\" id: \\"y\\"" -m multiport --dports 1 -j ACCEPT
COMMIT
"""


def test_legacy(monkeypatch):
    """What iptables-legacy-save prints is read, and removed with the very words of the rules."""
    said = []

    def run(words, text=""):
        said.append((words, text))
        return SAVED
    monkeypatch.setattr(legacy, "_run", run)
    monkeypatch.setattr(legacy.shutil, "which", lambda name, path: f"/sbin/{name}")
    [found] = legacy.in_nat(4, lambda network, container_id: True)
    assert (found.network, found.container_id, found.chains) == ("testnet", "0123456789abcdef" * 4,
                                                                 [RELEASED_CHAINS[0]])
    assert found.forwards == [(6, LOCAL, 8080, WEB), (17, b"", 53, WEB)]
    legacy.remove([found])
    words, text = said[-1]
    assert words[:2] == ["/sbin/iptables-legacy-restore", "--noflush"]
    rule = next(line for line in SAVED.splitlines() if "testnet" in line)
    assert text.splitlines() == ["*nat", "-D" + rule[2:], f"-F {RELEASED_CHAINS[0]}", f"-X {RELEASED_CHAINS[0]}",
                                 "COMMIT"]


def test_legacy_without_its_program(monkeypatch, capfd):
    """Where the program is missing, that is one line, and no failure."""
    monkeypatch.setattr(legacy.shutil, "which", lambda name, path: None)
    assert legacy.in_nat(6, lambda *_: True) == []
    cni.tell()
    assert "ip6tables-legacy-save is not installed" in capfd.readouterr().err


def test_element_of():
    """What is forwarded, as the element that would publish it."""
    assert leftovers.element_of((6, b"", 8080, WEB6)) in ruleset.elements_of(attachment(PORT))
    assert leftovers.element_of((6, LOCAL, 80, WEB))[0] == "hostip4_hostports"


# --- adopt and release ----------------------------------------------------------------------------------------

def remembering(monkeypatch, **files):
    """libcni's files, each an attachment or the reason why it is none; by container ID, and "_" for a second one."""
    class Memory:
        def __init__(self, folders, plugin, kernel):
            self.found = [(f"/cache/lab-{name}-eth0", each) for name, each in files.items()]
            for name, each in files.items():
                each.container_id = name.partition("_")[0]

        def is_current(self, attachment):
            return True
    monkeypatch.setattr(adopting, "Memory", Memory)


def named(container_id):
    return attachment(PORT, environ={**VARIABLES, "CNI_CONTAINERID": container_id})


def published_after(kernel):
    """Whether the chain of an attachment is there: from the transaction on that writes it."""
    kernel.answers["has_chain"] = lambda chain: chain in ruleset.SHARED or any(chain in text for text in kernel.written)
    return kernel


@pytest.mark.parametrize("dry_run", [False, True])
def test_adopt(monkeypatch, dry_run):
    """Ours first, then the leftovers go, with those of the dead; the flows of the dead only."""
    remembering(monkeypatch, web=named("web"), old=Gone("its interface veth9 on this host is gone"))
    kernel = published_after(kernel_with(left("web", protocol=17), left("old", "lab", OLD, protocol=17)))
    done = adopting.adopt(kernel, ["/cache"], "portmap", dry_run)
    assert [(each.container_id, backends) for each, backends in done.adopted] == [("web", [IPTABLES])]
    assert [(each.container_id, why) for each, why in done.removed] == [
        ("old", "its interface veth9 on this host is gone")] and not done.left
    assert removed(kernel) == ([] if dry_run else [("web", [0]), ("old", [0])])
    order = [name for name, *_ in kernel.calls]
    if dry_run:
        assert not kernel.written and "remove_leftovers" not in order
    else:
        assert order.index("transact") < order.index("remove_leftovers") < order.index("delete_flows")
        assert [filters() for _, _, filters, _ in kernel.named("delete_flows")] == [[(4, 8080, b"", OLD)]]


@pytest.mark.parametrize("files, reason", [
    ({}, "libcni has no file of it in /cache"), ({"old": Skipped("publishes nothing")}, "publishes nothing"),
    ({"old": named("old"), "web": named("web")}, "is already published by container web"),
    ({"old": named("old"), "web": named("web"), "x": Gone("gone")}, "is already published by container web")])
def test_adopt_leaves_the_rest(monkeypatch, files, reason):
    """What cannot be adopted is named with the reason, and not touched."""
    remembering(monkeypatch, **dict(sorted(files.items(), reverse=True)))
    kernel = published_after(kernel_with(left("old", "lab", OLD), *[left("web")] * ("web" in files)))
    done = adopting.adopt(kernel, ["/cache"], "portmap")
    [(leftover, why)] = done.left
    assert leftover.container_id == "old" and reason in why and len(done.adopted) == ("web" in files)
    assert not removed(kernel)  # nor of who has the port: the old rules still decide where theirs come first


@pytest.mark.parametrize("why", ["snat: true or false is expected", ""])
def test_adopt_in_one_of_two_networks(monkeypatch, libcni, why):
    """Backend nftables: the rules to the other network's address stay, and that is said."""
    libcni.addresses["web"] = {"lab": [WEB], "far": [ELSEWHERE]}
    remembering(monkeypatch, web=named("web"), **{"web_2": Skipped(why)} if why else {})
    kernel = published_after(kernel_with(left("web", "", WEB, ELSEWHERE, backend=NFTABLES)))
    done = adopting.adopt(kernel, ["/cache"], "portmap")
    [(leftover, reason)] = done.left
    assert leftover.container_id == "web" and reason == (why or "its rules lead to another network of it")
    assert len(done.adopted) == 1 and removed(kernel) == [("web", [0])]


def test_adopt_leaves_who_has_gone_meanwhile(monkeypatch):
    """A container whose chain is not here (any more) when the leftovers go keeps them: its DEL takes both."""
    remembering(monkeypatch, web=named("web"))
    kernel = kernel_with(left("web"))
    adopting.adopt(kernel, ["/cache"], "portmap")
    assert not removed(kernel)


def test_restore_passes_over_what_the_reference_plugin_publishes():
    """It is not lost; where this plugin has it too, it is repaired."""
    kernel = kernel_with(left("web"))
    kernel.answers.update(has_table=False)
    assert restore([named("web")], kernel) == ([], []) and not kernel.written
    kernel.answers["has_chain"] = True
    assert [each.container_id for each in restore([named("web")], kernel)[0]] == ["web"]


@pytest.mark.parametrize("forwards, state, force, released, why", [
    ([(8080, WEB), (8080, WEB6)], "alive", False, True, "the reference plugin publishes it"),
    ([(8080, WEB)], "alive", False, False, "the reference plugin does not publish 8080/tcp"),
    ([(8080, WEB)], "alive", True, True, "the reference plugin does not publish 8080/tcp"),
    ([], "alive", False, False, "the reference plugin does not publish this container"),
    ([], "dead", False, True, "is dead")])
def test_release(forwards, state, force, released, why):
    """What that plugin publishes again goes, without its flows; the dead go; others are kept, but with `force`."""
    web = attachment(PORT)
    theirs = left()
    theirs.forwards = [(6, b"", port, target) for port, target in forwards]
    kernel = kernel_with(*[theirs] * bool(forwards), targets={CHAIN: {WEB}},
                         owners=[ruleset.Owner(CHAIN, "net=lab")], judge=lambda owners: verdicts(owners, state),
                         owned_elements=lambda chains: [(element, CHAIN) for element in elements(web) if [*chains]])
    done = adopting.release(kernel, force=force)
    [(owner, reason)] = done.released if released else done.kept
    assert owner.container_id == "web-1" and why in reason and not (done.kept if released else done.released)
    assert len(kernel.named("write")) == released
    ended = [filters() for _, _, filters, _ in kernel.named("delete_flows")]
    assert [family for filters in ended for family, *_ in filters] == \
        [4] * (released and not forwards)  # the rule has no IPv6 target
    assert not adopting.release(kernel, ["other"]).kept


def test_commands(monkeypatch, capsys):
    """What the commands print, and how they end."""
    web, dead = named("web"), left("old", "lab", OLD)
    monkeypatch.setattr("cni_portmap.cli.adopt.adopt", lambda *_: adopting.Adoption(
        [(web, [IPTABLES])], [(dead, "gone")], [(left("x", backend=NFTABLES), "libcni has no file of it")]))
    kernel = RecordingKernel(owners=[ruleset.Owner(CHAIN, "net=lab")], leave=None)
    monkeypatch.setattr(cli, "Kernel", lambda: kernel)
    assert cli.main(["adopt", "--dry-run"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "would be adopted: container web, interface eth0, network lab: 2 ports (iptables)",
        "would be removed: container old, network lab (iptables): gone",
        "left as it is: container x, network unknown (nftables): libcni has no file of it",
        "1 adopted, 1 removed, 1 left (dry run)"]
    assert cli.main(["adopt", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "adopted": [{"container": "web", "interface": "eth0", "network": "lab", "ports": 2, "backends": ["iptables"]}],
        "removed": [{"container": "old", "network": "lab", "backend": "iptables", "reason": "gone"}],
        "left": [{"container": "x", "network": "", "backend": "nftables", "reason": "libcni has no file of it"}]}
    owner = ruleset.Owner(CHAIN, "net=lab")
    monkeypatch.setattr("cni_portmap.cli.release.release", lambda *_: adopting.Release([(owner, "a")], [(owner, "b")]))
    assert cli.main(["release", "web"]) == 1
    assert capsys.readouterr().out.splitlines() == [f"released {owner}: a", f"kept {owner}: b", "1 released, 1 kept"]
    assert cli.main(["release", "--json"]) == 1
    assert {*json.loads(capsys.readouterr().out)} == {"released", "kept"}
    assert cli.main(["release", "nobody"]) == 1
    assert "no container with this ID is published: nobody" in capsys.readouterr().err
