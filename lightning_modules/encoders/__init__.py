"""Networks that map images to features. `contract.Encoder` is what all of them share."""

from lightning_modules.encoders.contract import CompileMode, Encoder, build_encoder
from lightning_modules.encoders.fast import FastEncoder
from lightning_modules.encoders.random_patches import RandomPatches
from lightning_modules.encoders.report import ReportEncoder
from lightning_modules.encoders.torchvision import TorchvisionEncoder
