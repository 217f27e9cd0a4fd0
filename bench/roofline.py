"""How near the training step comes to what this machine can multiply.

    python bench/roofline.py                            about 3 minutes
    python bench/roofline.py --cifar photos/cifar10     on real images; synthetic ones take as long
    python bench/roofline.py --quick                    half a minute

The step is the whole one of throughput.py's CIFAR-10 task: gather, crop, flip, normalise, ResNet-9 of
width 32 forward and back in bf16, SGD, sums; 32 x 32, batches of 128. A multiply-add is two
operations, as `cnn.models.flops` counts: 0.19 GFLOP an image forward, and three times that for a step
(the gradients of the images and of the weights cost as much each; that of the first layer's images is
not computed, 0.3 % of it all). What the edges multiply with zeros is counted, as everywhere; kernels
that leave it out, a third of a map of 4 x 4, may pass what the machine multiplies in matrices.

THE rate is the best square product's in bf16. In each round step, product, and the model's own
convolutions alone, forward and back, are measured one after the other; shares are taken within it.
"""

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would complain of having no GPU

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import alternate, arguments, finish, ratio, table
from cnn.config import load_config
from cnn.models.flops import count_flops
from cnn.training.engine import train_one_epoch
from cnn.training.run import Run
from cnn.training.setup import build_run
from cnn.utils.memory import keep_freed_memory

