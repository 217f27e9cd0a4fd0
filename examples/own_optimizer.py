"""An optimizer of your own: Lion, which steps by the sign of its momentum (Chen et al., NeurIPS 2023).

python train.py optim.name=examples.own_optimizer:Lion optim.lr=0.001

It is given `optim.lr`, `optim.weight_decay` and, where its signature has it, `optim.momentum`;
`optim.args` has further keywords. What it keeps in `self.state` is saved and restored.
"""

import torch


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.lerp(p.grad, mean, group["momentum"]).sign(), alpha=-group["lr"])
                mean.lerp_(p.grad, 0.01)
