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
                  "layers": layers, "width": 128, "parameters": 2_012_345, "weights": "3f9a" * 16,
                  "card": "A synthetic stand-in: no model was run to make these numbers."},
        "data": {"questions": 92, "entities": 10, "images": 120, "trials": 1120,
                 "dropped": [{"question": "half/two: What is half of two?", "reason": "the answer contains the entity"}]},
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
            "controls_by_split": {split: copy.deepcopy(controls) for split in ("image", "entity", "question", "random")},
            "verdict": {"image": verdict(0.86, 0.83 if seed else 0.72, 0.04), "entity": verdict(0.74, 0.71, 0.06),
                        "question": verdict(0.70, 0.55, 0.05), "random": verdict(0.89, 0.85, 0.03)},
        },
        "lens": {
            "convention": "norm, gold token", "text": text_lens, "visual": visual_lens, "visual_success": right,
            "visual_failure": wrong,
            "ci": {"text": band(text_lens, 0.02), "visual": band(visual_lens, 0.02),
                   "visual_success": band(right, 0.03), "visual_failure": band(wrong, 0.01)},
            "n": {"text": 948, "visual": 948, "visual_success": 410, "visual_failure": 538},
            "variants": {variant: {"text": [round(v * k, 4) for v in text_lens], "visual": [round(v * k, 4) for v in visual_lens]}
                         for variant, k in (("norm_gold", 1), ("bare_gold", 0.5), ("norm_generated", 1.02), ("bare_generated", 0.6))},
        },
        "cosine": {"pair": ["full_information", "visual"], "position": "last_input",
                   "success": curve(0.99, 0.93, layers, 1.5), "failure": curve(0.98, 0.82, layers, 1.5),
                   "ci": {"success": band(curve(0.99, 0.93, layers, 1.5), 0.004),
                          "failure": band(curve(0.98, 0.82, layers, 1.5), 0.008)},
                   "n": {"success": 410, "failure": 538}},
        "selective": {"n": 948, "methods note": "A trial is answered when its confidence is at least one half.", **methods},
        "gallery": [
            {"image": digit_image(seed + i), "entity": entity, "relation": relation,
             "question": f"What is the {relation} of the number in the image?", "gold": gold, "visual_answer": wrong_answer,
             "text_answer": gold, "identification_answer": entity, "confidence": 0.31 + 0.05 * i}
            for i, (entity, relation, gold, wrong_answer) in enumerate(
                [("seven", "successor", "eight", "five"), ("two", "square", "four", "nine"), ("zero", "double", "zero", ""),
                 ("nine", "complement", "one", "two"), ("three", "letters", "five", "four"), ("six", "parity", "even", "odd")])
        ],
    }  # fmt: skip


def results(names: tuple[str, ...] = ("llava", "instructblip")) -> dict[str, Any]:
    """Return results with one entry for each name in `names`; the second family has an even score with its control."""
    shapes = {"llava": (6, 0.38), "instructblip": (6, 0.62)}
    return {
        "schema": 1,
        "study": {"name": "synthetic", "title": "Numbers shown and numbers named (synthetic)", "seed": 7,
                  "config": {"folds": 5, "max_new_tokens": 10, "batch_size": 32}},
        "headline": "Named, the number's facts are recalled in 98.0 % of the rows that count; shown, in 40.0 % (LLaVA) and "
        "64.0 % (InstructBLIP). Synthetic numbers: no model was run.",
        "families": {name: family(name, *shapes.get(name, (32, 0.5)), seed) for seed, name in enumerate(names)},
        "versions": {"gapprobe": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
        "machine": {"cpu": "a made-up processor", "cores": 2},
        "steps": [{"family": name, "step": step, "seconds": seconds, "resumed": step == "capture" and i > 0}
                  for i, name in enumerate(names)
                  for step, seconds in (("capture", 71.4), ("judge", 0.4), ("probe", 12.9), ("lens", 3.1))],
    }  # fmt: skip


def with_nulls() -> dict[str, Any]:
    """Return one family in which everything that may be null is null, or has a hole in it."""
    made = results(("llava",))
    llava = made["families"]["llava"]
    empty = {"accuracy": None, "n": 0, "ci": None}
    llava["settings"] = {setting: dict(empty) for setting in llava["settings"]}
    llava["raw"]["guess_control"] = dict(empty)
    llava["gap"] = {"absolute": None, "relative": {"value": None, "ci": None, "n": 0}}
    llava["counted"]["n"] = 0
    llava["by_relation"][0] |= {"visual": None, "ci": None}
    llava["probe"]["image"] = {"auc": [None] * 7, "ci": [None] * 7, "n": 0}
    llava["probe"]["entity"]["auc"][2] = None
    llava["probe"]["entity"]["ci"][2] = None
    llava["probe"]["question"] = None
    llava["probe"]["controls"] = {"shuffled": None, "question_only": None, "layer_0": None}
    llava["probe"]["verdict"] = {"image": None, "entity": llava["probe"]["verdict"]["entity"]}
    llava["lens"]["visual_failure"] = None
    llava["lens"]["ci"]["visual_failure"] = None
    llava["lens"]["variants"]["bare_gold"] = None
    llava["cosine"] |= {"success": None, "failure": None, "ci": {"success": None, "failure": None}}
    llava["selective"]["probe"] = None
    llava["selective"]["ensemble"] |= {
        "aurc": None,
        "ci": {"coverage": None, "risk": None, "aurc": None},
        "curve": None,
    }
    llava["gallery"] = []
    llava["model"]["card"] = None
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
    made["study"]["config"]["note"] = HOSTILE
    llava = made["families"].pop("llava")
    made["families"][HOSTILE] = llava
    llava["model"] |= {"source": HOSTILE, "card": HOSTILE}
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
