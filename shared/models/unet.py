"""A small U-Net with GroupNorm: dense predictions on patches."""

import torch
from torch import Tensor, nn


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, kernel_size=3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Two levels down and up, one channel in and out.

    Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", 2015; GroupNorm
    in place of BatchNorm, which would mix patients.

    Args:
        width: Channels of the first level, a multiple of 4.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2 = _block(1, width), _block(width, 2 * width)
        self.bottom = _block(2 * width, 4 * width)
        self.widen2 = nn.ConvTranspose2d(4 * width, 2 * width, kernel_size=2, stride=2)
        self.up2 = _block(4 * width, 2 * width)
        self.widen1 = nn.ConvTranspose2d(2 * width, width, kernel_size=2, stride=2)
        self.up1 = _block(2 * width, width)
        self.last = nn.Conv2d(width, 1, kernel_size=1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, 1, H, W)`` of images ``(N, 1, H, W)``, H and W multiples of 4."""
        first = self.down1(images)
        second = self.down2(self.pool(first))
        bottom = self.bottom(self.pool(second))
        wide2 = self.up2(torch.cat([self.widen2(bottom), second], dim=1))
        wide1 = self.up1(torch.cat([self.widen1(wide2), first], dim=1))
        logits: Tensor = self.last(wide1)
        return logits
