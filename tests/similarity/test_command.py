"""`gapprobe cosine`: pairs of settings from the command line."""

import numpy as np
import pandas as pd
import pytest

import gapprobe as gp
from gapprobe.cli import main


def test_it_writes_table_file_and_figure_and_goes_on(tmp_path, capsys):
    n = 20
    x = np.random.default_rng(0).normal(size=(2 * n, 2, 6)).astype(np.float32)
    table = pd.DataFrame(
        {
            "setting": ["shown"] * n + ["told"] * n,
            "trial": [*range(n)] * 2,
            "right": [i % 3 == 0 for i in range(n)] * 2,
        },
        index=[f"r{i}" for i in range(2 * n)],
    )
    store = gp.import_activations(tmp_path / "acts", x, table)
    out = tmp_path / "out"
    command = ["cosine", str(tmp_path / "acts"), "--pair", "shown", "told", "--by", "right", "--out", str(out)]
    main([*command, "--clusters", "trial"])
    said = capsys.readouterr().out
    assert "20 pairs, 0 rows without partner" in said
    assert said.count("standardised") == 2
    found = gp.cosine(store, pair=("shown", "told"), by="right", clusters="trial")
    again = gp.load_cosine(out / "cosines.safetensors")
    np.testing.assert_array_equal(again.centred, found.centred)
    pd.testing.assert_frame_equal(again.table, found.table)
    assert len(pd.read_csv(out / "table.csv")) == len(found.table) == 12
    assert "plotly" in (out / "cosines.html").read_text(encoding="utf-8").lower()
    kept = {p: p.stat().st_mtime_ns for p in (out / "layers").iterdir()}
    main(command)
    assert {p: p.stat().st_mtime_ns for p in (out / "layers").iterdir()} == kept
    for wrong, told in (
        (["--clusters", "a", "b", "c"], "--clusters takes one column or two that cross, not 3"),
        (["--key", "writer"], "no column 'writer'; it has setting, trial, right"),
    ):
        with pytest.raises(SystemExit):
            main([*command, *wrong])
        assert told in capsys.readouterr().err
