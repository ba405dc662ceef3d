"""docs/metrics.md and deploy/observability against a server's export, and Prometheus' own tool."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from server.helpers import client_of

import octavo
from octavo.core import EngineStats
from octavo.testing.fake_engine import FakeEngine

ROOT = Path(octavo.__file__).parents[1]
PAGE = (ROOT / "docs" / "metrics.md").read_text()
DEPLOY = ROOT / "deploy" / "observability"
RULES = (DEPLOY / "rules.yml").read_text()
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
# Recorded series are named instance:metric:operation, so what follows a colon is none of ours.
METRIC_NAME = r"(?<![\w:])(?:octavo|process)_\w+"
RECORDED_NAME = r"(?<!\w)instance:\w+:\w+"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="needs promtool, of Debian's package prometheus",
)


class BusyEngine(FakeEngine):
    """Says something of everything that has labels."""

    def stats(self) -> EngineStats:
        return msgspec.structs.replace(
            super().stats(),
            waiting_by_reason={"blocks": 1},
            num_transfers={"device_to_host": 1},
            adapters={"sql": (1, 2)},
            max_loras=2,
        )

    @property
    def settings(self) -> list[tuple[str, str, str, str]]:
        return [*super().settings, ("count_expert_tokens", "True", "flag", "")]

    async def expert_tokens(self) -> dict[str, list[int]]:
        return {"blocks.0.mlp": [900, 100], "blocks.1.mlp": [500, 500]}


@pytest.fixture
async def exported() -> dict[str, Metric]:
    """What a server exports after it was used, by the name under which the page has it."""
    async with client_of(BusyEngine()) as client:
        await client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 5})
        text = (await client.get("/metrics")).text
    return {
        family.name + ("_total" if family.type == "counter" else ""): family
        for family in text_string_to_metric_families(text)
    }


@pytest.fixture
def series(exported: dict[str, Metric]) -> dict[str, set[str]]:
    """Labels by name as in queries: those of histograms end with _bucket, _sum and _count."""
    return {
        sample.name: {"job", "instance", *sample.labels}
        for family in exported.values()
        for sample in family.samples
    }


def documented() -> dict[str, tuple[str, set[str]]]:
    """The page's tables: type and labels of each metric."""
    rows = re.findall(rf"^\| `({METRIC_NAME})` \| (\w+) \| ([^|]*) \|", PAGE, re.M)
    found = {name: (kind, set(re.findall(r"\w+", labels))) for name, kind, labels in rows}
    assert len(found) == len(rows), "a metric is in two tables"
    return found


def panels() -> list[dict]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def dashboard_queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def documented_queries() -> list[str]:
    blocks = re.findall(r"```promql\n(.*?)```", PAGE, re.S)
    return [line for block in blocks for line in block.splitlines()]


def promtool(*arguments: object) -> None:
    run = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


async def test_the_page_has_what_a_server_exports_and_nothing_else(exported):
    labels = {
        name: {label for sample in family.samples for label in sample.labels} - {"le"}
        for name, family in exported.items()
    }
    assert documented() == {name: (family.type, labels[name]) for name, family in exported.items()}


@pytest.mark.parametrize("queries", [documented_queries(), dashboard_queries(), [RULES]])
async def test_queries_name_series_that_a_server_exports(series, queries):
    text = "\n".join(queries)
    names = set(re.findall(METRIC_NAME, text))
    assert len(names) > 10
    assert names <= set(series)
    for name, matchers in re.findall(rf"({METRIC_NAME})\{{([^}}]*)\}}", text):
        assert set(re.findall(r"(\w+)=", matchers)) <= series[name], name


def test_recorded_series_exist():
    recorded = re.findall(r"record: (\S+)", RULES)
    assert len(recorded) == len(set(recorded))
    assert set(re.findall(RECORDED_NAME, RULES)) == set(recorded)
    assert set(re.findall(RECORDED_NAME, "\n".join(dashboard_queries()))) <= set(recorded)


def test_the_dashboard_shows_all_metrics_of_ours():
    shown = "\n".join(dashboard_queries())
    ours = [name for name in documented() if name.startswith("octavo_")]
    assert [name for name in ours if name not in shown] == []


def test_the_dashboard_asks_the_data_source_that_the_reader_chooses():
    variables = DASHBOARD["templating"]["list"]
    assert [v["name"] for v in variables if v["type"] == "datasource"] == ["datasource"]
    for asking in (*panels(), *(v for v in variables if v["type"] == "query")):
        assert asking["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


async def test_the_dashboards_objectives_are_bounds_of_buckets(exported):
    [objective] = [v for v in DASHBOARD["templating"]["list"] if v["name"] == "objective"]
    samples = exported["octavo_time_to_first_token_seconds"].samples
    assert set(objective["query"].split(",")) <= {s.labels.get("le") for s in samples}


def test_every_alert_has_a_test_in_which_it_fires():
    alerts = set(re.findall(r"alert: (\w+)", RULES))
    text = (DEPLOY / "rules_test.yml").read_text()
    assert alerts == set(re.findall(r'\{alertname="(\w+)"', text))


@needs_promtool
def test_promtool_accepts_the_configuration_and_the_rules_and_the_alerts_pass_their_tests():
    promtool("check", "config", DEPLOY / "prometheus.yml")
    promtool("check", "rules", "--lint-fatal", DEPLOY / "rules.yml")
    promtool("test", "rules", DEPLOY / "rules_test.yml")


@needs_promtool
def test_promtool_can_read_every_query_of_the_page_and_of_the_dashboard(tmp_path):
    queries = documented_queries() + dashboard_queries()
    rules = [
        {"record": f"query:{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, query in enumerate(queries)
    ]
    file = tmp_path / "rules.yml"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", file)


@needs_promtool
async def test_promtool_finds_nothing_to_say_about_names_and_types():
    async with client_of(BusyEngine()) as client:
        text = (await client.get("/metrics")).text
    run = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout + run.stderr) == (0, "")
