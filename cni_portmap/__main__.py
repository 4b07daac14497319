"""python3 -m cni_portmap: the operator's command."""
import sys

from .cli.main import main

sys.exit(main())
