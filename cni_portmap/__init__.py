"""cni-portmap: publish container ports on Linux with nftables, as a CNI plugin.

A drop-in replacement for the reference `portmap` plugin. Which room for which change:

- what a runtime may send: `cni` (the protocol), `config` (the keys) with `conditions`, `attachment` (what they become);
  the messages for bad input: `explain`; results of another version: `result`
- what a call does, in which order: `verbs/`
- which rule is written: `ruleset`, for a policy `exposure`; how it gets there, and every other system call: `linux/`
- what a person types: `cli/`; what everybody's rules do to a packet: `firewall/`; what keeps all of it: `agent/`
- what others have: `libcni_cache`, and `reference`, the plugin that this one replaces
- what starts: `plugin` (the CNI plugin), `cli.main` (the command)
"""
__version__ = "0.2.0"


def see_packages() -> None:
    """Let imports find the distribution's packages, which `python3 -S` leaves out of the path."""
    import sys
    if hasattr(sys, "frozen"):  # the bundle has its own
        return
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for folder in ("/usr/lib/python3/dist-packages", f"/usr/lib/{version}/site-packages",  # Debian; Fedora
                   f"/usr/lib64/{version}/site-packages"):
        if folder not in sys.path:
            sys.path.append(folder)
