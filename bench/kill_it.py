"""Kills a run and resumes it: are the final weights those of a run that was never stopped?

python bench/kill_it.py
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

train = [sys.executable, "train.py", "train.epochs=10"]
subprocess.run([*train, "run=whole"], check=True)
process = subprocess.Popen([*train, "run=killed"])
while not Path("checkpoints/killed/last.pth").exists():  # until the first epoch is saved
    time.sleep(0.05)
process.kill()  # SIGKILL, as kill -9
process.wait()
subprocess.run([*train, "run=killed", "--resume"], check=True)

runs = [torch.load(f"checkpoints/{run}/last.pth", weights_only=True) for run in ("whole", "killed")]
whole, killed = (run["model_state_dict"] for run in runs)
same = all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())
print("the same weights, bit for bit" if same else "other weights")
