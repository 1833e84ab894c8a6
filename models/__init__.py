from models.MS_ResNet import MSResNet
from models.Quan_MS_ResNet import QuanMSResNet

__all__ = ["MSResNet", "QuanMSResNet"]
