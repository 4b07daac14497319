"""Every golden of tests/goldens loads in a real kernel, and what nft lists then is the same ruleset again."""
import json

import lab
import pytest

GOLDENS = {path.stem: path for path in sorted((lab.ROOT / "tests/goldens").glob("*.nft"))}
# What a golden builds on, where that is not `base`; see tests/test_ruleset.py.
AFTER = {"base": "", "detach": "attach-dual-stack", "replace": "attach-dual-stack",
         "second-interface": "attach-dual-stack", "inherit": "second-interface",
         **{f"exposure-{mode}": "exposure" for mode in ("nat", "routed", "isolated")}}


def scripts(name):
    """The goldens that precede `name`, and `name` itself."""
    before = AFTER.get(name, "base")
    return [*(scripts(before) if before else ()), GOLDENS[name].read_text()]


def rules(script):
    """The number of rules: the lines that are neither commands, nor a chain's hook, nor its end."""
    return sum(line.split()[0] not in ("add", "create", "type", "}") for line in script.splitlines())


@pytest.mark.parametrize("name", GOLDENS)
def test_a_golden_loads_and_lists_the_same(each_bin_dir, name):
    """The golden loads as one transaction, after those that it builds on; its listing loads and lists the same."""
    with lab.fresh_host():
        lab.nft("flush", "ruleset")
        for script in scripts(name):
            lab.nft("-f", "-", input=script)
        listing = lab.nft("list", "ruleset")
        if not any(command in script for script in scripts(name) for command in ("delete ", "flush ")):
            found = json.loads(lab.nft("-j", "list", "ruleset"))["nftables"]
            assert sum("rule" in entry for entry in found) == sum(map(rules, scripts(name))) > 0
        lab.nft("--check", "-f", "-", input=listing)
        lab.nft("-f", "-", input=f"flush ruleset\n{listing}")
        assert lab.nft("list", "ruleset") == listing
