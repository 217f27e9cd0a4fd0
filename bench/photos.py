"""Folders of photographs: images a second loaded and trained on, waiting, memory, the first step.

    pip install -r bench/requirements.txt
    python bench/photos.py --photos clothing                  some 20 minutes
    python bench/photos.py --photos clothing --quick          about 3: few pictures, one round
    python bench/photos.py --photos clothing --first-step     train.py on 500 x 12 megapixels

--photos is a folder of real photographs, at any depth, of which mosaics are made: JPEGs of 12, 2 and
0.3 megapixels (--only 12,0.3), quality 90, at least 2 bits per pixel, in two classes; --made keeps
them. val/ and test/ have a few of 320 x 240, which cost ours alone, and little. Every run is a process
of its own (photo_contestants.py): ours, ImageFolder with transforms v2, timm's loader, Ultralytics'
with cache=disk, three epochs each, 2 workers each, batches of 32, resnet18 at 224. A run begins without
a cache, and its first epoch counts from the listing of the folder on; "later" is the second and third
epoch. Files are in the system's memory for all. Waiting is the time in which the loop waits for its
next batch, over the whole; peak is of the process and its workers, what they share counted once
(PSS), the pages of a mapped cache included. Rounds alternate, ratios are taken within a round.

--first-step is the time from the command to the first step of train.py, without a cache, over that of
reading every file of the folder once and decoding it at the smallest scale of JPEG (1, 1/2, 1/4, 1/8)
whose shorter side is still 1.725 x 224 or more, in 2 threads.
"""

import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import ROOT, alternate, arguments, finish, ratio, table
from bench.photo_contestants import CONTESTANTS, SIDE, WORKERS

SIZES = {"12": (4000, 3000), "2": (1632, 1224), "0.3": (640, 480)}
# Pictures in whole batches, since timm drops another; fewer in training, whose steps take long.
LOADED, TRAINED, BATCH = {"12": 64, "2": 128, "0.3": 640}, {"12": 64, "2": 96, "0.3": 128}, 32
QUICK, QUICK_BATCH = {"12": 16, "2": 32, "0.3": 48}, 8
FIRST_STEP, QUICK_FIRST_STEP = 500, 40
LEAST_BITS, QUALITY = 2.0, 90
LOOK_EVERY = 0.25  # seconds between two looks at the memory


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path, help="folder of photographs, to make mosaics of")
    parser.add_argument("--made", type=Path, help="folder to keep the mosaics in, for a next time")
    parser.add_argument("--only", help=f"megapixels, of {','.join(SIZES)}")
    parser.add_argument("--first-step", action="store_true", help="only the first step of train.py")
    parser.add_argument("--rounds", type=int, default=3, help="of loading, and of --first-step")
    parser.add_argument("--training-rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    sizes = args.only.split(",") if args.only else ["12", "0.3"] if args.quick else [*SIZES]
    if unknown := set(sizes) - SIZES.keys():
        parser.error(f"--only: expected some of {','.join(SIZES)}, got {', '.join(unknown)}")
    if args.photos is None:
        print("skipped: --photos FOLDER is needed, of real photographs to make mosaics of")
        return
    photos = sorted(args.photos.rglob("*.jpg"))
    if not photos:
        parser.error(f"--photos: expected files *.jpg in {args.photos}, found none")
    rounds, training_rounds = (1, 1) if args.quick else (args.rounds, args.training_rounds)
    figures: dict = {}
    with tempfile.TemporaryDirectory() as scratch:
        made = (args.made or Path(scratch)).resolve()
        if args.first_step:
            number = QUICK_FIRST_STEP if args.quick else FIRST_STEP
            root = make(made, photos, "12", number)
            figures["first_step"] = first_step(root, args.device, rounds)
        for size in sizes if not args.first_step else ():
            loaded, trained = (QUICK[size],) * 2 if args.quick else (LOADED[size], TRAINED[size])
            roots = {number: make(made, photos, size, number) for number in {loaded, trained}}
            how = (QUICK_BATCH if args.quick else BATCH, args.device)
            figures[size] = {
                "loading": compare(roots[loaded], "loading", rounds, *how),
                "training": compare(roots[trained], "training", training_rounds, *how),
            }
    versions = {name: version(name) for name in CONTESTANTS if find_spec(name)}
    finish({"device": args.device, "versions": versions} | figures, args.json)


# -- the pictures -----------------------------------------------------------------------------------


def make(made: Path, photos: list[Path], size: str, number: int) -> Path:
    """A folder with so many mosaics in train/a and train/b, and four small ones beside."""
    root = made / f"{size}x{number}"
    wanted = [(root / "train" / "ab"[i % 2] / f"{i:04}.jpg", SIZES[size]) for i in range(number)]
    for i, part in enumerate(("val", "val", "test", "test")):
        wanted.append((root / part / "ab"[i % 2] / f"{part}{i}.jpg", (320, 240)))

    def write(seed: int) -> None:
        path, (width, height) = wanted[seed]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            half = path.with_suffix(".tmp")
            mosaic(photos, width, height, seed).save(half, "JPEG", quality=QUALITY)
            half.rename(path)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(len(wanted))))
    width, height = SIZES[size]
    each = sum(path.stat().st_size for path, _ in wanted[:number]) / number
    bits = 8 * each / (width * height)
    print(
        f"{number} pictures of {width} x {height}: {each / 1e6:.2f} MB each, {bits:.2f} bits a pixel",
        flush=True,
    )
    if bits < LEAST_BITS:
        raise SystemExit(f"--photos: too little detail, expected {LEAST_BITS} bits a pixel or more")
    return root


