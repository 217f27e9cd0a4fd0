"""Data of your own: photos/cat_001.jpg, photos/dog_7.png, ...; the class is the name up to the _.

python train.py data.name=examples.own_data:load data.root=photos data.image_size=64
"""

from pathlib import Path

from PIL import Image


class Photos:
    def __init__(self, paths: list[Path], classes: list[str]):
        self.paths = paths
        self.targets = [classes.index(path.stem.split("_")[0]) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(self.paths[index]).convert("RGB"), self.targets[index]


def load(root: str) -> dict:  # further keywords come from data.args
    paths = sorted(Path(root).glob("*_*.*"))  # sorted: in the same order on every machine
    classes = sorted({path.stem.split("_")[0] for path in paths})
    return {
        "train": Photos(paths, classes),
        "classes": classes,
    }  # "val" and "test" if you have them
