"""LungCTNet: the classifier of lung nodules on 28×28 patches."""

from torch import Tensor, nn


class LungCTNet(nn.Module):
    """Two convolutions with pooling and two linear layers; about 420,000 parameters.

    Args:
        classes: Number of output classes.
    """

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 128),
            nn.ReLU(),
            nn.Linear(128, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, classes)`` of patches ``(N, 1, 28, 28)`` with values in [0, 1]."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
