"""cni-portmap: publish container ports on Linux with nftables, as a CNI plugin.

A drop-in replacement for the reference `portmap` plugin. Reading order: `cni` (the protocol), `config` (what
was asked), `ruleset` (what is written), `netlink` and `kernel` (how it gets there), `portmap` (the verbs).
"""
__version__ = "0.1.0"
