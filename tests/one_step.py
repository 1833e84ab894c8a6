"""One training step of each paper setting in float64, the same on every device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller import Distiller
from models import MSResNet, QuanMSResNet

SETTINGS = ("original", "student", "qamd")


def networks() -> tuple[MSResNet, QuanMSResNet]:
    """(teacher, student of 4 bits)"""
    torch.manual_seed(0)
    return MSResNet(18, 4, 3, 1, 8).double(), QuanMSResNet(18, 4, 3, 1, 8, bits=4).double()


def results(setting: str, device: torch.device) -> list[Tensor]:
    """Logits and loss of a training step, the logits of an evaluation after it, all gradients."""
    teacher, student = (network.to(device) for network in networks())
    network = teacher if setting == "original" else student
    torch.manual_seed(1)
    images = torch.rand(3, 1, 16, 16, dtype=torch.float64).to(device)
    labels = torch.tensor([0, 1, 2], device=device)
    if setting == "qamd":
        logits, loss, _ = Distiller(teacher, student)(images, labels)
    else:
        logits = network(images)
        loss = F.cross_entropy(logits, labels)
    loss.backward()
    with torch.no_grad():
        evaluated = network.eval()(images)
    return [logits.detach(), loss.detach(), evaluated, *(p.grad for p in network.parameters())]
