"""Made-up results for tests of the report: every number comes from a formula, none from a model.

`results()` follows docs/results.md with two families; the other builders change one thing each.
"""

import base64
import copy
import io
import math
from typing import Any

import numpy as np
from PIL import Image

RELATIONS = (
    "successor",
    "predecessor",
    "double",
    "square",
    "complement",
    "parity",
    "prime",
    "letters",
    "roman",
    "half",
)
SPLITS = ("image", "entity", "question", "random")
VARIANTS = {"norm_gold": 1, "bare_gold": 0.5, "norm_generated": 1.02, "bare_generated": 0.6}
FAILURES = (
    ("seven", "successor", "eight", "five"),
    ("two", "square", "four", "nine"),
    ("zero", "double", "zero", ""),
    ("nine", "complement", "one", "two"),
    ("three", "letters", "five", "four"),
    ("six", "parity", "even", "odd"),
)
HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=\"alert('pwned')\">\u2028'\"&<b>bold</b>"


def accuracy(value: float, n: int) -> dict[str, Any]:
    half = 1.96 * math.sqrt(value * (1 - value) / n)
    return {"accuracy": value, "n": n, "ci": [max(0.0, value - half), min(1.0, value + half)]}


def curve(first: float, last: float, layers: int, bend: float = 3.0) -> list[float]:
    steps = [(layer / layers) ** bend for layer in range(layers + 1)]
    return [round(first + (last - first) * step, 4) for step in steps]


def band(values: list[float], half: float) -> list[list[float]]:
    return [[max(0.0, round(v - half, 4)), min(1.0, round(v + half, 4))] for v in values]


def by_layer(values: list[float], half: float, n: int) -> dict[str, Any]:
    return {"auc": values, "ci": band(values, half), "n": n}


def digit_image(seed: int, size: int = 28) -> str:
    y, x = np.mgrid[0:size, 0:size]
    radius = np.hypot(x - size / 2, (y - size / 2) * (0.8 + 0.1 * (seed % 4)))
    ink = np.exp(-((radius - size / 3.5) ** 2) / 4) * 255
    stream = io.BytesIO()
    Image.fromarray(ink.astype(np.uint8)).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def verdict(auc: float, control: float, half: float) -> dict[str, Any]:
    difference = round(auc - control, 3)
    beats = difference - half > 0
    outcome = "beats" if beats else "does not beat"
    return {
        "chosen": "nested",
        "probe": {"auc": auc, "ci": [auc - half, auc + half]},
        "control": "question_only",
        "control_auc": {"auc": control, "ci": [control - half, control + half]},
        "difference": {"value": difference, "ci": [difference - half, difference + half]},
        "beats": beats,
        "sentence": f"At the layer chosen on the training folds the probe reaches AUC {auc:.2f}; its best control, the "
        f"question alone, reaches {control:.2f}: the probe {outcome} it beyond the 95 % interval.",
    }


