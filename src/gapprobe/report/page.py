"""The HTML page of a study: what results.json says, in figures, tables and words, in one file that needs no network.

plotly.js and all else stand in the file once. Its content security policy forbids every request and every script but
the two whose hashes it names, and results enter it escaped only, so nothing that a model wrote can run.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import plotly.io
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs

from gapprobe import files
from gapprobe.errors import DataError
from gapprobe.report import drawing, figures, series
from gapprobe.report.series import Ends, Family, Number
from gapprobe.study.headline import family_name

TINY = 160  # pixels; a smaller image is enlarged with crisp pixels
_DATA_URI = re.compile(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/]+={0,2})")


def write_report(results: Mapping[str, Any], out: Path) -> Path:
    """Write the report of `results` (docs/results.md) to the file `out`, atomically, and return its path.

    Raises:
        DataError: the results hold NaN or an infinity, which JSON cannot.
        OutputError: `out` cannot be written, or there is no room left.
    """
    files.write_bytes(out, render_report(results).encode())
    return out


def render_report(results: Mapping[str, Any]) -> str:
    """Return the report as the text of an HTML file. The same results give the same text.

    Raises:
        DataError: the results hold NaN or an infinity, which JSON cannot.
    """
    try:
        json.dumps(results, allow_nan=False)
    except ValueError as error:
        raise DataError(f"these results cannot be reported: {error}; a number that does not exist is null") from error
    package = resources.files("gapprobe.report")
    template, style, script = (
        (package / name).read_text(encoding="utf-8") for name in ("template.html", "style.css", "report.js")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters: dict[str, Callable[..., Any]] = environment.filters
    filters.update(
        number=series.number,
        percent=series.percent,
        interval=series.interval,
        percents=_percents,
        small=series.small,
        points=_points,
        image=checked_image,
        pretty=_pretty,
    )
    families: Mapping[str, Family] = results["families"]
    scripts = {"plotly": get_plotlyjs(), "report": script}
    return environment.from_string(template).render(
        results=results,
        families={name: family_name(name, family) for name, family in families.items()},
        figures=_panels(families),
        words=series,
        style=Markup(style),
        scripts={name: Markup(text) for name, text in scripts.items()},
        hashes=" ".join(f"'sha256-{_sha256(text)}'" for text in scripts.values()),
    )


def checked_image(uri: str) -> dict[str, Any] | None:
    """Return `uri` and whether the image is tiny if it is a PNG or JPEG written as data, else None."""
    match = _DATA_URI.fullmatch(uri)
    if match is None:
        return None
    try:
        with Image.open(io.BytesIO(base64.b64decode(match[2], validate=True)), formats=[match[1].upper()]) as image:
            return {"uri": uri, "tiny": max(image.size) < TINY}
    except (binascii.Error, OSError, Image.DecompressionBombError):
        return None


def _percents(ci: Ends) -> str:
    return series.interval(ci, 100, 1)


def _points(share: Number | None) -> str:
    return series.number(None if share is None else 100 * share, 1)


def _pretty(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def _panels(families: Mapping[str, Family]) -> dict[str, list[dict[str, Any]]]:
    """Draw every figure for every family, on axes that the families share."""
    seen = [family for family in families.values() if series.seen(family)]
    auc = series.shared_span(seen, lambda f: series.probe(f) + series.splits(f), 0.4, 1)
    cosine = series.shared_span(seen, series.cosine, 0.9, 1)
    centred = series.shared_span(seen, series.centred_cosine, 0, 1)
    risk = series.shared_span(seen, lambda f: list(series.risk(f).values()), 0, 0.1)
    outside: dict[str, Callable[[Family], Any]] = {
        "gap": figures.gap_bars,
        "relation": figures.accuracy_by_relation,
    }
    inside: dict[str, Callable[[Family], Any]] = {
        "lens": figures.probability_by_layer,
        "variants": figures.probability_variants,
        "cosine": lambda f: figures.cosine_by_layer(f, cosine),
        "centred": lambda f: figures.centred_cosine_by_layer(f, centred),
        "probe": lambda f: figures.probe_by_layer(f, auc),
        "splits": lambda f: figures.splits_by_layer(f, auc),
        "risk": lambda f: figures.risk_coverage(f, risk[1]),
    }
    return {
        key: [
            _panel(f"{key}-{place}", make(family) if key in outside or series.seen(family) else None)
            for place, family in enumerate(families.values())
        ]
        for key, make in (outside | inside).items()
    }


def _panel(name: str, figure: Any) -> dict[str, Any]:
    """Return what the template needs of one figure: its id, its JSON safe inside a script element, its words."""
    if figure is None:
        return {"id": name, "json": None}
    header, rows = drawing.table(figure)
    text = str(plotly.io.to_json(figure, engine="json", pretty=False))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return {
        "id": name,
        "json": Markup(text),
        "height": figure.layout.height,
        "description": drawing.describe(figure),
        "header": header,
        "rows": rows if len(rows) <= 60 else [],
    }


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
