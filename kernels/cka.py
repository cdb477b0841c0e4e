"""Linear centred kernel alignment of many representations of the same rows, all pairs of them at once.

Mathematics (Kornblith et al. 2019, arXiv 1905.00414, with linear kernels K = X X' and L = Y Y'):
CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)). HSIC is the biased tr(KHLH) / (n - 1)^2, with H = I - 1/n, which lets
CKA tend to 1 for any two representations as their width grows beyond n; or the unbiased estimator of Song et al. 2012
(JMLR 13), of kernels without their diagonals,
[tr(KL) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 1'KL1 / (n - 2)] / (n (n - 3)), which may be averaged over batches of rows
(Nguyen et al. 2021, arXiv 2010.15327). Only grams of a batch are kept, so memory grows neither with the rows nor with
the square of the width. All in float64.
"""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Float, Float64
from torch import Tensor


def reference(x: Float[Tensor, "n d"], y: Float[Tensor, "n e"], *, debiased: bool) -> float:
    """Compute CKA of two representations as it is written down, for reading and for tests."""
    n = len(x)
    k, el = (a.double() @ a.double().T for a in (x, y))
    h = torch.eye(n, dtype=torch.float64) - 1.0 / n
    one = torch.ones(n, dtype=torch.float64)

    def hsic(a: Float64[Tensor, "n n"], b: Float64[Tensor, "n n"]) -> Tensor:
        if not debiased:
            return (a @ h @ b @ h).trace() / (n - 1) ** 2
        a, b = a - a.diag().diag(), b - b.diag().diag()
        rest = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2)) - 2.0 / (n - 2) * (one @ a @ b @ one)
        return ((a @ b).trace() + rest) / (n * (n - 3))

    return float(hsic(k, el) / (hsic(k, k) * hsic(el, el)).sqrt())


def gram(x: Float[Tensor, "n d"], *, debiased: bool) -> Float64[Tensor, "n n"]:
    """Return the products of all rows, less their mean; without the diagonal where debiased."""
    x = x.double()
    x = x - x.mean(0)
    found = x @ x.T
    return found.fill_diagonal_(0.0) if debiased else found


def hsic(left: Float64[Tensor, "l n n"], right: Float64[Tensor, "m n n"], *, debiased: bool) -> Float64[Tensor, "l m"]:
    """Return HSIC of every gram on the left with every one on the right; unbiased ones want four rows."""
    n = left.shape[1]
    products = einsum(left, right, "l i j, m i j -> l m")
    if not debiased:
        return products / (n - 1) ** 2
    rows = left.sum(2), right.sum(2)
    totals = torch.outer(rows[0].sum(1), rows[1].sum(1)) / ((n - 1) * (n - 2))
    return (products + totals - 2.0 / (n - 2) * rows[0] @ rows[1].T) / (n * (n - 3))


def hsic_of_each(grams: Float64[Tensor, "l n n"], *, debiased: bool) -> Float64[Tensor, " l"]:
    """Return HSIC of every gram with itself."""
    return torch.cat([hsic(one[None], one[None], debiased=debiased)[0] for one in grams])
