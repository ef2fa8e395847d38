"""Alerts and dashboards as they lie in the repository: what can be said without running them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import ROOT

RULES = [
    rule for group in yaml.safe_load((ROOT / "monitoring/rules.yml").read_text())["groups"] for rule in group["rules"]
]
TESTED = (ROOT / "tests/monitoring/rules.test.yml").read_text()
DASHBOARDS = sorted((ROOT / "monitoring/grafana/dashboards").glob("*.json"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_to_do_and_is_tested(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"]["summary"]
    page, _, heading = rule["annotations"]["runbook_url"].partition("#")
    text = (ROOT / page).read_text()
    assert not heading or heading in {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).strip().replace(" ", "-")
        for line in text.splitlines()
        if line[:1] == "#"
    }
    assert f'{{alertname="{rule["alert"]}"}}' in TESTED
    assert rule["for"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_well_formed(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"].startswith("jobstack-")
    assert "id" not in board, "it would belong to one Grafana"
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
        assert panel["datasource"]["uid"] == "prometheus", "the one in provisioning/datasources"
        assert [target["refId"] for target in panel["targets"]] == list("ABCD")[: len(panel["targets"])]
        assert panel["fieldConfig"]["defaults"]["unit"]