BATCH, SIZE = 128, 32
ASKED = 0.55
SQUARES = (512, 1024, 2048, 3072)
COPIED = 256 * 2**20  # bytes; no cache holds them
SYNTHETIC = f"{{num_images: 8192, image_size: {SIZE}, channels: 3, num_classes: 10}}"
SETTINGS = [f"data.batch_size={BATCH}", "data.augment=[crop, flip]", "device=cpu"]
SETTINGS += ["model.name=resnet9", "model.args={width: 32}", "train.precision=bf16"]
SETTINGS += ["optim.lr=0.05", "optim.weight_decay=0", "loss.label_smoothing=0"]
SETTINGS += ["schedule.name=constant", "schedule.warmup_epochs=0"]
PARTS = {  # of a step, by what the names of its operations contain
    "convolutions": ("convolution",),
    "batch norm": ("batch_norm",),
    "pooling": ("pool", "fill_"),  # the gradient begins as zeros
    "ReLU": ("clamp_min", "threshold"),
    "optimizer": ("sgd", "optimizer"),
    "copies, casts": ("copy_", "::mul", "index_select"),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10 as JPEG files")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    keep_freed_memory()
    rounds, seconds = (3, 0.5) if args.quick else (args.rounds, 2.0)
    data = ["data.name=synthetic", f"data.args={SYNTHETIC}"]
    if args.cifar is not None:
        data = ["data.name=folder", f"data.root={args.cifar}", "data.limit=8192"]
    cfg, _ = load_config(None, [*SETTINGS, *data])
    run = build_run(cfg)
    of_image = count_flops(run.state.model, (3, SIZE, SIZE))
    of_step = 3 * of_image * BATCH

    convolve, shapes = convolutions(run)
    products, best = matrix_products(shapes, seconds / 5)
    steps = endless_steps(run)
    measures = {
        "step": lambda: of_step / timed(lambda: next(steps), seconds),
        "convolutions": lambda: of_step / timed(convolve, seconds),
        "product": lambda: 2 * best**3 / timed(product(best, best, best, torch.bfloat16), seconds),
    }
    results = alternate(measures, rounds)
    parts = breakdown(steps, 3 if args.quick else 10)
    copied = 2 * COPIED / timed(copy(), seconds / 2)

    share = ratio(results["step"], results["product"])
    ceiling = ratio(results["convolutions"], results["product"])
    print(f"\na step of {BATCH} images: {of_step / 1e9:.1f} GFLOP, {of_image / 1e9:.3f} an image forward;"
          f" {torch.get_num_threads()} threads, {rounds} rounds")  # fmt: skip
    rows = [(name, *(f"{rate / 1e9:.0f}" for rate in (min(r), statistics.median(r), max(r))))
            for name, r in results.items()]  # fmt: skip
    print(table(["GFLOP/s in bf16", "least", "median", "largest"], rows))
    print(f"copy: {copied / 1e9:.1f} GB/s read and written")
    print("\n" + table(["a step's time", "%"], [(n, f"{100 * p:.1f}") for n, p in parts.items()]))
    said = "\n{} over the matrix product: {:.1%} ({:.1%} to {:.1%}{})"
    print(said.format("step", *share.values(), f"; asked for: {ASKED:.0%}"), end="")
    print(said.format("convolutions alone", *ceiling.values(), ""))
    figures = {"flops_forward": of_image, "share": share, "convolutions_share": ceiling}
    figures |= {"flops_a_second": results, "products": products, "copy_bytes_a_second": copied}
    finish(figures | {"parts": parts, "threads": torch.get_num_threads()}, args.json)


def timed(act: Callable, seconds: float) -> float:
    """Seconds that it takes, the mean over about so many."""
    act()
    began, number = time.perf_counter(), 0
    while (taken := time.perf_counter() - began) < seconds or number < 2:
        act()
        number += 1
    return taken / number


def endless_steps(run: Run) -> Iterator[int]:
    while True:
        batches = run.train_loader.train_batches(1, run.state.batch)
        number = len(run.train_loader) - 1 - run.state.batch  # without the last, which is shorter
        yield from train_one_epoch(run, itertools.islice(batches, number))
        run.state.batch = 0


def product(rows: int, inner: int, columns: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    return lambda: torch.mm(left, right, out=out)


def matrix_products(shapes: dict, seconds: float) -> tuple[dict[str, dict[str, float]], int]:
    """FLOP/s by kind and shape, and the side of the square that is quickest in bf16.

    Args:
        shapes: further ones: rows, inner, columns.
    """
    rates: dict[str, dict[str, float]] = {"fp32": {}, "bf16": {}}
    every = {f"{side}": (side,) * 3 for side in SQUARES} | shapes
    for name, shape in every.items():
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            operations = 2 * shape[0] * shape[1] * shape[2]
            rates[kind][name] = operations / timed(product(*shape, dtype), seconds)
    rows = [(name, *(f"{rates[kind][name] / 1e9:.0f}" for kind in rates)) for name in every]
    print(table(["matrix product, GFLOP/s", *rates], rows), flush=True)
    return rates, max(SQUARES, key=lambda side: rates["bf16"][f"{side}"])


def copy() -> Callable[[], torch.Tensor]:
    source, target = torch.ones(COPIED, dtype=torch.uint8), torch.ones(COPIED, dtype=torch.uint8)
    return lambda: target.copy_(source)


def convolutions(run: Run) -> tuple[Callable[[], None], dict[str, tuple[int, int, int]]]:
    """What computes all of the model's convolutions forward and back, in the step's precision.

    Also the matrix products that they are, when the neighbours of each pixel are laid in a row.
    """
    model, seen = run.state.model, []
    modules = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    hooks = [m.register_forward_hook(lambda m, x, y: seen.append((m, x[0].shape, y.shape)))
             for m in modules]  # fmt: skip
    with torch.no_grad():
        model.eval()(torch.zeros(BATCH, 3, SIZE, SIZE))
    model.train()
    for hook in hooks:
        hook.remove()

    def maps(shape: torch.Size) -> torch.Tensor:
        images = torch.randn(shape).to(torch.bfloat16)
        return images.contiguous(memory_format=torch.channels_last)

    work = [(m, maps(x).requires_grad_(n > 0), maps(y)) for n, (m, x, y) in enumerate(seen)]

    def act() -> None:
        for module, images, gradient in work:
            with run.autocast():
                out = module(images)
            wanted = [module.weight, images] if images.requires_grad else [module.weight]
            torch.autograd.grad(out, wanted, gradient)

    shapes = {}
    for module, _, out in seen[1:]:  # the first has too few channels to count
        rows, inner = out.numel() // out[1], module.weight[0].numel()
        shapes[f"{rows} x {inner} x {out[1]}"] = (rows, inner, out[1])
    return act, shapes


def breakdown(steps: Iterator[int], number: int) -> dict[str, float]:
    """Shares of a step's time, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(number):
            next(steps)
    times = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in profiler.key_averages():
        part = next(
            (p for p, words in PARTS.items() if any(w in event.key.lower() for w in words)), "other"
        )
        times[part] += event.self_cpu_time_total
    return {part: spent / sum(times.values()) for part, spent in times.items()}


if __name__ == "__main__":
    main()
