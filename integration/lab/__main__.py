"""python3 -B integration/lab: whether a lab can be made here; status 1, and why not in one sentence, if it cannot."""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from lab.namespaces import obstacle

reason = obstacle()
print(reason)
sys.exit(bool(reason))