def family(name: str, layers: int, visual: float, seed: int) -> dict[str, Any]:
    text_lens, visual_lens = curve(0.0, 0.92, layers, 2.0), curve(0.0, visual * 0.8, layers, 4.0)
    right, wrong = curve(0.0, 0.71, layers, 3.0), curve(0.0, 0.09, layers, 5.0)
    probe = curve(0.71, 0.86, layers, 0.5)
    controls = {
        "shuffled": by_layer([0.5 + 0.01 * math.sin(i + seed) for i in range(layers + 1)], 0.05, 900),
        "question_only": by_layer([0.83] * (layers + 1), 0.03, 900),
        "layer_0": by_layer([probe[0]] * (layers + 1), 0.04, 900),
    }
    coverage = [round(0.01 * i, 2) for i in range(1, 101)]
    methods = {}
    for shift, method in enumerate(("perplexity", "probe", "ensemble")):
        scale = 0.62 - 0.06 * shift
        risk = [round(scale * (0.35 + 0.65 * c), 4) for c in coverage]
        share, wrongly = 0.42 + 0.03 * shift, 0.41 - 0.04 * shift
        methods[method] = {
            "coverage": share,
            "risk": wrongly,
            "aurc": scale * 0.68,
            "n": 900,
            "ci": {
                "coverage": [share - 0.03, share + 0.03],
                "risk": [wrongly - 0.04, wrongly + 0.04],
                "aurc": [scale * 0.64, scale * 0.72],
            },
            "curve": {"coverage": coverage, "risk": risk},
        }
    raw = {"identification": 0.93, "full_information": 0.97, "text_only": 0.96, "visual": visual, "guess_control": 0.08}
    counted = {"full_information": 1.0, "text_only": 0.98, "visual": visual + 0.02, "guess_control": 0.0}
    return {
        "model": {"source": f"demo/{name}", "family": name, "architecture": f"{name.title()}ForConditionalGeneration",
                  "layers": layers, "width": 128, "parameters": 2_012_345, "weights": "3f9a" * 16, "revision": ""},
        "config": {"name": name, "seed": 7 + seed, "max_new_tokens": 10, "probe": {"folds": 5, "c": 1.0}},
        "data": {"questions": 92, "entities": 10, "images": 120, "trials": 1120,
                 "dropped": [{"question": "What is half of two?", "reason": "the answer contains the entity"}]},
        "rows": {"run": 5600, "failed": 0, "failures": []},
        "raw": {setting: accuracy(value, 1120) for setting, value in raw.items()},
        "counted": {"n": 948, "excluded": {"identification wrong": 78, "full information wrong": 32,
                                           "guess control right": 62, "could not be run": 0}},
        "settings": {setting: accuracy(value, 948) for setting, value in counted.items()},
        "gap": {"absolute": {"value": 0.96 - visual, "ci": [0.92 - visual, 1.0 - visual], "n": 948},
                "relative": {"value": 1 - visual / 0.98, "ci": [0.95 - visual / 0.98, 1.04 - visual / 0.98], "n": 948}},
        "by_relation": [
            {"relation": relation, "text_only": 0.9 + 0.01 * i, "visual": visual * (0.4 + 0.12 * i), "n": 60 + i,
             "ci": [visual * (0.4 + 0.12 * i) * 0.85, min(1.0, visual * (0.4 + 0.12 * i) * 1.15)]}
            for i, relation in enumerate(RELATIONS)
        ],
        "layers": list(range(layers + 1)),
        "probe": {
            "position": "last_input", "target": "visual answer right", "n": 948, "positives": 410, "folds": 5,
            "image": by_layer(probe, 0.03, 948),
            "entity": by_layer([round(v - 0.12, 4) for v in probe], 0.06, 948),
            "question": by_layer([round(v - 0.16, 4) for v in probe], 0.05, 948),
            "random": by_layer([round(v + 0.03, 4) for v in probe], 0.02, 948),
            "controls": controls,
            "controls_by_split": {split: copy.deepcopy(controls) for split in SPLITS},
            "verdict": {"image": verdict(0.86, 0.83 if seed else 0.72, 0.04), "entity": verdict(0.74, 0.71, 0.06),
                        "question": verdict(0.70, 0.55, 0.05), "random": verdict(0.89, 0.85, 0.03)},
        },
        "lens": {
            "convention": "final norm, gold token", "text": text_lens, "visual": visual_lens, "visual_success": right,
            "visual_failure": wrong,
            "ci": {"text": band(text_lens, 0.02), "visual": band(visual_lens, 0.02),
                   "visual_success": band(right, 0.03), "visual_failure": band(wrong, 0.01)},
            "n": {"text": 948, "visual": 948, "visual_success": 410, "visual_failure": 538},
            "variants": {variant: {"text": [round(v * scale, 4) for v in text_lens],
                                   "visual": [round(v * scale, 4) for v in visual_lens]}
                         for variant, scale in VARIANTS.items()},
        },
        "cosine": {"pair": ["full_information", "visual"], "position": "last_input",
                   "success": curve(0.99, 0.93, layers, 1.5), "failure": curve(0.98, 0.82, layers, 1.5),
                   "ci": {"success": band(curve(0.99, 0.93, layers, 1.5), 0.004),
                          "failure": band(curve(0.98, 0.82, layers, 1.5), 0.008)},
                   "n": {"success": 410, "failure": 538},
                   "centred": {"success": curve(0.0, 0.81, layers, 0.7), "failure": curve(0.0, 0.42, layers, 0.7),
                               "ci": {"success": band(curve(0.0, 0.81, layers, 0.7), 0.03),
                                      "failure": band(curve(0.0, 0.42, layers, 0.7), 0.04)},
                               "n": {"success": 410, "failure": 538}}},
        "selective": {"n": 948, "left_out": 4, "split": "image",
                      "operating_point": "answer when the probability of being right is at least 0.5", **methods},
        "gallery": [
            {"image": digit_image(seed + i), "entity": entity, "relation": relation,
             "question": f"What is the {relation} of the number in the image?", "gold": gold, "visual_answer": said,
             "text_answer": gold, "identification_answer": entity}
            for i, (entity, relation, gold, said) in enumerate(FAILURES)
        ],
    }  # fmt: skip