def mosaic(photos: list[Path], width: int, height: int, seed: int) -> Image.Image:
    """Rows of photographs, drawn anew for each place; those of a row are of one height."""
    rng, whole, y = np.random.default_rng(seed), Image.new("RGB", (width, height)), 0
    while y < height:
        x, tall = 0, 0
        while x < width:
            with Image.open(photos[rng.integers(len(photos))]) as file:
                photo = file.convert("RGB")
            tall = tall or photo.height
            if photo.height != tall:
                photo = photo.resize((max(1, photo.width * tall // photo.height), tall))
            whole.paste(photo, (x, y))
            x += photo.width
        y += tall
    return whole


# -- loading and training ---------------------------------------------------------------------------


LOADING = {"first": "images/s, first epoch", "later": "later", "peak_megabytes": "peak MB"}
WAITING = {"waiting_first": "waiting %, first epoch", "waiting_later": "later"}
COLUMNS = {"loading": LOADING, "training": LOADING | WAITING | {"first_step": "s to first step"}}


def compare(root: Path, act: str, rounds: int, batch: int, device: str) -> dict:
    """All the contestants on one folder, round by round."""
    names = [name for name in CONTESTANTS if name == "ours" or find_spec(name)]
    measures = {name: lambda name=name: measure(name, root, act, batch, device) for name in names}
    runs = alternate(measures, rounds)
    size, _, number = root.name.partition("x")
    print(f"\n{act}: {number} pictures of {size} megapixels, batches of {batch}, {rounds} rounds")
    columns = COLUMNS[act]
    rows = [
        [name, *(spread([run[key] for run in runs[name]]) for key in columns)] for name in names
    ]
    for name in CONTESTANTS.keys() - names:
        rows.append([name, "not installed", *[""] * (len(columns) - 1)])
    print(table(["", *columns.values()], rows))
    ratios = {}
    for peer in names[1:]:
        for key, when in (("first", "in the first epoch"), ("later", "later")):
            found = ratio(*([run[key] for run in runs[name]] for name in ("ours", peer)))
            ratios[f"{key} over {peer}"] = found
            print(
                f"ours over {peer} {when}: {found['median']:.2f}"
                f" ({found['least']:.2f} to {found['largest']:.2f})",
                flush=True,
            )
    return {"ratios": ratios, "runs": runs}


def spread(values: list[float]) -> str:
    """Median, least and largest."""
    digits = 0 if min(values) >= 100 else 1
    middle, least, most = (f"{f(values):,.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} ({least} to {most})" if len(values) > 1 else middle


def measure(name: str, root: Path, act: str, batch: int, device: str) -> dict:
    """One run, without a cache before it, and the most memory that was seen meanwhile."""
    with tempfile.TemporaryDirectory() as scratch:
        if name == "ultralytics":  # writes beside the pictures
            root = Path(shutil.copytree(root, f"{scratch}/photos"))
        command = [sys.executable, str(ROOT / "bench/photo_contestants.py"), name, str(root)]
        command += [
            "--batch",
            str(batch),
            "--device",
            device,
            *([] if act == "loading" else ["--train"]),
        ]
        env = without_cache(scratch)
        os.sync()  # what earlier runs wrote is not this one's burden
        said, peak, began = Path(scratch, "said"), 0.0, time.time()
        with open(said, "w") as out:
            process = subprocess.Popen(command, cwd=scratch, env=env, stdout=out, stderr=out)
            while process.poll() is None:
                peak = max(peak, megabytes(process.pid))
                time.sleep(LOOK_EVERY)
        lines = said.read_text().splitlines()
    if process.returncode != 0:
        raise SystemExit(f"{name} ended early:\n" + "\n".join(lines[-20:]))
    run = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
    images, seconds, waited = (np.array(run[key]) for key in ("images", "seconds", "waited"))
    return {
        "first": images[0] / seconds[0],
        "later": images[1:].sum() / seconds[1:].sum(),
        "waiting_first": 100 * waited[0] / seconds[0],
        "waiting_later": 100 * waited[1:].sum() / seconds[1:].sum(),
        "first_step": run["first_step"] and run["first_step"] - began,
        "peak_megabytes": peak,
    }


def without_cache(folder: str) -> dict[str, str]:
    """The environment of a process that finds no cache, and leaves nothing outside the folder."""
    cache = {"XDG_CACHE_HOME": f"{folder}/cache", "YOLO_CONFIG_DIR": folder, "YOLO_OFFLINE": "1"}
    return os.environ | cache | {"TMPDIR": folder}


def megabytes(process: int) -> float:
    """Of a process and of all that it has started; 0 where there is no /proc."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it has ended
        return 0.0
    own = re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)
    return (int(own[1]) * 1024 / 1e6 if own else 0.0) + sum(megabytes(int(c)) for c in children)


# -- the first step ---------------------------------------------------------------------------------


def first_step(root: Path, device: str, rounds: int) -> dict:
    """From the command to the first step, over reading and decoding each file once, in turns."""
    measures = {
        "first step": lambda: seconds_to_first_step(root, device),
        "read, decode": lambda: seconds_to_decode(root),
    }
    times = alternate(measures, rounds, lambda name, s: print(f"{name:<12} {s:.2f} s", flush=True))
    print(
        table(["seconds", "median (least to largest)"], [(n, spread(t)) for n, t in times.items()])
    )
    found = ratio(*times.values())
    print(f"ratio: {found['median']:.3f} ({found['least']:.3f} to {found['largest']:.3f})")
    return {"seconds": times, "ratio": found}


def seconds_to_first_step(root: Path, device: str) -> float:
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--config",
        str(ROOT / "configs/folder.yaml"),
    ]
    command += [f"data.root={root}", "model.name=resnet18", f"data.image_size={SIDE}"]
    command += ["data.augment=[resized_crop, flip]", f"data.batch_size={BATCH}", f"device={device}"]
    command += [
        f"data.num_workers={WORKERS}",
        "log.every_seconds=1e-6",
    ]  # tells of the step at once
    with tempfile.TemporaryDirectory() as scratch:
        os.sync()
        env, said, began = without_cache(scratch), [], time.perf_counter()
        process = subprocess.Popen(
            command, cwd=scratch, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        for line in process.stderr:
            said.append(line)
            if re.match(r"epoch 1/\d+  1/", line):
                seconds = time.perf_counter() - began
                os.killpg(process.pid, signal.SIGKILL)  # its workers, too, which go on for a batch
                process.communicate()
                return seconds
    raise SystemExit("the run ended before a step:\n" + "".join(said[-20:]))


def seconds_to_decode(root: Path) -> float:
    """In a process of its own, whose start does not count."""
    code = f"from bench.photos import decode_all; print(decode_all({str(root)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)  # fmt: skip
    return float(done.stdout)


def decode_all(root: str) -> float:
    """Seconds for all the files below a folder."""

    def decode(path: Path) -> None:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            width, height = image.size
            fitting = [s for s in (8, 4, 2) if min(width, height) / s >= 1.725 * SIDE]
            scale = fitting[0] if fitting else 1
            image.draft("RGB", (width // scale, height // scale))
            image.load()

    began = time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(decode, sorted(Path(root).rglob("*.jpg"))))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
