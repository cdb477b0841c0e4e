"""Products over X on a GPU, cosines, the lens: Triton's kernels against torch in the same run; not in `make bench`.

`python -m benchmarks.gpu` prints medians of X [33 layers, 2,000 rows, width 4,096] and 64 problems a layer, and errors
against float64. torch multiplies float32, as the kernels do in effect: X in 16 bits it has to widen first. Cosines are
of X's rows with their neighbours, raw, centred and standardised. The lens reads 600 tokens of X through 32,000 words;
torch does so a layer at a time, in the words' type.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from gapprobe.kernels import cosine, logit_lens, products

LAYERS, ROWS, WIDTH, PROBLEMS, RUNS = 33, 2000, 4096, 64, 20
TOKENS, WORDS = 600, 32_000


def seconds(work: Callable[[], object]) -> float:
    """Return the median time on the device, after three runs that compile and warm up."""
    for _ in range(3):
        work()
    times: list[float] = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def main() -> None:
    """Time and compare, or say that there is no GPU."""
    device = torch.device("cuda")
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU that torch can use (CUDA or ROCm): there is none here")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, medians of {RUNS} runs")
    weights = torch.randn(LAYERS, PROBLEMS, WIDTH + 1, device=device) / WIDTH**0.5
    turned, residual, weight = torch.rand(3, LAYERS, PROBLEMS, ROWS, device=device)
    sign = torch.ones_like(turned)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(LAYERS, ROWS, WIDTH, device=device).to(dtype)
        _products(x, (weights, turned, sign, weight), residual)
        _cosines(x.flatten(0, 1))
        _lens(x[:, :TOKENS])


def _products(x: Tensor, rest: tuple[Tensor, Tensor, Tensor, Tensor], residual: Tensor) -> None:
    """Compare both products of one X; errors are those of the first layer."""
    step = (x, *rest)
    along = products.step_reference(*(part[:1] for part in step)).along
    back = products.pull_reference(x[:1], residual[:1])
    _compare(f"step {x.dtype}", lambda: products.step(*step).along, lambda: products.step_by_torch(*step).along, along)
    _compare(f"pull {x.dtype}", lambda: products.pull(x, residual), lambda: products.pull_by_torch(x, residual), back)


def _cosines(x: Tensor) -> None:
    """Compare all three cosines of rows with their neighbours, as one [1 3 n]."""
    left, right = x[:-1], x[1:]
    mean, std = left.mean(0, dtype=torch.float64), left.double().std(0)
    settings = ((), (mean,), (mean, std))

    def ours() -> Tensor:
        return torch.stack(list(vars(cosine.paired(left, right, mean, std)).values()))[None]

    def theirs() -> Tensor:
        a, b = left.float() - mean.float(), right.float() - mean.float()
        raw = torch.cosine_similarity(left.float(), right.float())
        scaled = torch.cosine_similarity(a / std.float(), b / std.float())
        return torch.stack([raw, torch.cosine_similarity(a, b), scaled])[None]

    truth = torch.stack([cosine.reference(left, right, *setting) for setting in settings])[None]
    _compare(f"cosines {x.dtype}", ours, theirs, truth)


def _lens(x: Tensor) -> None:
    """Compare the log-probability of a target at every layer; the ten best words and the entropy are read too."""
    head = logit_lens.Unembedding((torch.randn(WORDS, WIDTH, device=x.device) * 2 / WIDTH**0.5).to(x.dtype), norm="rms")
    targets = torch.randint(0, WORDS, (TOKENS, 1), device=x.device)

    def ours() -> Tensor:
        return logit_lens.read(x, head, targets, top_k=10).log_prob

    def theirs() -> Tensor:
        found: list[Tensor] = []
        for layer in x:
            h = torch.nn.functional.rms_norm(layer, (WIDTH,), eps=head.eps)
            log_p = (h @ head.weight.T).float().log_softmax(1)
            (log_p.exp() * log_p).sum(1), log_p.topk(10)
            found.append(log_p.gather(1, targets))
        return torch.stack(found)

    _compare(f"lens {x.dtype}", ours, theirs, logit_lens.read_reference(x[:1], head, targets).log_prob)


def _compare(name: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], right: Tensor) -> None:
    wrong = [float((made()[:1] - right).norm() / right.norm()) for made in (ours, theirs)]
    took = [seconds(made) for made in (ours, theirs)]
    print(
        f"{name}: ours {took[0] * 1e3:.3f} ms, error {wrong[0]:.1e}; "
        f"torch {took[1] * 1e3:.3f} ms, error {wrong[1]:.1e}; {took[1] / took[0]:.2f} times as fast"
    )


if __name__ == "__main__":
    main()
