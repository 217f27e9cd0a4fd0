"""What a GPU makes of it: CIFAR-10, asked for 94 %, and resnet18's share of what the card multiplies.

    python bench/gpu.py --cifar photos/cifar10      5 seeds, a few minutes; needs CUDA, bf16 and the data
    python bench/gpu.py                             the share alone
    python bench/gpu.py --quick                     fewer rounds, 2 seeds

CIFAR-10: configs/cifar10_fast.yaml on the folder's train/CLASS/*.jpg and test/CLASS/*.jpg, a process a
seed; the mean accuracy on the test images, and the seconds of the epochs, validation included. The
first epoch, in which the model is compiled and the kernels are loaded, counts as the second does: the
mark is taken without that too (airbench94_muon, 94 % in 2.59 s on an A100, on the original pixels;
https://github.com/KellerJordan/cifar10-airbench). Run its script on the same card beside this.

resnet18: whole steps of 1,024 synthetic images of 224 x 224 in bf16, their operations (a multiply-add
is two; three times those of the way forward) over a product of square bf16 matrices, in turns.

It ran on an NVIDIA H200 (torch 2.11): the figures are in README.md here. 94 % was not reached, on JPEG
files of quality 75.

Whether a run resumes exactly on the card: python train.py --drill device=cuda train.deterministic=true
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import ROOT, alternate, arguments, finish, ratio, table, train

ASKED = 0.94
RECIPE = ["--config", str(ROOT / "configs/cifar10_fast.yaml"), "data.name=folder"]
BATCH, SIDE, SQUARE = 1_024, 224, 8_192
STEP = ["data.name=synthetic", "model.name=resnet18", "train.precision=bf16"]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10 as JPEG files")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="resnet18 compiled, too")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.stderr.write("bench/gpu.py measures CUDA devices, and torch sees none here\n")
        return 2
    figures: dict = {"card": torch.cuda.get_device_name()}
    rounds = 3 if args.quick else 15
    compiled = f"train.compile={str(args.compile).lower()}"
    figures["resnet18"] = share_of_product("cuda", BATCH, SIDE, SQUARE, rounds, [compiled])
    if args.cifar is not None:
        settings = [*RECIPE, f"data.root={args.cifar.resolve()}", "device=cuda"]
        figures["cifar"] = to_the_mark(settings, 2 if args.quick else args.seeds)
    finish(figures, args.json)
    return 0


def to_the_mark(settings: list[str], seeds: int) -> dict:
    """Accuracies and seconds of whole runs, a seed each."""
    train(*settings, "train.epochs=1")  # once before: the images' cache and the compiler's
    accuracies, seconds = [], []
    for seed in range(seeds):
        *epochs, test = train(*settings, f"seed={seed}")
        times = [row["seconds"] for row in epochs]
        accuracies.append(test["test_acc"])
        seconds.append(times[1] + sum(times[1:]))
        print(
            f"seed {seed}: {accuracies[-1]:.2%} in {seconds[-1]:.2f} s, first epoch {times[0]:.2f} s"
        )
    mean, median = statistics.mean(accuracies), statistics.median(seconds)
    print(f"\nCIFAR-10: {mean:.2%} on average ({min(accuracies):.2%} to {max(accuracies):.2%}; asked"
          f" for: {ASKED:.0%}) in {median:.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")  # fmt: skip
    return {"accuracies": accuracies, "seconds": seconds}


def share_of_product(
    device: str, batch: int, side: int, square: int, rounds: int, settings: list[str]
) -> dict:
    """resnet18's steps beside a matrix product, round by round."""
    import torch

    from bench.roofline import endless_steps
    from cnn.config import load_config
    from cnn.models.flops import count_flops
    from cnn.training.setup import build_run

    images = f"{{num_images: {3 * batch}, num_test: 64, image_size: {side}, channels: 3}}"
    more = [f"data.args={images}", f"data.batch_size={batch}", f"device={device}"]
    cfg, _ = load_config(None, [*STEP, *more, *settings])
    run = build_run(cfg)
    of_step = 3 * batch * count_flops(run.state.model, (3, side, side))
    steps = endless_steps(run)
    left, right = (torch.randn(square, square, device=device).bfloat16() for _ in range(2))

    def timed(act: Callable, number: int) -> float:
        act()
        wait()
        began = time.perf_counter()
        for _ in range(number):
            act()
        wait()
        return (time.perf_counter() - began) / number

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    timed(lambda: next(steps), 4)  # kernels are chosen, and the model compiled if asked for
    measures = {
        "step": lambda: of_step / timed(lambda: next(steps), 10),
        "product": lambda: 2 * square**3 / timed(lambda: left @ right, 20),
    }
    results = alternate(measures, rounds)
    rows = [(name, *(f"{x / 1e12:.2f}" for x in (min(r), statistics.median(r), max(r))))
            for name, r in results.items()]  # fmt: skip
    print(table(["TFLOP/s in bf16", "least", "median", "largest"], rows))
    share = ratio(results["step"], results["product"])
    rate = batch * statistics.median(results["step"]) / of_step
    print(f"resnet18, {batch} images of {side} x {side} a batch: {rate:,.0f} images/s, {share['median']:.1%}"
          f" of the product ({share['least']:.1%} to {share['largest']:.1%})")  # fmt: skip
    return {"images_per_second": rate, "share": share, "flops_a_second": results}


if __name__ == "__main__":
    sys.exit(main())
