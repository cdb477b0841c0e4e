"""Members of an ensemble side by side: one module with many sets of parameters, on rows that groups share."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

FEW = 128  # features below which sums over them are too short to be taken one by one
ELEMENTWISE = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Shared(torch.autograd.Function):
    """The first layer of all members of a group, which share their rows; compiled, as `products_cpu` is."""

    @staticmethod
    def forward(
        ctx: Any, weight: Float[Tensor, "g r d"], bias: Float[Tensor, "g r"] | None, z: Float[Tensor, "g b d"]
    ) -> Float[Tensor, "g r b"]:
        """Return weight @ z.T + bias."""
        from gapprobe.kernels import products_cpu  # a third of a second to import

        ctx.save_for_backward(z)
        ctx.biased = bias is not None
        b = z.shape[1]
        out = z.new_zeros(*weight.shape[:2], b) if bias is None else bias[..., None].repeat(1, 1, b)
        if z.shape[2] < FEW:
            return products_cpu.add_each_combined(weight.contiguous(), z.mT.contiguous(), out)
        return products_cpu.add_each_dots(weight.contiguous(), z.contiguous(), out)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Tensor, Tensor | None, None]:
        """Return the gradient by weight and bias."""
        from gapprobe.kernels import products_cpu

        (z,), slope = ctx.saved_tensors, slopes[0].contiguous()
        out = z.new_zeros(*slope.shape[:2], z.shape[2])
        products_cpu.add_each_combined(slope, z.contiguous(), out)
        return out, slope.sum(2) if ctx.biased else None, None


def side_by_side(
    module: nn.Module, names: Collection[str], buffers: Mapping[str, Tensor]
) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
    """Return what maps stacked parameters [g s ...] and rows [g b d], shared by s members, to outputs [g s b]."""
    layers = plain_layers(module, names)

    def rows_last(parameters: Mapping[str, Tensor], z: Float[Tensor, "g b d"]) -> Float[Tensor, "g s b"]:
        h = z.mT  # rows last: the products of all members of a group are one, and nothing is copied
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.Linear):
                weight, bias = parameters[f"{i}.weight"], parameters.get(f"{i}.bias")
                if h.ndim == 3:
                    own = None if bias is None else bias.flatten(1, 2)
                    if h.device.type == "cpu" and h.dtype in (torch.float32, torch.float64):
                        h = _Shared.apply(weight.flatten(1, 2), own, z)
                    else:
                        h = weight.flatten(1, 2) @ h
                        h = h if own is None else h + own[..., None]
                    h = h.unflatten(1, weight.shape[1:3])
                else:
                    h = weight @ h
                    if bias is not None:
                        h += bias[..., None]
            else:
                h = layer(h)
        return h[:, :, 0]

    one = vmap(lambda parameters, z: functional_call(module, (parameters, dict(buffers)), (z,)), randomness="same")

    def one_by_one(parameters: Mapping[str, Tensor], z: Float[Tensor, "g b d"]) -> Float[Tensor, "g s b"]:
        g, s = next(iter(parameters.values())).shape[:2]
        out = one({key: value.flatten(0, 1) for key, value in parameters.items()}, z.repeat_interleave(s, 0))
        return out.unflatten(0, (g, s))

    return rows_last if layers else one_by_one


def plain_layers(module: nn.Module, names: Collection[str]) -> list[nn.Module]:
    """Return the layers of a module that is nothing but linear layers and functions of single numbers, else none."""
    if type(module) is not nn.Sequential:
        return []
    *layers, last = module
    own = {f"{i}.{key}" for i, layer in enumerate(layers) for key, _ in layer.named_parameters()}
    hooked = any(vars(part)[kind] for part in module.modules() for kind in HOOKS)
    flat = type(last) is nn.Flatten and (last.start_dim, last.end_dim) == (0, -1)
    known = all(type(layer) in (nn.Linear, *ELEMENTWISE) for layer in layers)
    first = bool(layers) and type(layers[0]) is nn.Linear
    # Names differ where two layers share their weights.
    return layers if flat and known and first and not hooked and own == set(names) else []
