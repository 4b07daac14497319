"""The lab: hosts, containers, servers that say whom they saw, runtimes, and trouble, for tests and measurements.

Everything happens in the private network and mount namespace that `enter` makes; it plays the host, and /run is new
there. The machine's own network, ruleset, sysctls and files are never changed. The other machines are named namespaces,
wired by rtnetlink (a LAN) or by real CNI plugins (containers). Sockets are opened in the namespace that they belong to
and used from this process, so a server is ready before the first probe, without sleeps. What a name means here it means
in every test: the names below are all there are. Nothing here is a test, and nothing here imports one.

    processes   other programs                          calls         of the plugin, as runtimes make them; the lock
    links       links, addresses, routes (pyroute2)     faults        death at any instant, others who interfere
    namespaces  hosts, and machines that are wired      damage        what somebody may remove, and who notices it
    tables      nft, and what the kernel holds          libcni_cache  what libcni remembers
    servers     servers and clients                     paths, site   every path to a port, and the machines for it
    packets     packets made by hand                    soak          what grows when thousands come and go
    userland    files and processes of a machine        kube_proxy    a ruleset of the shape of its nftables mode
    conntrack   the flows that the host tracks          machine       for real runtimes; cri, podman, firewalld
    runtime     libcni, as a runtime uses it            attack        attempts at random, of every kind of fault
    reference   the reference plugin, exchanged         poison        chains and rules that nft would not write
"""
from .calls import (
    LOCK,
    Answer,
    Call,
    Fork,
    GcCall,
    Host,
    Pod,
    fork,
    held_lock,
    instants,
    lock_is_free,
    mapping,
    start_fork,
    wait_long,
    wait_until_blocked,
)
from .conntrack import flows, track, tracked
from .faults import adopted_orphans, foreign_changes, in_own_mounts
from .links import (
    add_addresses,
    add_bridge,
    add_route,
    add_veth,
    bring_up,
    delete_link,
    enslave,
    family_of,
    has_link,
    localhost_routes,
)
from .namespaces import (
    HOST,
    Namespace,
    Netns,
    br_netfilter,
    delete_namespace,
    ensure_namespace,
    enter,
    fresh_host,
    obstacle,
    sysctl,
    wire,
)
from .packets import flood, inject, packet, source_routed, too_big
from .processes import ROOT, run, until
from .runtime import (
    PLUGINS,
    CniFailed,
    Container,
    Network,
    bridge_conflist,
    call_plugin,
    call_process,
    install,
    install_in_other_root,
    plugins,
)
from .servers import (
    HASTY,
    KINDS,
    NUMBERS,
    PATIENT,
    Client,
    Saw,
    Server,
    connecting,
    exchange,
    patience,
    question,
)
from .tables import (
    TABLE,
    chains,
    elements,
    generation,
    keep_conntrack,
    listing,
    nft,
    nft_script,
    other_root,
    restored_policy,
    reset_rules,
    register_again,
    restored_table,
    state,
    table,
)
