"""A real Prometheus scrapes the agent, and loads the alert rules and the dashboard's queries (Debian's package)."""
import json
import re
import shutil
import subprocess
import urllib.parse

import lab
import pytest
from lab import Pod
from lab.agent import Agent

RULES = lab.ROOT / "conf/prometheus/cni-portmap.rules.yml"
DASHBOARD = lab.ROOT / "conf/grafana/cni-portmap.json"
CONFIG = """
global: {{scrape_interval: 3s, evaluation_interval: 1s}}  # a scrape has as long to be answered
rule_files: ["{rules}"]
scrape_configs:
  - job_name: cni-portmap
    static_configs: [{{targets: ["127.0.0.1:9472"]}}]
"""
pytestmark = pytest.mark.skipif(not shutil.which("prometheus"), reason="needs the package prometheus")


@pytest.fixture
def ask(host, tmp_path):
    """Ask a Prometheus that scrapes an agent: a path of its API, and its answer's data."""
    config = tmp_path / "prometheus.yml"
    config.write_text(CONFIG.format(rules=RULES))
    with Agent(host.cli, "--metrics", "127.0.0.1:9472"), subprocess.Popen(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}",
             "--web.listen-address=127.0.0.1:9490", "--log.level=error"]) as process:
        try:
            def ask(path, **arguments):
                query = urllib.parse.urlencode(arguments)
                answer = lab.run("curl", "-s", f"http://127.0.0.1:9490/api/v1/{path}?{query}", check=False)
                return json.loads(answer)["data"] if answer.startswith("{") else None
            assert lab.until(lambda: ask("query", query="up"), 60)
            yield ask
        finally:
            process.terminate()


def queries():
    """Each query of the dashboard, as Grafana sends it for all instances."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"].replace("$instance", ".*") for panel in panels for target in panel["targets"]]


def test_prometheus(host, ask):
    """What is published arrives; each query of dashboard and alerts is understood, and names metrics that exist."""
    host.add(Pod("web", "8080:80", "127.0.0.1:9000:9000"))

    def value(query):
        result = ask("query", query=query)["result"]
        return float(result[0]["value"][1]) if result else None
    assert lab.until(lambda: value("cni_portmap_published_ports") == 2, 60)
    lab.nft_script("flush ruleset")
    for name in "restores", "foreign_deletions":
        assert lab.until(lambda: value(f"cni_portmap_{name}_total") == 1, 60)  # noqa: B023
    groups = ask("rules")["groups"]
    alerts = [rule for group in groups for rule in group["rules"]]
    assert len(alerts) == RULES.read_text().count("- alert:") > 3
    assert lab.until(lambda: all(rule["health"] == "ok" for group in ask("rules")["groups"] for rule in group["rules"]))
    assert {rule["name"] for group in ask("rules")["groups"] for rule in group["rules"]
            if rule["state"] == "firing"} == set()
    known = {*ask("label/__name__/values"), "cni_portmap_forwarded_total"}
    for query in (*queries(), *(rule["query"] for rule in alerts)):
        assert ask("query", query=query) is not None, query
        assert {*re.findall(r"\bcni_portmap_\w+", query)} <= known, query


def test_alerts(tmp_path):
    """Each alert fires where it should, and not where it should not, by Prometheus' own unit tests of rules."""
    test = tmp_path / "test.yml"
    cases = {"CniPortmapAgentDown": [('up{job="cni-portmap",instance="node1"}', "0x20")],
             "CniPortmapOthersDelete": [('cni_portmap_foreign_deletions_total{instance="node1"}', "0+1x20"),
                                        ('cni_portmap_restores_total{instance="node1"}', "0+1x20")],
             "CniPortmapNotRestored": [('cni_portmap_foreign_deletions_total{instance="node1"}', "0x9 2x10"),
                                       ('cni_portmap_restores_total{instance="node1"}', "0x20")],
             "CniPortmapConntrackNearlyFull": [('cni_portmap_conntrack_entries{instance="node1"}', "95x20"),
                                               ('cni_portmap_conntrack_limit{instance="node1"}', "100x20")]}
    assert {*cases} == {*re.findall(r"alert: (\w+)", RULES.read_text())}
    lines = [f"rule_files: [{RULES}]", "tests:"]
    for name, series in cases.items():
        lines += ["- interval: 1m", "  input_series:"]
        lines += [f"  - {{series: '{metric}', values: '{values}'}}" for metric, values in series]
        lines += ["  promql_expr_test:"]
        for alert in cases:
            samples = f"[{{labels: 'ALERTS{{alertname=\"{name}\"}}', value: 1}}]" if alert == name else "[]"
            firing = f'ALERTS{{alertname="{alert}",alertstate="firing"}}'
            query = f"count by (__name__, alertname) ({firing})"
            lines += [f"  - {{expr: '{query}', eval_time: 18m, exp_samples: {samples}}}"]
    test.write_text("\n".join(lines) + "\n")
    lab.run("promtool", "check", "rules", RULES)
    lab.run("promtool", "test", "rules", test)
