"""What more devices and more images should cost: the model of docs/scale.md, its tables.

    python bench/predict.py

Predictions, from rates that were measured elsewhere and named there; nothing here is timed. An epoch
of N images on W devices takes N / B steps of a global batch B, each of

    max(B / W / images_per_second, B / W / decoded_per_second, agree) + reduce
    reduce = 2 (W - 1) / W x gradient / bandwidth       (a ring; nothing of it hidden: an upper bound)
    agree  = 2 (W - 1) x hop                            (the agreement on signals, a ring over TCP)
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cluster:
    """A model on so many of a kind of GPU."""

    gpus: int
    bandwidth: float  # bytes a second that an all-reduce moves past each GPU ("busbw")
    images_per_second: float = 2_600  # ResNet-50, one A100, mixed precision, channels last
    gradient: float = 4 * 25.6e6  # bytes: ResNet-50's parameters in fp32
    batch: int = 128  # images a GPU
    hop: float = 40e-6  # seconds from one process to the next

    def step(self) -> dict[str, float]:
        """Milliseconds of a step, part by part."""
        ring = 2 * (self.gpus - 1)
        return {
            "compute": 1e3 * self.batch / self.images_per_second,
            "reduce": 1e3 * ring / self.gpus * self.gradient / self.bandwidth,
            "agree": 1e3 * ring * self.hop,
        }

    def whole_step(self) -> float:
        """Milliseconds of a step: they agree on the next one while this one is computed."""
        step = self.step()
        return max(step["compute"], step["agree"]) + step["reduce"]

    def rate(self) -> float:
        """Images a second of all."""
        return self.gpus * self.batch / (self.whole_step() / 1e3)


CLUSTERS = [Cluster(8, 200e9), Cluster(64, 85e9), Cluster(1024, 85e9)]
IMAGES = [10**power for power in range(6, 10)]
CORE = 490.0  # JPEGs of 320 x 256 a second that a core decodes and makes 224 x 224
ORDER = (58e-9, 8.0)  # seconds and bytes an image: the permutation of an epoch, in every process
NAMES = (7e-6, 580.0)  # the same for a folder's list of files, looked through at the start


def main() -> None:
    print(
        "| GPUs | compute, ms | all-reduce | agreement | images/s | efficiency | cores to decode |"
    )
    print("|---|---|---|---|---|---|---|")
    for cluster in CLUSTERS:
        step = cluster.step()
        cells = [f"{cluster.gpus:,}", *(f"{ms:.1f}" for ms in step.values())]
        cells += [f"{cluster.rate():,.0f}", f"{step['compute'] / cluster.whole_step():.0%}"]
        print(f"| {' | '.join(cells)} | {cluster.rate() / CORE:,.0f} |")
    print("\n| images | epoch on 8 | on 64 | on 1,024 | order of an epoch | list of files |")
    print("|---|---|---|---|---|---|")
    for number in IMAGES:
        epochs = [duration(number / cluster.rate()) for cluster in CLUSTERS]
        costs = [
            f"{duration(number * time)}, {size(number * room)}" for time, room in (ORDER, NAMES)
        ]
        print(f"| 10^{len(str(number)) - 1} | {' | '.join(epochs + costs)} |")


def duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} s"


def size(number: float) -> str:
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"


if __name__ == "__main__":
    main()
