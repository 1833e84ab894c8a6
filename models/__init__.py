from functools import partial

from models.MS_ResNet import MSResNet
from models.network import SpikingNetwork
from models.Quan_MS_ResNet import QuanMSResNet
from models.VGG import VGG

# What --arch calls a network: (what a reader calls it, what makes it of the arguments of
# SpikingNetwork).
NETWORKS = {
    "resnet18": ("MS-ResNet-18", partial(MSResNet, 18)),
    "resnet34": ("MS-ResNet-34", partial(MSResNet, 34)),
    "vgg9": ("VGG-9", partial(VGG, 9)),
    "vgg16": ("VGG-16", partial(VGG, 16)),
}

__all__ = ["NETWORKS", "VGG", "MSResNet", "QuanMSResNet", "SpikingNetwork"]
