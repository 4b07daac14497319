"""cni-portmap(8), the operator's command: who has a port, and what to do about it. One command a file.

A command has HELP, `arguments(parser)` and `run(options, kernel)`, which returns the exit status; `main` lists them.
"""
