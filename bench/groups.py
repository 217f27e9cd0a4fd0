"""What a division by picture instead of by person claims: near-copies of photographs.

    python bench/groups.py --clothing clothing              some minutes
    python bench/groups.py --clothing clothing --quick      says nothing

Of the folder's training photographs (train/CLASS/*.jpg), 30 of each class become persons with five
pictures each, which are shifted by some pixels. configs/folder.yaml trains on them, with test and
validation pictures held out by picture, and by person (data.group). The same test accuracy on
photographs of other people is what such a figure should foretell: those of the folder's test/.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import ROOT, arguments, finish, table

PERSONS, PICTURES = 30, 5  # per class, and per person
SIDE, SHIFT = 96, 4  # pixels
DIVISIONS = {"by picture": [], "by person": ["data.group=person\\d+"]}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--clothing", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    persons, epochs, seeds = (4, 1, 1) if args.quick else (PERSONS, 15, args.seeds)
    runs: dict[str, list] = {name: [] for name in DIVISIONS}
    with tempfile.TemporaryDirectory() as scratch:
        photos = make_photos(args.clothing / "train", Path(scratch, "photos"), persons)
        for seed in range(seeds):
            for name, words in DIVISIONS.items():
                where = Path(scratch, f"{name}_{seed}")
                where.mkdir()
                words = [*words, f"seed={seed}", f"train.epochs={epochs}", f"data.root={photos}"]
                run = tested(where, words, args.clothing / "test")
                runs[name].append(run)
                print(f"{name}, seed {seed}: {json.dumps(run)}", flush=True)
    rows = [
        [name, *(f"{statistics.mean(run[key] for run in found):.3f}" for key in ("test", "others"))]
        for name, found in runs.items()
    ]
    print(table(["divided", "test", "photographs of others"], rows))
    finish({"runs": runs}, args.json)


def make_photos(source: Path, made: Path, persons: int) -> Path:
    """Writes near-copies of some photographs of each class, and returns their folder."""
    person = 0
    for folder in sorted(source.iterdir()):
        (made / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:persons]:
            photo = Image.open(path).convert("RGB").resize((SIDE + 2 * SHIFT, SIDE + 2 * SHIFT))
            for picture in range(PICTURES):
                left, top = (picture * SHIFT // 2, (PICTURES - 1 - picture) * SHIFT // 2)
                part = photo.crop((left, top, left + SIDE, top + SIDE))
                part.save(made / folder.name / f"person{person:03}_{picture}.png")
            person += 1
    return made


def tested(where: Path, words: list[str], others: Path) -> dict[str, float | list[float]]:
    """Trains in a folder, and returns the accuracy of the test and of other photographs."""
    config = str(ROOT / "configs/folder.yaml")
    train = ["train.py", "--config", config, "log.report=false", *words]
    test_others = ["evaluate.py", "--json", "o.json", f"data.root={others.resolve()}"]
    for script, *rest in (train, [*test_others, "data.group=null"]):
        command = [sys.executable, str(ROOT / script), *rest]
        subprocess.run(command, cwd=where, check=True, capture_output=True)
    test = json.loads((where / "logs/result.json").read_text())["test"]
    others_acc = json.loads((where / "o.json").read_text())["metrics"]["test_acc"]
    return {"test": test["test_acc"], "95": test["test_acc_95"], "others": others_acc}


if __name__ == "__main__":
    main()
