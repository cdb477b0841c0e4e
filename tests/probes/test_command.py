"""`gapprobe probe`: a sweep from the command line."""

import numpy as np
import pandas as pd
import pytest

from gapprobe.cli import main
from gapprobe.probes.saved import load_sweep
from gapprobe.store.exchange.importing import import_activations


def test_it_writes_tables_and_a_figure_and_goes_on(tmp_path, capsys):
    rng = np.random.default_rng(0)
    right = rng.random(90) < 0.5
    x = rng.normal(size=(90, 2, 6)).astype(np.float32)
    x[:, 1, 0] += 3 * right
    labels = pd.DataFrame({"right": right, "who": np.arange(90) % 12}, index=[f"r{i}" for i in range(90)])
    import_activations(tmp_path / "acts", x, labels)
    command = ["probe", str(tmp_path / "acts"), "--target", "right", "--split", "who", "--out", str(tmp_path / "out")]
    main([*command, "--strengths", "0.1", "1"])
    said = capsys.readouterr().out
    assert "split who: The probe (layer 1, chosen on training rows only) reaches an AUC of" in said
    best = pd.read_csv(tmp_path / "out" / "best.csv").iloc[0]
    assert best.beats
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert set(table.kind) == {"probe", "shuffled", "layer_0"}
    assert "plotly" in (tmp_path / "out" / "areas.html").read_text(encoding="utf-8").lower()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "fitted").iterdir()}
    main([*command, "--strengths", "0.1", "1"])
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "fitted").iterdir()} == kept
    with pytest.raises(SystemExit):
        main(["probe", str(tmp_path / "acts"), "--target", "wrong"])
    assert "no column 'wrong'; it has right, who" in capsys.readouterr().err


def test_random_controls_and_the_saved_sweep_come_from_the_command_too(tmp_path, capsys):
    rng = np.random.default_rng(0)
    right = rng.random(90) < 0.5
    labels = pd.DataFrame({"right": right}, index=[f"r{i}" for i in range(90)])
    for name, shift in (("trained", 3.0), ("random", 0.0)):
        x = rng.normal(size=(90, 1, 6)).astype(np.float32)
        x[:, 0, 0] += shift * right
        import_activations(tmp_path / name, x, labels, model=name)
    command = ["probe", str(tmp_path / "trained"), "--target", "right", "--out", str(tmp_path / "out")]
    command += ["--random-model", str(tmp_path / "random"), "--controls", "random_model", "random_projection"]
    main([*command, "--dimensions", "2", "--strengths", "0.1", "1"])
    assert "the probe beats it" in capsys.readouterr().out
    sweep = load_sweep(tmp_path / "out" / "sweep")
    assert set(sweep.table.kind) == {"probe", "random_model", "random_projection"}
    assert sweep.cell().coefficients(0).coef.shape == (2, 5, 6)
    areas = sweep.table.set_index("kind").auc
    assert areas["random_model"] < 0.65
    assert areas["random_model"] < areas["random_projection"] < areas["probe"]
