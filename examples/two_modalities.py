"""Two pictures of each case: cases/A/CLASS/NAME.png and cases/P/CLASS/NAME.png are of one patient.

Both are channels of one image, for one model; they must cover each other pixel by pixel:

python train.py data.name=examples.two_modalities:load data.root=cases data.image_size=64

A case is one item. So its pictures are in the same split, and get the same crop and flip. Other
modalities, two or three: data.args="{modalities: [T1, T2, FLAIR]}". Use evaluate.py and export.py
with such a model, but not predict.py, which makes all channels from one file.

One model for each modality needs no code. The best settings are then in
configs/best_hparams/simple_cnn_A.yaml and simple_cnn_P.yaml:

    python train.py data.name=folder data.root=cases/A data.image_size=64 data.tag=A run=A
    python train.py data.name=folder data.root=cases/P data.image_size=64 data.tag=P run=P
"""

from pathlib import Path

import numpy as np
from PIL import Image

from cnn.errors import Refused


class Cases:
    def __init__(self, folders: list[Path], names: list[Path], classes: list[str]):
        self.folders, self.names = folders, names
        self.targets = [classes.index(name.parent.name) for name in names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        pictures = [read_gray(folder / self.names[index]) for folder in self.folders]
        if len({picture.shape for picture in pictures}) > 1:
            raise ValueError(f"{self.names[index]}: pictures of one case differ in size")
        return np.dstack(pictures), self.targets[index]  # H, W, modalities


def read_gray(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if image.mode[0] in "IF":  # Pillow would clip them to 8 bits
            raise ValueError(f"{path}: expected 8 bits per value, got mode {image.mode}")
        return np.asarray(image.convert("L"))  # H, W


def load(root: str, modalities: tuple[str, ...] = ("A", "P")) -> dict:
    folders = [Path(root, modality) for modality in modalities]
    found = [{path.relative_to(folder) for path in folder.glob("*/*.png")} for folder in folders]
    names = sorted(set.union(*found))
    if not names:
        raise Refused(f"data.root: expected {folders[0] / 'CLASS' / 'NAME.png'}, found none")
    for folder, present in zip(folders, found):
        if missing := [str(folder / name) for name in names if name not in present]:
            few = ", ".join(missing[:5])
            raise Refused(f"data.root: missing, {len(missing)} of {len(names)} cases: {few}")
    classes = sorted({name.parent.name for name in names})
    return {"train": Cases(folders, names, classes), "classes": classes}
