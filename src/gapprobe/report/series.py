"""What the report draws as lines: names, colours, and the numbers of results.json picked out for each of them.

Nothing is computed here. Colours are Okabe and Ito's; dashes and labels tell the lines apart as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any

Family = Mapping[str, Any]
Number = int | float
Span = tuple[Number, Number]
Ends = Sequence[Number | None] | None

BLUE, ORANGE, VERMILION, GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"
SKY, PURPLE, GREY = "#56B4E9", "#CC79A7", "#7F7F7F"
SETTINGS = {
    "identification": "identification",
    "full_information": "full information",
    "text_only": "text only",
    "visual": "visual",
    "guess_control": "guess control",
}
SPLITS = {"image": "by image", "entity": "by entity", "question": "by question", "random": "random rows"}
CONTROLS = {"question_only": "question only", "layer_0": "layer 0", "shuffled": "shuffled labels"}
METHODS = {
    "perplexity": "perplexity",
    "probe": "probe",
    "ensemble": "mean of both",
    "stacked": "stacked",
    "self_consistency": "samples agree",
}
READERS = {"log_prob": "log-probability", "letter": "letter", "option": "option's text", "either": "letter or text"}
VARIANTS = {
    "norm_gold": "final norm, gold",
    "bare_gold": "no norm, gold",
    "norm_generated": "final norm, generated",
    "bare_generated": "no norm, generated",
}


@dataclass(frozen=True)
class Series:
    """One line of a figure: `y` over `x`, with `None` where a value could not be computed."""

    name: str
    x: Sequence[Number]
    y: Sequence[Number | None]
    color: str
    ci: Sequence[Ends] = ()
    dash: str = "solid"
    width: Number = 2.6

    @property
    def known(self) -> bool:
        """Whether there is any value to draw."""
        return any(value is not None for value in self.y)

    @property
    def extremes(self) -> list[Number]:
        """All values and interval ends that exist."""
        return [v for v in self.y if v is not None] + [end for ci in self.ci for end in ends(ci) or ()]


def ends(ci: Ends) -> Span | None:
    """Return both ends of an interval, or None where there is none: `null` or `[null, null]` in results.json."""
    low, high = ci or (None, None)
    return None if low is None or high is None else (low, high)


def number(value: Number | None, digits: int = 3) -> str:
    """Write a number, or say that there is none."""
    return "not computed" if value is None else f"{value:.{digits}f}".replace("-", "−")


def small(value: Number) -> str:
    """Write a p-value with its sign of equality: two digits, or how small it is."""
    return f"= {value:.2g}" if value >= 1e-4 else "< 0.0001"


def percent(value: Number | None, digits: int = 1) -> str:
    """Write a share as a percentage, or say that there is none."""
    return "not computed" if value is None else f"{number(100 * value, digits)}\u202f%"


def interval(ci: Ends, scale: Number = 1, digits: int = 3) -> str:
    """Write an interval in brackets; an empty string where there is none."""
    pair = ends(ci)
    return f"[{number(scale * pair[0], digits)}, {number(scale * pair[1], digits)}]" if pair else ""


def headline_split(family: Family) -> str:
    """Return the split that the probe figure's controls belong to: the first that the trials could be cut by."""
    return next(iter(family["probe"]["controls_by_split"]), "image")


def seen(family: Family) -> bool:
    """Return whether the model's activations were seen; those of a model behind a server are not."""
    return family["probe"] is not None


def lens(family: Family) -> list[Series]:
    """Probability of the answer: text only, visual, and the visual one by outcome."""
    styles = {
        "text": ("text only", BLUE, "solid", 2.6),
        "visual": ("visual", VERMILION, "solid", 2.6),
        "visual_success": ("visual · right", VERMILION, "dash", 1.3),
        "visual_failure": ("visual · wrong", VERMILION, "dot", 1.3),
    }
    return [_line(family, family["lens"], key, *style) for key, style in styles.items()]


def probe(family: Family) -> list[Series]:
    """AUC of the probe under the headline split, and of its controls under the same folds."""
    cells, controls = family["probe"], family["probe"]["controls"]
    return [
        _auc(family, cells.get(headline_split(family)), "probe", GREEN),
        _auc(family, controls.get("question_only"), CONTROLS["question_only"], ORANGE, "dash", 1.9),
        _auc(family, controls.get("layer_0"), CONTROLS["layer_0"], SKY, "dashdot", 1.9),
        _auc(family, controls.get("shuffled"), CONTROLS["shuffled"], GREY, "dot", 1.9),
    ]


def splits(family: Family) -> list[Series]:
    """AUC of the same probe under every split."""
    styles = ((GREEN, "solid"), (PURPLE, "dash"), (SKY, "dashdot"), (GREY, "dot"))
    named = zip(SPLITS.items(), styles, strict=True)
    return [_auc(family, family["probe"].get(key), name, *style) for (key, name), style in named]


def cosine(family: Family) -> list[Series]:
    """Cosine similarity for linking successes and failures."""
    return _outcomes(family, family["cosine"])


def centred_cosine(family: Family) -> list[Series]:
    """The same after the mean of all states compared at that layer was taken away."""
    return _outcomes(family, family["cosine"].get("centred") or {})


def risk(family: Family) -> dict[str, Series]:
    """Risk over coverage, by method."""
    styles = {
        "perplexity": (ORANGE, "dash"),
        "probe": (GREEN, "solid"),
        "ensemble": (PURPLE, "dashdot"),
        "stacked": (SKY, "dot"),
        "self_consistency": (GREY, "longdash"),
    }
    curves = {key: (family["selective"][key] or {}).get("curve") or {} for key in styles if key in family["selective"]}
    return {
        key: Series(METHODS[key], curve.get("coverage") or [], curve.get("risk") or [], color, dash=dash)
        for key, (color, dash) in styles.items()
        if (curve := curves.get(key)) is not None
    }


def shared_span(families: Iterable[Family], lines: Callable[[Family], list[Series]], low: Number, high: Number) -> Span:
    """Return one axis range for all families, at least `low` to `high`, so that figures side by side compare."""
    values = [value for family in families for line in lines(family) for value in line.extremes]
    return round(floor(20 * min([low, *values])) / 20, 2), round(ceil(20 * max([high, *values])) / 20, 2)


def _line(
    family: Family, cells: Mapping[str, Any], key: str, name: str, color: str, dash: str, width: Number = 2.6
) -> Series:
    intervals = (cells.get("ci") or {}).get(key) or ()
    return Series(name, family["layers"], cells.get(key) or [], color, intervals, dash, width)


def _auc(
    family: Family, cells: Mapping[str, Any] | None, name: str, color: str, dash: str = "solid", width: Number = 2.6
) -> Series:
    cells = cells or {}
    return Series(name, family["layers"], cells.get("auc") or [], color, cells.get("ci") or (), dash, width)


def _outcomes(family: Family, cells: Mapping[str, Any]) -> list[Series]:
    return [
        _line(family, cells, "success", "success", GREEN, "solid"),
        _line(family, cells, "failure", "failure", VERMILION, "dash"),
    ]
