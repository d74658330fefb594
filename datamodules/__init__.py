from datamodules.cifar10 import CIFAR10DataModule
from datamodules.digits import DigitsDataModule

__all__ = ["CIFAR10DataModule", "DigitsDataModule"]
