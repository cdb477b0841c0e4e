"""A perceptron with one hidden layer: what a probe that is not linear would find."""

from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from gapprobe.probes.base import register_probe
from gapprobe.probes.modules import ModuleFits, ModuleProbe, from_module


@register_probe
class Mlp:
    """Standardised rows, one hidden layer of rectified units, Adam with early stopping; see `ModuleProbe`."""

    name = "mlp"
    strengths = (1e-2, 1e-1, 1.0)
    calibrated = True
    room = ModuleProbe.room

    def __init__(self, hidden: int = 64, steps: int = 300, lr: float = 3e-3) -> None:
        self.hidden, self.steps, self.lr = hidden, steps, lr

    def fit(
        self,
        x: Float[Tensor, "n d"],
        y: Bool[Tensor, "p n"],
        weights: Float64[Tensor, "p n"],
        strengths: Float64[Tensor, " p"],
        seed: int,
    ) -> ModuleFits:
        """Train every problem.

        Raises:
            DataError: a problem of one class, a strength not above 0, or features that are not finite.
        """

        def make(d: int) -> nn.Module:
            return nn.Sequential(nn.Linear(d, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1), nn.Flatten(0))

        return from_module(make, name=self.name, steps=self.steps, lr=self.lr).fit(x, y, weights, strengths, seed)
