"""The figures draw results.json's numbers as they are, and leave holes where there is no number."""

import pytest

from gapprobe.report import drawing, figures, series
from tests.report import synthetic


@pytest.fixture
def family():
    return synthetic.results()["families"]["llava"]


@pytest.fixture
def nulls():
    return synthetic.with_nulls()["families"]["llava"]


def traces(figure):
    return {(trace.name, trace.meta) if trace.meta else trace.name: trace for trace in figure.data if trace.name}


def test_gap_bars_are_the_accuracies_with_their_intervals(family):
    counting, every = traces(figures.gap_bars(family)).values()
    settings = ["text_only", "visual"]
    assert list(counting.x) == [family["settings"][key]["accuracy"] for key in settings]
    assert list(every.y) == list(series.SETTINGS.values())
    for trace, cells in ((counting, [family["settings"][key] for key in settings]), (every, family["raw"].values())):
        for value, up, down, cell in zip(trace.x, trace.error_x.array, trace.error_x.arrayminus, cells, strict=True):
            assert [value - down, value + up] == pytest.approx(cell["ci"])
    titles = [
        text.text for text in figures.gap_bars(family).layout.annotations if "<b>" in text.text and "n =" in text.text
    ]
    assert titles == ["<b>rows that count</b>, n = 948", "<b>all trials</b>, n = 1120"]


def test_layer_figures_draw_the_lists_and_their_bands(family):
    drawn = {
        "lens": figures.probability_by_layer(family),
        "probe": figures.probe_by_layer(family),
        "splits": figures.splits_by_layer(family),
        "cosine": figures.cosine_by_layer(family),
        "centred": figures.centred_cosine_by_layer(family),
    }
    lens, probe, cosine = family["lens"], family["probe"], family["cosine"]
    wanted = {
        "lens": {"text only": lens["text"], "visual": lens["visual"], "visual · right": lens["visual_success"],
                 "visual · wrong": lens["visual_failure"]},
        "probe": {"probe": probe["image"]["auc"], 
                  **{name: probe["controls"][key]["auc"] for key, name in series.CONTROLS.items()}},
        "splits": {name: probe[key]["auc"] for key, name in series.SPLITS.items()},
        "cosine": {key: cosine[key] for key in ("success", "failure")},
        "centred": {key: cosine["centred"][key] for key in ("success", "failure")},
    }  # fmt: skip
    for key, lines in wanted.items():
        found = traces(drawn[key])
        assert {name: list(trace.y) for name, trace in found.items()} == lines
        assert all(list(trace.x) == family["layers"] for trace in found.values())
    band = drawn["cosine"].data[0]
    low, high = zip(*cosine["ci"]["success"], strict=True)
    assert list(band.y) == [*low, *reversed(high)]


def test_variants_relations_and_curves_draw_their_numbers(family):
    variants = traces(figures.probability_variants(family))
    for key, name in series.VARIANTS.items():
        assert list(variants["text only", name].y) == family["lens"]["variants"][key]["text"]
        assert list(variants["visual", name].y) == family["lens"]["variants"][key]["visual"]
    relations = traces(figures.accuracy_by_relation(family))
    for key in ("text_only", "visual"):
        found = dict(zip(relations[series.SETTINGS[key]].y, relations[series.SETTINGS[key]].x, strict=True))
        assert found == {row["relation"]: row[key] for row in family["by_relation"]}
    curves = traces(figures.risk_coverage(family))
    for key, name in series.METHODS.items():
        if key not in family["selective"]:
            assert name not in curves
            continue
        method = family["selective"][key]
        assert [list(curves[name].x), list(curves[name].y)] == [method["curve"]["coverage"], method["curve"]["risk"]]
        dot = curves[f"{name} · threshold"]
        assert (dot.x[0], dot.y[0]) == (method["coverage"], method["risk"])


def test_null_leaves_a_hole_and_is_never_zero(nulls):
    assert figures.probe_by_layer(nulls) is None
    assert figures.cosine_by_layer(nulls) is None
    assert list(traces(figures.probability_by_layer(nulls))) == ["text only", "visual", "visual · right"]
    figure = figures.splits_by_layer(nulls)
    assert traces(figure)["by entity"].y[2] is None
    assert not traces(figure)["by entity"].connectgaps
    assert len([trace for trace in figure.data if trace.fill == "toself"]) == 3  # two beside the hole, one unbroken
    bars = figures.gap_bars(nulls)
    assert not len(bars.data[0].x)
    assert "guess control" not in bars.data[1].y
    assert [a.text for a in bars.layout.annotations].count("no rows") == 3
    assert "predecessor" in traces(figures.accuracy_by_relation(nulls))["visual"].y
    assert "successor" not in traces(figures.accuracy_by_relation(nulls))["visual"].y


def test_table_and_description_say_the_same_numbers(nulls):
    header, rows = drawing.table(figures.splits_by_layer(nulls))
    assert header == ["layer", "by entity", "random rows"]
    assert rows[2] == ["2", "not computed", "0.827 [0.807, 0.847]"]
    assert "by entity: from 0.590 [0.530, 0.650] at layer 0 to" in drawing.describe(figures.splits_by_layer(nulls))
    assert "successor" in drawing.describe(figures.accuracy_by_relation(nulls))


@pytest.mark.parametrize(
    ("places", "least", "wanted"),
    [
        ([0.1, 0.9], 0.2, [0.1, 0.9]),
        ([0.5, 0.5, 0.5], 0.2, [0.5, 0.7, 0.9]),
        ([1.0, 0.98], 0.1, [1.0, 0.9]),
        ([0.98, 1.0, 0.97], 0.1, [0.9, 1.0, 0.8]),
    ],
)
def test_labels_move_apart_and_stay_in_order_and_in_range(places, least, wanted):
    assert drawing.spread(places, least) == pytest.approx(wanted)


@pytest.mark.parametrize("layers", [[0, 1, 2], list(range(33)), [0, 10, 20, 40], list(range(81))])
def test_layer_ticks_are_few_and_whole(layers):
    ticks = drawing.layer_ticks(layers, most=12)
    assert layers[-1] / ticks["dtick"] <= 12
    assert isinstance(ticks["dtick"], int)


def test_families_share_their_axes():
    families = synthetic.results()["families"].values()
    low, high = series.shared_span(families, series.cosine, 0.9, 1)
    least = min(min(pair[0] for pair in f["cosine"]["ci"]["failure"]) for f in families)
    assert low <= least < low + 0.05
    assert high == 1


def test_plotly_markup_in_foreign_strings_stays_text():
    assert drawing.plain('<a href="javascript:x">') == '&lt;a href="javascript:x"&gt;'
    assert drawing.plain("a" * 50, 40) == "a" * 39 + "…"
