"""A tracker of your own: SwanLab, which finds a resumed run again by its id.

python train.py log.trackers="[examples.swanlab_tracker:SwanLab]"

It needs `pip install swanlab`, then `swanlab login` or SWANLAB_MODE=offline. SWANLAB_PROJECT names
the project. `log.trackers` says when the methods are called; see cnn.records.trackers.MLflow.

After a resume, every epoch is sent anew; SwanLab drops those that it has. Offline, it cannot reopen
a run, and a killed process leaves an empty file (swanlab 0.10). So each start writes a folder that
has every epoch. The latest folder is the whole run; once there is a connection, upload that one:

    swanlab sync swanlog/run-TIME-ID
"""

import hashlib
from pathlib import Path


class SwanLab:
    def open(self, key: str, name: str, settings: dict) -> int:
        import swanlab

        self.run = swanlab.init(
            id=hashlib.sha256(key.encode()).hexdigest()[:16],
            resume="allow",
            name=name,
            config=settings,
            reinit=True,  # a sweep has several runs in one process
            settings=swanlab.Settings(interactive=False, terminal={"proxy_type": "none"}),
        )
        return 0

    def send(self, epoch: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=epoch)

    def close(self, files: list[Path], *, is_finished: bool) -> None:
        for file in files:
            self.run.save(str(file), base_path=str(file.parent), policy="now")
        self.run.finish(state="success" if is_finished else "aborted")
