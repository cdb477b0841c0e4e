"""Contrast-consistent search: what it minimises, what it finds without labels, and how it is misled."""

import numpy as np
import pandas as pd
import pytest
import torch

import gapprobe as gp
from gapprobe.errors import DataError
from gapprobe.probes.kinds import ccs
from gapprobe.probes.kinds.ccs import Ccs
from gapprobe.stats import auc

N, TRAINING = 400, 300


def pairs(seed=0, *, d=24, truth=1.0, other=0.0, template=3.0, broken=False):
    """Return pairs [n 2d], which are true, and what else differs within pairs.

    A pair shares a topic; `template` tells its halves apart, as "yes" and "no" do. `broken` contrasts are those of
    another pair.
    """
    g = torch.Generator().manual_seed(seed)
    along = torch.linalg.qr(torch.randn(d, 3, generator=g))[0].T
    true, feature = torch.rand(2, N, generator=g) < 0.5
    shift = truth * (2.0 * true - 1)[:, None] * along[0] + other * (2.0 * feature - 1)[:, None] * along[1]
    shift = shift + template * along[2]
    topic = torch.randn(N, d, generator=g) / 2
    statement = topic + torch.randn(N, d, generator=g) / 2 + shift
    contrast = topic + torch.randn(N, d, generator=g) / 2 - shift
    if broken:
        contrast = contrast[torch.randperm(N, generator=g)]
    return torch.cat([statement, contrast], dim=1), true, feature


def fitted(x, y, probe=None):
    weights = (torch.arange(N) < TRAINING).double()[None]
    return (probe or Ccs()).fit(x, y[None], weights, torch.tensor(Ccs.strengths).double(), 0)


def area(fits, x, y):
    return auc(fits.scores(x)[0, TRAINING:].numpy(), y[TRAINING:].numpy())


def test_loss_and_gradient_are_the_readable_ones():
    x, _, _ = pairs(d=6)
    x = x.double()
    g = torch.Generator().manual_seed(1)
    used = torch.rand(2, N, generator=g) < 0.6
    theta = torch.randn(2, 3, 7, generator=g, dtype=torch.float64, requires_grad=True)
    expected = torch.stack(
        [
            torch.stack([ccs.reference(own[:-1], own[-1], x[rows, :6], x[rows, 6:]) for own in starts])
            for starts, rows in zip(theta, used, strict=True)
        ]
    )
    slopes = torch.autograd.grad(expected.sum(), theta)[0]
    views = [ccs.Standardised(half, used).view(torch.arange(2), torch.float64) for half in (x[:, :6], x[:, 6:])]
    share = used / used.double().sum(1, keepdim=True)
    logits = tuple(view.logits(theta.detach()) for view in views)
    value, of_logits = ccs.objective(logits, share)
    gradient = sum(view.pull(slope) for view, slope in zip(views, of_logits, strict=True))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, slopes, rtol=1e-10, atol=1e-13)


