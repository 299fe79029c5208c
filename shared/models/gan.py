"""A conditional DCGAN on grey images; GroupNorm in place of BatchNorm, which would mix patients.

References:
    Radford, Metz, Chintala, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
    Networks", ICLR 2016.
    Miyato, Koyama, "cGANs with Projection Discriminator", ICLR 2018: one linear form over shared features per class.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDES = (32, 64)
_SMALLEST = 4
_GROUPS = 8
_SLOPE = 0.2
_AT_ONCE = 256


class Discriminator(nn.Module):
    """Strided convolutions down to a small map, then one linear form per class.

    Args:
        width: Channels of the first layer, a multiple of 4; every further layer doubles them.
        side: Of the images, in pixels; halved as long as it is even and above 4.
        classes: One logit each.
    """

    def __init__(self, width: int = 64, side: int = 28, classes: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, kernel_size=4, stride=2, padding=1), nn.LeakyReLU(_SLOPE)]
        side //= 2
        while side > _SMALLEST and side % 2 == 0:
            layers += [
                nn.Conv2d(width, 2 * width, kernel_size=4, stride=2, padding=1),
                nn.GroupNorm(_GROUPS, 2 * width),
                nn.LeakyReLU(_SLOPE),
            ]
            width, side = 2 * width, side // 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side**2, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, classes)`` of images ``(N, 1, side, side)``."""
        logits: Tensor = self.layers(images)
        return logits


class Smoothing(nn.Module):
    """A fixed low pass of one pixel: the binomial 1, 2, 1 along both axes, borders repeated.

    Transposed convolutions with stride leave a chequerboard, and a noised discriminator does not unlearn it; the
    binomial is zero at the chequerboard's frequency. It has no weights.
    """

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("kernel", torch.outer(line, line)[None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return images ``(N, 1, side, side)`` of the same size."""
        return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), self.kernel)


class Generator(nn.Module):
    """Transposed convolutions from a latent vector and a class to an image, smoothed before the last nonlinearity.

    Args:
        width: Channels of the last hidden layer, a multiple of 8; every layer before it has twice as many.
        side: Of the images, one of ``SIDES``.
        classes: How many there are.
        latent: Length of the latent vector.
    """

    def __init__(self, width: int = 24, side: int = 32, classes: int = 2, latent: int = 64) -> None:
        super().__init__()
        self.classes, self.latent = classes, latent
        channels = width * side // (2 * _SMALLEST)
        layers: list[nn.Module] = [
            nn.Linear(latent + classes, channels * _SMALLEST**2),
            nn.Unflatten(1, (channels, _SMALLEST, _SMALLEST)),
        ]
        while channels > width:
            layers += [
                nn.GroupNorm(_GROUPS, channels),
                nn.ReLU(),
                nn.ConvTranspose2d(channels, channels // 2, kernel_size=4, stride=2, padding=1),
            ]
            channels //= 2
        layers += [
            nn.GroupNorm(_GROUPS, channels),
            nn.ReLU(),
            nn.ConvTranspose2d(channels, 1, kernel_size=4, stride=2, padding=1),
            Smoothing(),
            nn.Sigmoid(),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        """Return images ``(N, 1, side, side)`` in [0, 1] of latents ``(N, latent)`` and classes ``(N,)``."""
        images: Tensor = self.layers(self.code(latent, labels))
        return images

    def code(self, latent: Tensor, labels: Tensor) -> Tensor:
        """Return what the first layer sees, ``(N, latent + classes)``."""
        # The class must be heard beside so many latents of unit variance.
        return torch.cat([latent, F.one_hot(labels, self.classes).to(latent) * self.latent**0.5 / 2], dim=1)


class ConditionalGan(nn.Module):
    """Both networks, and a moving average of the generator, as one model with one vector of weights.

    Attributes:
        generator: Trained against the discriminator.
        discriminator: The only part that patients' gradients move.
        average: What images are drawn from: an exponential moving average of the generator, kept by the server.

    Args:
        generator_width: See :class:`Generator`.
        discriminator_width: See :class:`Discriminator`.
        side: Of the images, one of ``SIDES``.
        classes: How many there are.
        latent: Length of the latent vector.
    """

    def __init__(
        self,
        generator_width: int = 24,
        discriminator_width: int = 12,
        side: int = 32,
        classes: int = 2,
        latent: int = 64,
    ) -> None:
        super().__init__()
        self.generator = Generator(generator_width, side, classes, latent)
        self.discriminator = Discriminator(discriminator_width, side, classes)
        self.average = Generator(generator_width, side, classes, latent).requires_grad_(False)
        self.average.load_state_dict(self.generator.state_dict())

    def forward(self, codes: Tensor) -> Tensor:
        """Return images ``(N, 1, side, side)`` of codes ``(N, latent + classes)``, drawn from the average."""
        images: Tensor = self.average.layers(codes)
        return images

    def judge(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the discriminator's logit ``(N,)`` that each image ``(N, 1, side, side)`` is a real one of its class.

        Args:
            images: In [0, 1].
            labels: ``(N,)`` classes.
        """
        logits: Tensor = self.discriminator(2.0 * images - 1.0)
        return logits.gather(1, labels[:, None])[:, 0]

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the average towards the generator: it keeps the share ``decay`` of itself."""
        for kept, current in zip(self.average.parameters(), self.generator.parameters(), strict=True):
            kept.lerp_(current, 1.0 - decay)

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return images ``(N, 1, side, side)`` of the classes ``(N,)``, drawn from the average."""
        latent = torch.randn(len(labels), self.average.latent, generator=generator)
        device = next(self.parameters()).device
        parts = zip(latent.to(device).split(_AT_ONCE), labels.to(device).split(_AT_ONCE), strict=True)
        return torch.cat([self.average(z, y) for z, y in parts]).cpu()
