"""ResNets for images of 32 x 32 pixels, which timm has none of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kd_plugins.errors import DistillError
from kd_plugins.registry import MODELS
from kd_plugins.teachers.network import import_timm


@MODELS.register_module()
class CifarResNet(nn.Module):
    """The ResNet of He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), section 4.2.

    A 3 x 3 convolution, then three stages of ``(depth - 2) / 6`` basic blocks at 32, 16 and 8 pixels. Default widths
    are those of resnet8x4 (``depth=8``) and resnet32x4 (``depth=32``) in the tables of CRD (arXiv 1910.10699) and
    mdistiller: four times the paper's, which are ``channels=(16, 16, 32, 64)``, with a stem of twice its width. Where
    the width changes, the shortcut is a 1 x 1 convolution as there (the paper: padding with zeros). Layers are named as
    in mdistiller, so that its weights load.

    Args:
        depth: 6n + 2: 8, 14, 20, 32, 44, 56, 110.
        num_classes: Classes.
        channels: Widths of the stem and of the three stages.

    Raises:
        DistillError: The depth is not 6n + 2, or there are not four widths.
    """

    def __init__(self, depth: int, num_classes: int = 100, channels: Sequence[int] = (32, 64, 128, 256)) -> None:
        super().__init__()
        if not isinstance(depth, int) or depth < 8 or depth % 6 != 2:
            raise DistillError(f'CifarResNet: depth must be 6n + 2 (8, 14, 20, 32, ...), got {depth!r}.')
        if len(channels) != 4:
            raise DistillError(f'CifarResNet: channels are those of the stem and three stages, got {channels!r}.')
        import_timm('CifarResNet')
        from timm.models.resnet import BasicBlock

        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        for i in (1, 2, 3):
            width, stride = channels[i], 1 if i == 1 else 2
            blocks = [BasicBlock(channels[i - 1], width, stride, _shortcut(channels[i - 1], width, stride))]
            blocks += [BasicBlock(width, width) for _ in range((depth - 2) // 6 - 1)]
            setattr(self, f'layer{i}', nn.Sequential(*blocks))
        self.fc = nn.Linear(channels[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    def get_classifier(self) -> nn.Module:
        """The layer that makes logits, as timm models name it."""
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, 32, 32)`` normalised images to ``(B, num_classes)`` logits."""
        features = self.relu(self.bn1(self.conv1(images)))
        return self.fc(self.layer3(self.layer2(self.layer1(features))).mean((2, 3)))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
