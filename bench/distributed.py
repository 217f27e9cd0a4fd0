"""Several processes on one machine: images a second against one, and what an all-reduce costs.

    python bench/distributed.py                     5 rounds, about 6 minutes
    python bench/distributed.py --quick             2 short rounds, about 2 minutes
    python bench/distributed.py --model resnet18    any model of ours; --device cuda: a GPU each

ResNet-9 of width 32 on made-up images of 32 x 32, crop and flip, batches of 128 whatever the number
of processes. On a CPU: one process of one thread, one of two, two of one each. Rounds alternate.
An all-reduce of n bytes is fitted as seconds = latency + n / bandwidth.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import ROOT, alternate, arguments, finish, ratio, table

WAYS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}  # fmt: skip
BATCH = 128
SIZES = [4**power for power in range(2, 13)]  # bytes of an all-reduce: 16 to 16 MiB
ASKED = 1.7


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="resnet9")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reduce", action="store_true", help="what each process of it runs")
    args = parser.parse_args()
    if args.reduce:
        time_all_reduce(args.device)
        return
    rounds, steps = (2, 15) if args.quick else (args.rounds, 25)
    measures = {
        way: lambda way=way: images_per_second(*WAYS[way], args.model, steps, args.device)
        for way in WAYS
    }
    rates = alternate(measures, rounds, lambda way, rate: print(f"{way}: {rate:,.0f}", flush=True))
    one, two_threads, two = rates.values()
    against = {"1 process, 1 thread": ratio(two, one), "1 process, 2 threads": ratio(two, two_threads)}  # fmt: skip
    rows = [(way, f"{statistics.median(found):,.0f}") for way, found in rates.items()]
    print("\n" + table([f"{args.model}, batch {BATCH}", "images/s"], rows))
    for way, found in against.items():
        asked = f"; asked for: {ASKED}" if way.endswith("1 thread") else ""
        span = f"{found['least']:.2f} to {found['largest']:.2f}"
        print(f"2 processes over {way}: {found['median']:.2f} ({span}{asked})")
    seconds = json.loads(torchrun(2, 1, [__file__, "--reduce", "--device", args.device]))
    latency, bandwidth = fit_line(seconds)
    print(f"all-reduce, 2 processes: {latency * 1e6:.0f} µs + bytes / {bandwidth / 1e9:.2f} GB/s")
    finish(
        {"rates": rates, "ratios": against, "all_reduce": {"seconds": seconds, "latency": latency,
         "bandwidth": bandwidth}}, args.json
    )  # fmt: skip


def images_per_second(processes: int, threads: int, model: str, steps: int, device: str) -> float:
    """Of the later epochs of a run in a folder of its own."""
    data = f"{{num_images: {steps * BATCH}, num_test: 64, num_classes: 10, image_size: 32, channels: 3}}"
    settings = [f"data.args={data}", "data.name=synthetic", "data.augment=[crop, flip]"]
    settings += [f"data.batch_size={BATCH}", "data.val_fraction=0.02", f"device={device}"]
    settings += [
        f"model.name={model}",
        f"model.args={'{width: 32}' if model == 'resnet9' else '{}'}",
    ]
    settings += ["train.epochs=3", "log.report=false", "log.tensorboard=false"]
    with tempfile.TemporaryDirectory() as folder:
        words = [str(ROOT / "train.py"), *settings]
        if processes > 1:
            torchrun(processes, threads, words, folder)
        else:
            run([sys.executable, *words], threads, folder)
        with open(Path(folder, "logs/history.csv"), encoding="utf-8") as file:
            return statistics.median(float(row["images_per_second"]) for row in list(csv.DictReader(file))[1:])  # fmt: skip


def torchrun(processes: int, threads: int, words: list[str], folder: str = ".") -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    return run([*launcher, *words], threads, folder)


def run(command: list[str], threads: int, folder: str) -> str:
    """What the command printed."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return done.stdout


def time_all_reduce(device: str) -> None:
    """In every process: the median time of an all-reduce of each size; the first one prints them."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    where = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device == "cuda" else "cpu"
    medians = {}
    for size in SIZES:
        tensor, seconds = torch.ones(size // 4, device=where), []
        for _ in range(30):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            tensor[0].item()  # waits for a GPU too
            seconds.append(time.perf_counter() - began)
        medians[size] = statistics.median(seconds[5:])
    if dist.get_rank() == 0:
        print(json.dumps(medians))
    dist.barrier()
    dist.destroy_process_group()


def fit_line(seconds: dict[str, float]) -> tuple[float, float]:
    """Latency in seconds, bandwidth in bytes a second: the shortest, and the slope of the longest."""
    times = {int(size): value for size, value in seconds.items()}
    small, large = min(times), max(times)
    middle = large // 16
    return times[small], (large - middle) / (times[large] - times[middle])


if __name__ == "__main__":
    main()
