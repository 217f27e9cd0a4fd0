"""A loss of your own: the focal loss, which looks at the hard images (Lin et al., ICCV 2017).

python train.py loss.name=examples.own_loss:Focal loss.args="{gamma: 1.5}"
"""

from torch import Tensor, nn
from torch.nn import functional as F


class Focal(nn.Module):
    def __init__(self, gamma: float = 2.0):
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:  # (N, classes), (N) to a mean ()
        loss = F.cross_entropy(logits, labels, reduction="none")
        return ((1 - (-loss).exp()) ** self.gamma * loss).mean()
