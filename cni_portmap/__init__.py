"""cni-portmap: publish container ports on Linux with nftables, as a CNI plugin.

A drop-in replacement for the reference `portmap` plugin. Reading order: `cni` (the protocol), `config` (what
was asked), `ruleset` (what is written), `netlink` and `kernel` (how it gets there), `portmap` (the verbs).
"""
__version__ = "0.1.1"


def see_packages() -> None:
    """Let imports find the distribution's packages, which `python3 -S` leaves out of the path."""
    import sys
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for folder in ("/usr/lib/python3/dist-packages", f"/usr/lib/{version}/site-packages",  # Debian; Fedora
                   f"/usr/lib64/{version}/site-packages"):
        if folder not in sys.path:
            sys.path.append(folder)
