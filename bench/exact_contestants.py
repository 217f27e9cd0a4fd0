"""One training run of exact.py, in a process of its own: one of the peers, with its checkpoints.

    python bench/exact_contestants.py NAME SAVES [--resume] [--epochs 4]

Each peer is seeded, saves and resumes as its documentation shows. SAVES is epoch (a checkpoint at
each epoch's end) or steps (one every 10 steps). The working directory gets steps.txt, which has a
JSON line per optimizer step, and final.txt with the SHA-256 of the final weights. All train the
same network on the same images. Ours is train.py itself, with the data and the loss of this file.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

IMAGES, SIZE, CLASSES, BATCH, WORKERS = 512, 16, 4, 32, 2
STEPS = IMAGES // BATCH  # per epoch
SAVE_EVERY = 10  # steps, in the runs that save inside an epoch
PADDING = 2  # pixels on each side, before an image of the old size is cut out
LR, MOMENTUM = 0.05, 0.9
WIDTH, DROPOUT = 8, 0.5  # of the network
DROP_EPOCHS, GAMMA = 2, 0.5  # the learning rate halves every two epochs
WRONG_LABELS = 0.2  # share of the labels, so that the loss stays noisy to the end
STOP_AT = int(os.environ.get("EXACT_STOP_AT", "0"))  # the step in which the parent process kills


def record(step: int, loss: float, images: Tensor | None = None) -> None:
    """Adds a step to steps.txt. At the step STOP_AT, it then waits to be killed."""
    line = {"step": step, "loss": loss, "images": [] if images is None else images.tolist()}
    with open("steps.txt", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    if step == STOP_AT:
        time.sleep(600)


def digest(weights: dict[str, Tensor]) -> str:
    """Returns the SHA-256 of a state dict."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        hashed.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()


# -- the task ------------------------------------------------------------------------------------


class Images(Dataset):
    """Images, uint8 (H, W, C), of a noisy pattern per class, and their labels."""

    def __init__(self, number: int, seed: int):
        patterns = np.random.default_rng(0).normal(128, 20, (CLASSES, 4, 4, 3))
        patterns = patterns.repeat(SIZE // 4, axis=1).repeat(SIZE // 4, axis=2)
        rng = np.random.default_rng(seed)
        labels = rng.integers(CLASSES, size=number)
        pixels = patterns[labels] + rng.normal(0, 50, (number, SIZE, SIZE, 3))
        self.images = pixels.clip(0, 255).astype(np.uint8)
        is_wrong = rng.random(number) < WRONG_LABELS
        self.targets = np.where(is_wrong, rng.integers(CLASSES, size=number), labels).tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple:
        return self.images[index], self.targets[index]


class Augmented(Images):
    """The training images for the peers, normalised and augmented, with the index of each.

    Crop and flip draw from torch's global generator, as torchvision's RandomCrop and
    RandomHorizontalFlip do. To import torchvision would take longer than the training.
    """

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        pixels, label = super().__getitem__(index)
        image = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.5) / 0.2
        top, left = torch.randint(0, 2 * PADDING + 1, (2,)).tolist()
        padded = F.pad(image, 4 * [PADDING])
        image = padded[:, top : top + SIZE, left : left + SIZE]
        return image.flip(2) if torch.rand(1) < 0.5 else image, label, index


def load(root: str) -> dict:
    """Returns the data of train.py, `data.name=bench.exact_contestants:load`."""
    splits = {"train": Images(IMAGES, 1), "val": Images(64, 2), "test": Images(64, 3)}
    return splits | {"classes": [f"class {number}" for number in range(CLASSES)]}


