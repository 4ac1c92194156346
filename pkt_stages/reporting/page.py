"""The page: one HTML file with everything in it."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined


def page(**content: Any) -> str:
    """Fill report.html.j2, which names what it needs."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = files("pkt_stages.reporting").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text).render(**content)