def test_the_search_ends_where_adam_gets_no_further():
    """From the same starts, in float64, by the readable loss of each half standardised beforehand."""
    x, _, _ = pairs(truth=0.5)
    x, d = x[:TRAINING], 24
    halves = [((half - half.mean(0)) / half.std(0, correction=0)).double() for half in (x[:, :d], x[:, d:])]
    starts = torch.randn(10, d + 1, generator=torch.Generator().manual_seed(0))
    point = starts.double().requires_grad_()
    optimiser = torch.optim.Adam([point], lr=0.03)
    for _ in range(2000):
        optimiser.zero_grad()
        p, q = (torch.sigmoid(half @ point[:, :d].T + point[:, d]) for half in halves)
        values = ((p + q - 1) ** 2 + torch.minimum(p, q) ** 2).mean(0) + point[:, :d].square().sum(1) / 20
        values.sum().backward()
        optimiser.step()
    used = torch.ones(1, TRAINING, dtype=torch.bool)
    views = [ccs.Standardised(half, used).view(torch.arange(1), torch.float32) for half in (x[:, :d], x[:, d:])]
    share, decay = torch.full((1, TRAINING), 1 / TRAINING), torch.tensor([0.1])
    theta, found = ccs.search(views, starts[None], share, decay, 200)
    best = theta[0, int(found[0].argmin())].double()
    loss = ccs.reference(best[:d], best[d], *halves) + best[:d].square().sum() / 20
    assert float(found.min()) == pytest.approx(float(loss), rel=1e-5)
    assert float(loss) <= float(values.detach().min()) * (1 + 1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("d", [24, 600])  # fewer and more features than pairs
def test_it_finds_the_truth_without_labels(seed, d):
    x, true, _ = pairs(seed, d=d)
    g = torch.Generator().manual_seed(seed)
    shuffled = true.clone()
    shuffled[:TRAINING] = true[:TRAINING][torch.randperm(TRAINING, generator=g)]
    fits, blind = fitted(x, true), fitted(x, shuffled)
    assert area(fits, x, true) > 0.95
    assert torch.equal(fits.coef.abs(), blind.coef.abs())  # labels say which end is true, and nothing else
    assert torch.equal(fitted(x, ~true).coef, -fits.coef)


@pytest.mark.parametrize("seed", range(3))
def test_broken_contrasts_leave_nothing_to_find(seed):
    x, true, _ = pairs(seed, d=200, broken=True)
    whole, _, _ = pairs(seed, d=200)
    assert area(fitted(whole, true), whole, true) > 0.95
    assert abs(area(fitted(x, true), x, true) - 0.5) < 0.15  # 100 rows held out: a deviation of 0.06


def test_a_more_salient_feature_misleads_it():
    """It finds what differs most surely within pairs, be that the truth or not; a probe with labels is not misled."""
    x, true, feature = pairs(other=4.0)
    fits = fitted(x, true)
    assert abs(area(fits, x, feature) - 0.5) > 0.45
    assert abs(area(fits, x, true) - 0.5) < 0.15
    weights = (torch.arange(N) < TRAINING).double()[None]
    told = gp.find_probe("logistic").fit(x, true[None], weights, torch.tensor([1.0]).double(), 0)
    assert area(told, x, true) > 0.95


def test_what_tells_the_halves_apart_is_not_found():
    """Unless each half were standardised alone, "yes" against "no" would be the surest answer of all."""
    x, true, _ = pairs(template=20.0)
    assert area(fitted(x, true), x, true) > 0.95


def test_the_score_decides_as_the_paper_does():
    """Half the difference of logits is positive where (p+ + 1 - p-) / 2 is above 1/2."""
    x, true, _ = pairs(truth=0.3)
    fits = fitted(x.double(), true)
    d = x.shape[1] // 2
    plus, minus = x[:, :d].double() @ fits.coef[0, :d], x[:, d:].double() @ -fits.coef[0, d:]
    for b in (-1.0, 0.0, 2.0):
        said = (torch.sigmoid(2 * plus + fits.intercept * 2 + b) + 1 - torch.sigmoid(2 * minus + b)) / 2
        assert torch.equal(said > 0.5, fits.scores(x)[0] > 0)


def test_rows_that_are_no_pairs_are_refused():
    x, true, _ = pairs()
    with pytest.raises(DataError, match="47 features are not two rows of one width"):
        fitted(x[:, 1:], true)


@pytest.fixture
def store(tmp_path):
    x, true, _ = pairs()
    halves = torch.stack([x[:, :24], x[:, 24:]], 1).flatten(0, 1).numpy()
    ids = [f"{what} {i}" for i in range(N) for what in ("it is so", "it is not so")]
    columns = pd.DataFrame({"true": None, "contrast": None}, index=ids, dtype=object)
    columns.loc[ids[::2], "true"] = true.tolist()
    columns.loc[ids[::2], "contrast"] = ids[1::2]
    columns["true"] = columns["true"].astype("boolean")
    return gp.import_activations(tmp_path / "s", {3: halves}, columns), x, true


def test_a_sweep_reads_rows_beside_their_contrasts(store, tmp_path):
    store, x, _ = store
    options = {"probe": ["ccs", "logistic"], "folds": 4, "replicates": 50, "folder": tmp_path / "kept"}
    sweep = gp.sweep_probes(store, "true", contrast="contrast", **options)
    best = sweep.best().set_index("probe")
    assert best["auc"]["ccs"] > 0.95
    assert best["beats"]["ccs"]
    cell = sweep.cell(probe="ccs")
    fold = cell.folds.outer == 1
    target = torch.from_numpy(cell.problems.target)[None]
    rows = [int(i.split()[-1]) for i in sweep.ids]
    alone = Ccs().fit(x[rows], target, torch.from_numpy(~fold).double()[None], torch.tensor(Ccs.strengths).double(), 0)
    expected = alone.scores(x[rows])[0].numpy()
    # Problems side by side round their products otherwise; the search stops at a share of 1e-5 of the objective.
    assert np.corrcoef(cell.scores[0, 0][fold], expected[fold])[0, 1] > 0.999
    broken = store.rows["contrast"].dropna()
    broken = pd.Series(np.roll(broken.to_numpy(), 1), index=broken.index)
    again = gp.sweep_probes(store, "true", contrast=broken, **options)  # other contrasts, another fit
    assert again.best().set_index("probe")["auc"]["ccs"] < best["auc"]["ccs"]
    projected = gp.sweep_probes(
        store, "true", contrast="contrast", controls=["random_projection"], dimensions=5, **options
    )
    assert set(projected.table["kind"]) == {"probe", "random_projection"}


def test_contrasts_that_cannot_be_are_refused(store):
    store, _, _ = store
    contrast = store.rows["contrast"].dropna()
    with pytest.raises(DataError, match="'ccs' reads pairs: give contrast="):
        gp.sweep_probes(store, "true", probe="ccs")
    with pytest.raises(DataError, match="no column 'other'"):
        gp.sweep_probes(store, "true", probe="ccs", contrast="other")
    with pytest.raises(DataError, match="contrast: 399 rows have none, such as it is so 1"):
        gp.sweep_probes(store, "true", probe="ccs", contrast=contrast.iloc[:1])
    with pytest.raises(DataError, match="lacks 1 of its rows, such as nowhere"):
        gp.sweep_probes(store, "true", probe="ccs", contrast=contrast.where(contrast.index != "it is so 7", "nowhere"))
    with pytest.raises(DataError, match="1 contrasting rows have labels of their own, such as it is so 3"):
        gp.sweep_probes(store, "true", contrast=contrast.where(contrast.index != "it is so 7", "it is so 3"))
    with pytest.raises(DataError, match="stands twice"):
        gp.sweep_probes(store, "true", contrast=pd.concat([contrast, contrast]))
    with pytest.raises(gp.ConfigError, match="'ccs' reads pairs, and here there are only rows"):
        gp.probe_direction(store, "true", layer=3, probe="ccs")
