"""MLPMixer (arXiv 2105.01601) and ConvMixer (arXiv 2201.09792) for CIFAR, Figure 6 of the paper."""

from __future__ import annotations

from torch import Tensor, nn


class Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        """The sum, of the shape of ``x``."""
        result: Tensor = x + self.body(x)
        return result


class MLPMixer(nn.Module):
    """MLPMixer with two linear layers over the tokens and two over the channels in each block.

    Args:
        classes: number of classes.
        image_size: height and width of the images.
        patch_size: height and width of a patch.
        dim: channels.
        depth: blocks.
        token_factor: width between the layers over tokens, in tokens.
        channel_factor: the same for channels; 0.5 is smaller than usual and is what the public version counted here
            has as default.
        dropout: behind every linear layer of the blocks.
    """

    def __init__(
        self,
        classes: int = 10,
        image_size: int = 32,
        patch_size: int = 4,
        dim: int = 512,
        depth: int = 6,
        token_factor: float = 4,
        channel_factor: float = 0.5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        tokens = (image_size // patch_size) ** 2
        self.patch_size = patch_size
        self.embed = nn.Linear(3 * patch_size**2, dim)

        def mix(size: int, width: int, over_tokens: bool) -> Residual:
            first, second = (
                (nn.Conv1d(size, width, 1), nn.Conv1d(width, size, 1))
                if over_tokens  # on [N, tokens, dim]: a linear layer over the tokens without a transpose
                else (nn.Linear(size, width), nn.Linear(width, size))
            )
            return Residual(nn.LayerNorm(dim), first, nn.GELU(), nn.Dropout(dropout), second, nn.Dropout(dropout))

        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    mix(tokens, int(tokens * token_factor), over_tokens=True),
                    mix(dim, int(dim * channel_factor), over_tokens=False),
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, 3, size, size]``."""
        x = self.embed(patches(image, self.patch_size))
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


def patches(image: Tensor, size: int) -> Tensor:
    """``[N, C, H, W]`` as rows of pixels, channels last: ``[N, H / size * W / size, size * size * C]``."""
    split = image.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [N, C, h, size, w, size]
    rows: Tensor = split.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return rows


class ConvMixer(nn.Module):
    """ConvMixer: depthwise convolutions over the image, 1 x 1 convolutions over the channels.

    Args:
        classes: number of classes.
        dim: channels.
        depth: blocks.
        kernel_size: size of the depthwise convolutions, which keep the image's size: an even one pads one more pixel
            after the image than before it.
        patch_size: height and width of a patch.
    """

    def __init__(
        self, classes: int = 10, dim: int = 256, depth: int = 16, kernel_size: int = 8, patch_size: int = 1
    ) -> None:
        super().__init__()

        def function() -> list[nn.Module]:
            return [nn.GELU(), nn.BatchNorm2d(dim)]

        before, after = (kernel_size - 1) // 2, kernel_size // 2
        padding: list[nn.Module] = [] if before == after else [nn.ZeroPad2d((before, after, before, after))]
        layers: list[nn.Module] = [nn.Conv2d(3, dim, patch_size, patch_size), *function()]
        for _ in range(depth):
            depthwise = nn.Conv2d(dim, dim, kernel_size, padding=0 if padding else before, groups=dim)
            layers += [Residual(*padding, depthwise, *function()), nn.Conv2d(dim, dim, 1), *function()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(dim, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, 3, H, W]``."""
        logits: Tensor = self.head(self.layers(image).mean((2, 3)))
        return logits
