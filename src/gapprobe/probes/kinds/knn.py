"""The nearest rows' labels."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from gapprobe.errors import DataError
from gapprobe.kernels.moments import standard
from gapprobe.probes.base import check_problems, register_probe

ROOM = 1 << 24  # distances held at once


@dataclass(frozen=True)
class Neighbours:
    """Rows that problems look for neighbours among.

    Attributes:
        x: features, raw.
        y: labels of every problem.
        weights: of every problem's rows.
        k: neighbours of every problem.
    """

    x: Float[Tensor, "n d"]
    y: Bool[Tensor, "p n"]
    weights: Float64[Tensor, "p n"]
    k: Int64[Tensor, " p"]

    def scores(self, x: Float[Tensor, "m d"]) -> Float64[Tensor, "p m"]:
        """Return the weighted mean of the k nearest rows' labels, -1 or 1.

        Problems of the same rows share their neighbours: the search is for the largest k.
        """
        out = self.weights.new_empty(len(self.k), len(x))
        rows, group = torch.unique(self.weights > 0, dim=0, return_inverse=True)
        for i, own in enumerate(rows):
            problems = torch.nonzero(group == i)[:, 0]
            used = torch.nonzero(own)[:, 0]
            (mean,), (scale,) = standard(self.x[used], own[used][None])
            among = (self.x[used].double() - mean) / scale
            half = torch.linalg.vecdot(among, among) / 2
            most = min(len(used), int(self.k[problems].max()))
            signs = (2.0 * self.y[problems][:, used].double() - 1.0) * self.weights[problems][:, used]
            shares = self.weights[problems][:, used]
            at = self.k[problems].clamp(max=most) - 1
            step = max(1, ROOM // max(len(used), most * len(problems), x.shape[1]))
            for start in range(0, len(x), step):
                z = (x[start : start + step].double() - mean) / scale
                # |a - z|^2 / 2 less |z|^2 / 2, which orders the rows alike.
                near = (half - z @ among.T).topk(most, dim=1, largest=False).indices
                top, bottom = (part[:, near].cumsum(-1) for part in (signs, shares))
                last = at[:, None, None].expand(-1, len(z), 1)
                out[problems, start : start + step] = (top.gather(2, last) / bottom.gather(2, last))[..., 0]
        return out


@register_probe
class Knn:
    """k nearest neighbours by Euclidean distance between standardised rows; strengths are k, and more is smoother.

    A neighbour counts with its row's weight. Where a problem has fewer rows than k, all of them are neighbours.
    """

    name = "knn"
    strengths = (5.0, 15.0, 50.0)
    calibrated = False
    room = 32 * ROOM  # of distances, and of the neighbours' labels and weights, each in float64

    def fit(
        self,
        x: Float[Tensor, "n d"],
        y: Bool[Tensor, "p n"],
        weights: Float64[Tensor, "p n"],
        strengths: Float64[Tensor, " p"],
        seed: int,
    ) -> Neighbours:
        """Keep the rows; `seed` is not needed.

        Raises:
            DataError: a problem of one class, a strength that is no whole number above 0, or features that are not
                finite.
        """
        del seed
        check_problems(x, y, weights, strengths)
        k = strengths.round()
        odd = strengths[(k != strengths) | (k < 1)]
        if len(odd):
            raise DataError(f"strengths of knn are numbers of neighbours, whole and above 0; got {float(odd[0]):g}")
        return Neighbours(x.clone(), y.clone(), weights.clone(), k.long())
