from models.MS_ResNet import MSResNet
from models.network import SpikingNetwork
from models.Quan_MS_ResNet import QuanMSResNet

__all__ = ["MSResNet", "QuanMSResNet", "SpikingNetwork"]
