"""The discriminator of a DCGAN on 28×28 patches; GroupNorm in place of BatchNorm."""

from torch import Tensor, nn


class Discriminator(nn.Module):
    """Two strided convolutions and a linear layer (Radford, Metz, Chintala, DCGAN, 2016).

    Args:
        width: Channels of the first layer, a multiple of 4.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, kernel_size=4, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * width * 7 * 7, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, 1)`` of images ``(N, 1, 28, 28)``."""
        logits: Tensor = self.layers(images)
        return logits
