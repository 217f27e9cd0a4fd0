"""One run of recipes.py, in a process of its own: ours or one of the two peers.

    python bench/recipe_contestants.py NAME FOLDER --side 64 --epochs 10 [--fine-tune]

NAME is ours, timm or fastai; FOLDER has train/, validation/ and test/CLASS/*.jpg. Ours is train.py
with configs/folder.yaml or, with --fine-tune, configs/finetune.yaml. The peers are written as their
train.py and their documentation do it, with the defaults of those; only the size of the images, the
network and the number of epochs are given. Each keeps its epoch of the highest validation accuracy
and classifies the test images once with it. The last line of the output is JSON: the accuracy in
validation and test.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NETWORK = "resnet18"  # of the peers, from scratch: the least of their usual ones
SAME_WEIGHTS = "tf_efficientnet_lite0"  # timm's name of the network that finetune.yaml uses


def ours(args: argparse.Namespace) -> dict[str, float]:
    recipe = "finetune" if args.fine_tune else "folder"
    command = [sys.executable, str(ROOT / "train.py"), "--config", f"{ROOT}/configs/{recipe}.yaml"]
    command += [f"data.root={args.folder.resolve()}", f"data.image_size={args.side}"]
    command += [f"train.epochs={args.epochs}", f"seed={args.seed}", "log.report=false"]
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(command, cwd=scratch, check=True, stdout=sys.stderr)
        result = json.loads(Path(scratch, "logs/result.json").read_bytes())
    return {"val": result["best"]["value"], "test": result["test"]["test_acc"]}


def timm(args: argparse.Namespace) -> dict[str, float]:
    """As timm's train.py with --model, --img-size, --num-classes and --epochs, on a CPU."""
    import torch
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.models import create_model
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import random_seed

    random_seed(args.seed)
    classes = sorted(path.name for path in (args.folder / "train").iterdir())
    model = create_model(SAME_WEIGHTS if args.fine_tune else NETWORK, num_classes=len(classes))
    if args.fine_tune:
        model.load_state_dict(same_weights(model), strict=False)
    data = resolve_data_config({"img_size": args.side}, model=model)
    shared = {"input_size": data["input_size"], "batch_size": 128, "use_prefetcher": False}
    shared |= {"mean": data["mean"], "std": data["std"], "num_workers": 4, "pin_memory": False}

    def loader(split: str, **settings):
        dataset = create_dataset(
            "", root=str(args.folder), split=split, is_training=split == "train"
        )
        return create_loader(
            dataset, is_training=split == "train", **shared, device=torch.device("cpu"), **settings
        )

    train = loader("train", scale=(0.08, 1), color_jitter=0.4, interpolation="random")
    whole = {"interpolation": data["interpolation"], "crop_pct": data["crop_pct"]}
    validation = loader("validation", **whole)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, weight_decay=2e-5, momentum=0.9)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=args.epochs,
        lr_min=0.0,
        warmup_t=min(5, args.epochs // 10),  # of its 300 epochs, 5
        warmup_lr_init=1e-5,
    )
    loss_of, best = LabelSmoothingCrossEntropy(0.1), (-1.0, {})
    for epoch in range(args.epochs):
        schedule.step(epoch)
        model.train()
        for images, labels in train:
            loss = loss_of(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        val = accuracy(model, validation)
        if val > best[0]:
            best = (val, copy.deepcopy(model.state_dict()))
    model.load_state_dict(best[1])
    return {"val": best[0], "test": accuracy(model, loader("test", **whole))}


def accuracy(model, batches) -> float:
    import torch

    model.eval()
    right = total = 0
    with torch.inference_mode():
        for images, labels in batches:
            right += (model(images).argmax(1) == labels).sum().item()
            total += len(labels)
    return right / total


def same_weights(model) -> dict:
    """The weights of finetune.yaml for timm's network, whose tensors have other names, but the head's.

    Both list them in the same order; the shapes must agree.
    """
    from cnn.models import efficientnet_lite0

    found = efficientnet_lite0.read_pretrained()
    ours = [tensor for name, tensor in found.items() if not name.startswith("classifier")]
    names = [name for name in model.state_dict() if not name.startswith("classifier")]
    weights = dict(zip(names, ours, strict=True))
    assert all(tensor.shape == model.state_dict()[name].shape for name, tensor in weights.items())
    return weights


def fastai(args: argparse.Namespace) -> dict[str, float]:
    """As fastai's vision tutorial: Resize, aug_transforms, fit_one_cycle or fine_tune."""
    import torch
    from fastai.callback.tracker import SaveModelCallback
    from fastai.vision.all import (
        ImageDataLoaders,
        Normalize,
        Resize,
        aug_transforms,
        get_image_files,
        set_seed,
        vision_learner,
    )
    from fastai.vision.all import accuracy as right
    from torchvision.models import resnet18

    set_seed(args.seed)
    half = [0.5] * 3  # what the weights expect; vision_learner adds it to weights of its own alone
    more = [Normalize.from_stats(half, half)] if args.fine_tune else []
    dls = ImageDataLoaders.from_folder(
        args.folder,
        train="train",
        valid="validation",
        item_tfms=Resize(args.side),
        batch_tfms=[*aug_transforms(), *more],
        device=torch.device("cpu"),
        seed=args.seed,
    )
    with tempfile.TemporaryDirectory() as scratch:
        network = SAME_WEIGHTS if args.fine_tune else resnet18
        learner = vision_learner(dls, network, pretrained=False, metrics=right, path=scratch)
        best = SaveModelCallback(monitor="accuracy")
        if args.fine_tune:
            body = learner.model[0].model
            weights = same_weights(body)
            assert weights.keys() <= body.state_dict().keys()
            body.load_state_dict(weights, strict=False)
            learner.fine_tune(args.epochs - 1, cbs=best)  # and one epoch of the head alone
        else:
            learner.fit_one_cycle(args.epochs, cbs=best)
        test = dls.test_dl(get_image_files(args.folder / "test"), with_labels=True)
        return {"val": best.best, "test": float(learner.validate(dl=test)[1])}


CONTESTANTS = {f.__name__: f for f in (ours, timm, fastai)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, required=True, help="height and width, in pixels")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fine-tune", action="store_true")
    args = parser.parse_args()
    print(json.dumps(CONTESTANTS[args.name](args)), flush=True)


if __name__ == "__main__":
    main()
