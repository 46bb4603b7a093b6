"""Write Grafana's JSON of the dashboards under helm/; with --check, fail where it differs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dashboard_panels import DASHBOARDS, Dashboard, Panel

FOLDER = Path(__file__).parent.parent / "helm/briolette/dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24  # of Grafana's grid
HEIGHTS = {"timeseries": 8, "stat": 4, "bargauge": 8}
VALUES = {  # of a label to choose by
    "model": "label_values(briolette_requests_running, model)",
    "tenant": 'label_values(briolette_prompt_tokens_total{model=~"$model"}, tenant)',
}


def to_json(dashboard: Dashboard) -> dict[str, Any]:
    """What Grafana imports."""
    return {
        "uid": f"briolette-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["briolette"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [
            {
                "type": "dashboards",
                "tags": ["briolette"],
                "title": "Briolette",
                "asDropdown": True,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "templating": {"list": [_datasource(), *map(_variable, dashboard.variables)]},
        "panels": list(_panels(dashboard)),
    }


def _panels(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    """A header for each row; its panels stand beside each other, four at most."""
    y = 0
    for title, panels in dashboard.rows.items():
        yield {
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": _at(0, y),
        }
        y += 1
        num_columns = len(panels) if panels[0].kind == "stat" else min(4, len(panels))
        width = WIDTH // num_columns
        for start in range(0, len(panels), num_columns):
            line = panels[start : start + num_columns]
            height = HEIGHTS[line[0].kind]
            for column, panel in enumerate(line):
                yield {**_panel(panel), "gridPos": _at(column * width, y, width, height)}
            y += height


def _panel(panel: Panel) -> dict[str, Any]:
    custom = {
        "fillOpacity": 20 if panel.is_stacked else 5,
        "stacking": {"mode": "normal" if panel.is_stacked else "none"},
        "showPoints": "never",
    }
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": SOURCE,
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "custom": custom if panel.kind == "timeseries" else {},
            },
            "overrides": [],
        },
        "options": {"tooltip": {"mode": "multi"}} if panel.kind == "timeseries" else {},
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": SOURCE,
                "expr": query,
                "legendFormat": legend,
                "range": panel.kind == "timeseries",
                "instant": panel.kind != "timeseries",
            }
            for i, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _at(x: int, y: int, width: int = WIDTH, height: int = 1) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _datasource() -> dict[str, Any]:
    return {"type": "datasource", "name": "datasource", "label": "Source", "query": "prometheus"}


def _variable(label: str) -> dict[str, Any]:
    return {
        "type": "query",
        "name": label,
        "label": label.capitalize(),
        "datasource": SOURCE,
        "query": {"query": VALUES[label], "refId": label},
        "refresh": 2,  # whenever the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def main() -> int:
    texts = {
        FOLDER / f"{dashboard.name}.json": json.dumps(to_json(dashboard), indent=1) + "\n"
        for dashboard in DASHBOARDS
    }
    if "--check" not in sys.argv[1:]:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            path.write_text(text)
        return 0
    stale = {path for path, text in texts.items() if not path.exists() or path.read_text() != text}
    stale |= set(FOLDER.glob("*.json")) - set(texts)
    for path in sorted(stale):
        print(f"{path.name} is not what scripts/dashboards.py writes; run it.")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