def results(names: tuple[str, ...] = ("llava", "instructblip")) -> dict[str, Any]:
    """Return results with one entry for each name in `names`; the second family has an even score with its control."""
    shapes = {"llava": (6, 0.38), "instructblip": (6, 0.62)}
    return {
        "schema": 1,
        "study": {"title": "Numbers shown and numbers named (synthetic)", "names": list(names),
                  "note": "Synthetic: every number comes from a formula, no model was run."},
        "headline": " ".join(
            f"{name} answers 98% of 948 questions about an object that is named, and {share}% when it is only shown: a "
            "gap of 58 points, 95 % interval 54 to 62. The probe (layers 4, 5, chosen on training rows only) reaches "
            "an AUC of 0.860 [0.820, 0.900], its best control 0.830 [0.790, 0.870]."
            for name, share in zip(names, (40, 64, 52), strict=False)
        ),
        "families": {name: family(name, *shapes.get(name, (32, 0.5)), seed) for seed, name in enumerate(names)},
        "versions": {"gapprobe": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
        "machine": {"cpu": "a made-up processor", "cores": 2},
        "steps": [{"family": name, "step": step, "seconds": seconds}
                  for name in names
                  for step, seconds in (("capture", 71.4), ("judge", 0.4), ("probe", 12.9), ("lens", 3.1))],
    }  # fmt: skip


def with_nulls() -> dict[str, Any]:
    """Return one family in which no trial counts, but for a few lines with a hole in them."""
    made = results(("llava",))
    llava = made["families"]["llava"]
    missing = {"accuracy": None, "n": 0, "ci": [None, None]}
    no_auc = {"auc": [None] * 7, "ci": [[None, None]] * 7, "n": 0}
    llava["settings"] = {setting: dict(missing) for setting in llava["settings"]}
    llava["raw"]["guess_control"] = dict(missing)
    llava["gap"] = {part: {"value": None, "ci": [None, None], "n": 0} for part in ("absolute", "relative")}
    llava["counted"]["n"] = 0
    llava["by_relation"][0] |= {"visual": None, "ci": [None, None]}
    llava["probe"] |= {"image": no_auc, "question": no_auc, "why_not": "No probe was fitted: all 0 labels are False."}
    llava["probe"]["entity"]["auc"][2] = None
    llava["probe"]["entity"]["ci"][2] = [None, None]
    llava["probe"]["controls"] = dict.fromkeys(llava["probe"]["controls"], no_auc)
    llava["probe"]["verdict"] = {}
    llava["lens"]["visual_failure"] = [None] * 7
    llava["lens"]["ci"]["visual_failure"] = [[None, None]] * 7
    llava["lens"]["n"]["visual_failure"] = 0
    llava["lens"]["variants"]["bare_gold"] = {"text": [None] * 7, "visual": [None] * 7}
    for cosine in (llava["cosine"], llava["cosine"]["centred"]):
        cosine |= {"success": [None] * 7, "failure": [None] * 7}
        cosine["ci"] = {"success": [[None, None]] * 7, "failure": [[None, None]] * 7}
    for method in ("probe", "ensemble"):
        llava["selective"][method] = {
            "coverage": None,
            "risk": None,
            "aurc": None,
            "n": 0,
            "ci": {"coverage": [None, None], "risk": [None, None], "aurc": [None, None]},
            "curve": {"coverage": [], "risk": []},
        }
    llava["gallery"] = []
    made["study"]["note"] = ""
    return made


def with_failures() -> dict[str, Any]:
    """Return two families, the first with rows that could not be run."""
    made = results()
    made["families"]["llava"]["rows"] = {
        "run": 5585, "failed": 15,
        "failures": [{"kind": "image", "error": "images/7_03.png is empty (0 bytes): replace the file", "n": 10},
                     {"kind": "prompt", "error": "the prompt is longer than the model's 2048 positions", "n": 5}],
    }  # fmt: skip
    made["families"]["llava"]["counted"]["excluded"]["could not be run"] = 15
    return made


def hostile() -> dict[str, Any]:
    """Return results in which every string that a model, a file or a user wrote tries to break out of the page."""
    made = with_failures()
    made["headline"] += HOSTILE
    made["study"]["title"] += HOSTILE
    made["study"]["note"] = HOSTILE
    llava = made["families"].pop("llava")
    made["families"][HOSTILE] = llava
    llava["model"]["source"] = HOSTILE
    llava["config"]["name"] = HOSTILE
    llava["by_relation"][0]["relation"] = HOSTILE
    llava["rows"]["failures"][0]["error"] = HOSTILE
    llava["data"]["dropped"][0]["question"] = HOSTILE
    llava["probe"]["verdict"]["image"]["sentence"] = HOSTILE
    for card in llava["gallery"]:
        card |= {"question": HOSTILE, "gold": HOSTILE, "visual_answer": HOSTILE, "entity": HOSTILE}
    llava["gallery"][0]["image"] = 'data:image/svg+xml;base64,PHN2Zy8+" onerror="alert(1)'
    llava["gallery"][1]["image"] = "https://example.org/track.png"
    llava["gallery"][2]["image"] = "data:image/png;base64," + base64.b64encode(b"<svg onload=alert(1)>").decode()
    made["versions"][HOSTILE] = HOSTILE
    return made


def with_details(text: str = "two") -> dict[str, Any]:
    """Return one family with everything that a study may hold beside the rest; `text` is what the model said."""
    made = results(("llava",))
    llava = made["families"]["llava"]
    share, gap = accuracy(0.9, 900), {"value": 0.25, "n": 900, "ci": [0.2, 0.3]}
    cells = {"n": 900, "text_only": share, "visual": accuracy(0.65, 900), "gap": gap}
    llava["gap"] |= {
        "ci_by": {"entity": [0.41, 0.71], "question": [0.42, 0.72], "image": [0.43, 0.73]},
        "mcnemar": {"only_told": 321, "only_shown": 12, "p": 1e-30},
    }
    llava["published"] = {"name": "gpt-4o/mnist", "text_only": 1.0, "visual": 0.68, "gap": 0.32}
    said = {"question": f"q{text}", "setting": "visual", "image": "i", "gold": "12", "answer": text}
    llava["judges"] = {
        "by_judge": {"sound": cells, "published": {**cells, "n": 850}},
        "agreement": [],
        "answers": 3000,
        "differ": 31,
        "disagreements": [{**said, "sound": False, "published": True}],
    }
    read = {"counted": {"n": 500}, "settings": {"text_only": share, "visual": share}, "gap": {"absolute": gap}}
    llava["choices"] = {
        "options": 4,
        "questions": 77,
        "by": {"log_prob": None, "letter": read, "either": read},
        "log_prob_of": "",
        "why_not": f"letters are no tokens of this model, nor {text}",
    }
    leak = {
        "layer": 4,
        "published": accuracy(0.81, 900),
        "grouped": accuracy(0.56, 900),
        "difference": {"value": 0.25, "n": 900, "ci": [0.19, 0.31]},
    }
    llava["recipe"] = {"n": 900, "majority": 0.62, "leakage": {"question": leak, "entity": leak}}
    llava["selective"]["stacked"] = llava["selective"]["ensemble"]
    llava["selective"] |= {
        "measures": [
            {"method": method, "measure": measure, "value": value, "n": 900, "ci": [None, None]}
            for method in ("perplexity", "probe", "ensemble", "stacked")
            for measure, value in (("aurc", 0.123), ("ece", None))
        ],
        "guarantees": [
            {"confidence": "mean_log_prob", "by": "sgr", "risk": 0.1, "sentence": f"Answer nothing, {text}."}
        ],
    }
    return made