class RecordedLoss(nn.Module):
    """The cross-entropy of train.py, which records every step and counts them in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels)
        if loss.requires_grad:
            value = loss.item()
            loss.register_hook(lambda _: record(self.step.add_(1).item(), value))
        return loss


def build_loader(kind: type = DataLoader):
    return kind(Augmented(IMAGES, 1), batch_size=BATCH, shuffle=True, num_workers=WORKERS)


def build_model() -> nn.Module:
    from cnn.models.simple_cnn import SimpleCNN

    return SimpleCNN(CLASSES, 3, width=WIDTH, dropout=DROPOUT)


def build_optimizer(model: nn.Module):
    """Returns SGD and its schedule, which steps after every batch."""
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, DROP_EPOCHS * STEPS, GAMMA)


def newest(pattern: str) -> Path:
    """Returns the checkpoint that was written last."""
    return max(Path().glob(pattern), key=lambda path: path.stat().st_mtime_ns)


# -- the peers: the final weights of each ---------------------------------------------------------


def plain(saves: str, resume: bool, epochs: int) -> nn.Module:
    """Trains as pytorch/examples does, imagenet/main.py with --seed and --resume.

    It saves at an epoch's end only, so that a run killed inside an epoch begins that epoch again.
    """
    random.seed(0)
    torch.manual_seed(0)
    model, start, step = build_model(), 0, 0
    optimizer, _ = build_optimizer(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, DROP_EPOCHS, GAMMA)
    parts = {"state_dict": model, "optimizer": optimizer, "scheduler": scheduler}
    if resume:
        checkpoint = torch.load("checkpoint.pth.tar")
        start = checkpoint["epoch"]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        step = start * STEPS
    loader = build_loader()
    for epoch in range(start, epochs):
        model.train()
        for images, labels, indices in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            record(step, loss.item(), indices)
        scheduler.step()
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"epoch": epoch + 1, **states}, "checkpoint.pth.tar")
    return model


def lightning(saves: str, resume: bool, epochs: int, stateful: bool = False) -> nn.Module:
    """Trains with Trainer, ModelCheckpoint and fit(ckpt_path=...), seeded by seed_everything.

    A warning of its own on resuming inside an epoch asks for a stateful loader, which it saves.
    """
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Classifier(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = build_model()

        def training_step(self, batch, batch_idx):
            images, labels, _ = batch
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self):
            optimizer, scheduler = build_optimizer(self)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            record(trainer.global_step, outputs["loss"].item(), batch[2])

    L.seed_everything(0, workers=True)
    often = {"every_n_epochs": 1} if saves == "epoch" else {"every_n_train_steps": SAVE_EVERY}
    saver = ModelCheckpoint("checkpoints", save_top_k=-1, **often)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        callbacks=[Record(), saver],
        logger=False,
        enable_progress_bar=False,
        deterministic=True,
    )
    module = Classifier()
    path = newest("checkpoints/*.ckpt") if resume else None
    kind = DataLoader
    if stateful:
        from torchdata.stateful_dataloader import StatefulDataLoader as kind
    trainer.fit(module, build_loader(kind), ckpt_path=path)
    return module.model


def trainer(saves: str, resume: bool, epochs: int) -> nn.Module:
    """Trains with Hugging Face's Trainer and train(resume_from_checkpoint=True)."""
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build_model()

        def forward(self, images, labels, indices):
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels)
            self.latest = loss.item(), indices
            return {"loss": loss, "logits": logits}

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **keywords):
            record(state.global_step, *model.latest)

    def collate(items):
        images, labels, indices = zip(*items)
        numbers = {"labels": torch.tensor(labels), "indices": torch.tensor(indices)}
        return {"images": torch.stack(images), **numbers}

    set_seed(0)
    model = Classifier()
    arguments = TrainingArguments(
        output_dir="out",
        seed=0,
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        dataloader_num_workers=WORKERS,
        max_grad_norm=0,
        save_strategy=saves,
        save_steps=SAVE_EVERY,
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=Augmented(IMAGES, 1),
        optimizers=build_optimizer(model),
        callbacks=[Record()],
    ).train(resume_from_checkpoint=resume or None)
    return model.model


def accelerate(saves: str, resume: bool, epochs: int, **config: bool) -> nn.Module:
    """Trains as examples/by_feature/checkpointing.py: save_state, load_state, skip_first_batches.

    A stateful loader skips by itself, and the seedable sampler is told the epoch by set_epoch.
    """
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.utils import set_seed

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**config))
    set_seed(0)
    model = build_model()
    optimizer, scheduler = build_optimizer(model)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, build_loader(), scheduler
    )
    step = 0
    if resume:
        folder = newest("step_*")
        accelerator.load_state(folder)
        step = int(folder.name.removeprefix("step_"))
    for epoch in range(step // STEPS, epochs):
        model.train()
        loader.set_epoch(epoch)
        batches, skipped = loader, step % STEPS
        if skipped and not accelerator.use_stateful_dataloader:
            batches = accelerator.skip_first_batches(loader, skipped)
        for images, labels, indices in batches:
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            record(step, loss.item(), indices)
            if saves == "steps" and step % SAVE_EVERY == 0:
                accelerator.save_state(f"step_{step}")
        if saves == "epoch":
            accelerator.save_state(f"step_{step}")
    return accelerator.unwrap_model(model)


def ignite(saves: str, resume: bool, epochs: int, deterministic: bool = False) -> nn.Module:
    """Trains as in "Resuming the training" of Ignite: Checkpoint with the trainer in it."""
    from ignite.engine import Engine, Events
    from ignite.engine.deterministic import DeterministicEngine
    from ignite.handlers import Checkpoint, DiskSaver
    from ignite.utils import manual_seed

    def update(engine, batch):
        images, labels, _ = batch
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    manual_seed(0)
    model = build_model()
    optimizer, scheduler = build_optimizer(model)
    engine = (DeterministicEngine if deterministic else Engine)(update)
    parts = {"trainer": engine, "model": model, "optimizer": optimizer, "lr_scheduler": scheduler}
    saver = Checkpoint(parts, DiskSaver("checkpoints", require_empty=False), n_saved=None)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: scheduler.step())
    inside = Events.ITERATION_COMPLETED(every=SAVE_EVERY)
    engine.add_event_handler(Events.EPOCH_COMPLETED if saves == "epoch" else inside, saver)

    @engine.on(Events.ITERATION_COMPLETED)
    def record_step(engine):
        record(engine.state.iteration, engine.state.output, engine.state.batch[2])

    if resume:
        content = torch.load(newest("checkpoints/*.pt"), weights_only=False)
        Checkpoint.load_objects(to_load=parts, checkpoint=content)
    engine.run(build_loader(), max_epochs=epochs)
    return model


PEERS = {
    "plain": plain,
    "lightning": lightning,
    "lightning-stateful": partial(lightning, stateful=True),
    "trainer": trainer,
    "accelerate": accelerate,
    "accelerate-seedable": partial(accelerate, use_seedable_sampler=True),
    "accelerate-stateful": partial(accelerate, use_stateful_dataloader=True),
    "ignite": ignite,
    "ignite-deterministic": partial(ignite, deterministic=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("saves", choices=["epoch", "steps"])
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = PEERS[args.name](args.saves, args.resume, args.epochs)
    Path("final.txt").write_text(digest(model.state_dict()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
