"""A tracker of your own: Weights & Biases, which finds a resumed run again by its id.

python train.py log.trackers="[examples.wandb_tracker:WandB]"

It needs `pip install wandb`, then `wandb login` or WANDB_MODE=offline. WANDB_PROJECT names the
project. `log.trackers` says when the methods are called; see cnn.records.trackers.MLflow.

W&B cannot reopen a run offline (github.com/wandb/wandb/issues/4624), and a killed process leaves an
empty file (wandb 0.31). So offline, each start writes a folder that has every epoch from the first
on. The latest folder is the whole run; once there is a connection, upload that one:

    wandb sync wandb/latest-run/
"""

import hashlib
import os
from pathlib import Path


class WandB:
    def open(self, key: str, name: str, settings: dict) -> int:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # would delay the end of training
        import wandb

        self.run = wandb.init(
            id=hashlib.sha256(key.encode()).hexdigest()[:16],
            resume="allow",
            name=name,
            config=settings,
            reinit="create_new",  # a sweep has several runs in one process
            settings=wandb.Settings(console="off", init_timeout=10),
        )
        self.run.define_metric("*", step_metric="epoch")  # W&B's own steps cannot be added to
        return self.run.summary.get("epoch", 0)  # 0 offline

    def send(self, epoch: int, metrics: dict[str, float]) -> None:
        self.run.log({"epoch": epoch, **metrics})

    def close(self, files: list[Path], *, is_finished: bool) -> None:
        for file in files:
            self.run.save(file, base_path=file.parent, policy="now", glob=False)
        self.run.finish(exit_code=0 if is_finished else 1)
