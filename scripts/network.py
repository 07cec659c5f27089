"""3D-SkipDenseSeg: a 3D DenseNet whose skip branches go straight to full resolution.

Source: T. D. Bui, J. Shin, T. Moon, "Skip-connected 3D DenseNet for volumetric infant brain MRI
segmentation", Biomedical Signal Processing and Control 54 (2019) 101613.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn


class DenseLayer(nn.Sequential):
    """BN-ReLU-1x1x1 conv (bottleneck), BN-ReLU-3x3x3 conv, dropout; the result is appended to the input.

    Shapes: (B, in_features, X, Y, Z) -> (B, in_features + growth_rate, X, Y, Z).
    """

    def __init__(self, in_features: int, growth_rate: int, bn_size: int, dropout_prob: float) -> None:
        bottleneck = bn_size * growth_rate
        super().__init__(
            OrderedDict(
                norm1=nn.BatchNorm3d(in_features),
                relu1=nn.ReLU(inplace=True),
                conv1=nn.Conv3d(in_features, bottleneck, kernel_size=1, bias=False),
                norm2=nn.BatchNorm3d(bottleneck),
                relu2=nn.ReLU(inplace=True),
                conv2=nn.Conv3d(bottleneck, growth_rate, kernel_size=3, padding=1, bias=False),
                dropout=nn.Dropout(dropout_prob),
            )
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        # written out: TorchScript can't call Sequential.forward through super()
        new = self.conv1(self.relu1(self.norm1(features)))
        new = self.dropout(self.conv2(self.relu2(self.norm2(new))))
        return torch.cat((features, new), dim=1)


class DenseBlock(nn.Sequential):
    """A sequence of dense layers; each adds `growth_rate` features to its input."""

    def __init__(self, num_layers: int, in_features: int, growth_rate: int, bn_size: int, dropout_prob: float) -> None:
        super().__init__(
            OrderedDict(
                (f"denselayer{i + 1}", DenseLayer(in_features + i * growth_rate, growth_rate, bn_size, dropout_prob))
                for i in range(num_layers)
            )
        )


class Transition(nn.Sequential):
    """BN-ReLU-1x1x1 conv, which halves the features, BN-ReLU-2x2x2 conv of stride 2, which halves the resolution."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(
            OrderedDict(
                norm=nn.BatchNorm3d(in_features),
                relu=nn.ReLU(inplace=True),
                conv=nn.Conv3d(in_features, out_features, kernel_size=1, bias=False),
                pool_norm=nn.BatchNorm3d(out_features),
                pool_relu=nn.ReLU(inplace=True),
                pool=nn.Conv3d(out_features, out_features, kernel_size=2, stride=2, bias=bias),
            )
        )


class Upsampling(nn.ConvTranspose3d):
    """A transposed convolution of kernel `scale + 2`, stride `scale` and padding 1, computed as a convolution.

    The convolution computes, for each cell between 2x2x2 input voxels, all scale^3 output voxels around its centre;
    these are then moved into place. On a CPU, a pass without gradients takes a fifth to two thirds of the time of a
    transposed convolution, except in the two coarsest branches of the paper's variant in float32. With gradients it is
    faster at scale 2 and in grouped bfloat16, and slower at scale 4 without groups. Results differ by rounding.

    Shapes: (B, in_features, X, Y, Z) -> (B, out_features, X * scale, Y * scale, Z * scale).
    """

    def __init__(self, in_features: int, out_features: int, scale: int, groups: int) -> None:
        super().__init__(
            in_features, out_features, kernel_size=scale + 2, stride=scale, padding=1, groups=groups, bias=False
        )
        self.scale = scale

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        scale, groups = self.scale, self.groups
        inputs, outputs = self.in_channels // groups, self.out_channels // groups
        # the taps of both voxels of a cell along each axis; those of the second voxel come first
        weight = nn.functional.pad(self.weight, [scale // 2 - 1] * 6)
        weight = weight.reshape(groups, inputs, outputs, 2, scale, 2, scale, 2, scale).flip(3, 5, 7)
        weight = weight.permute(0, 4, 6, 8, 2, 1, 3, 5, 7).reshape(-1, inputs, 2, 2, 2)
        # features last: their place in memory in the faster layout
        cells = nn.functional.conv3d(features, weight, padding=1, groups=groups).permute(0, 2, 3, 4, 1)
        batch, x, y, z = cells.shape[:4]
        cells = cells.reshape(batch, x, y, z, groups, scale, scale, scale, outputs)
        voxels = cells.permute(0, 1, 5, 2, 6, 3, 7, 4, 8).reshape(batch, x * scale, y * scale, z * scale, -1)
        edge = scale // 2
        return voxels[:, edge:-edge, edge:-edge, edge:-edge].permute(0, 4, 1, 2, 3)


class SkipDenseSeg(nn.Module):
    """Voxel-wise tissue logits from T1 and T2.

    Modules have the names of the authors' published checkpoints, which therefore load with `strict=True`. The
    defaults give the compact variant (466,320 parameters);
    `block_config=(4, 4, 4, 4), grouped_upsampling=True, bias=True` gives the paper's (1,552,256 parameters).

    Shapes: (B, in_channels, X, Y, Z) -> (B, out_channels, X, Y, Z), where X, Y and Z are multiples of `stride`. Each
    dense block doubles the stride: it is 4 for the compact variant and 16 for the paper's. Input: intensities
    normalised to mean 0 and standard deviation 1 over the brain.

    Args:
        in_channels: channels of the input, T1 and T2.
        out_channels: number of classes, background included.
        init_features: features of the three convolutions at full resolution.
        growth_rate: features added by each dense layer.
        block_config: number of dense layers of each dense block.
        bn_size: features of a bottleneck, in units of `growth_rate`.
        dropout_prob: dropout probability at the end of each dense layer.
        grouped_upsampling: whether each class is upsampled from a separate group of features.
        bias: whether the transition's pooling and the classifier convolutions have a bias.

    Raises:
        ValueError: on call, if a spatial size isn't a multiple of `stride`.
    """

    def __init__(
        self,
        in_channels: int = 2,
        out_channels: int = 4,
        init_features: int = 32,
        growth_rate: int = 16,
        block_config: Sequence[int] = (4, 4),
        bn_size: int = 4,
        dropout_prob: float = 0.2,
        grouped_upsampling: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.stride: int = 2 ** len(block_config)

        # full resolution; the output of the last convolution is the first skip branch
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv3d(in_channels, init_features, kernel_size=3, padding=1, bias=False),
                norm0=nn.BatchNorm3d(init_features),
                relu0=nn.ReLU(inplace=True),
                conv1=nn.Conv3d(init_features, init_features, kernel_size=3, padding=1, bias=False),
                norm1=nn.BatchNorm3d(init_features),
                relu1=nn.ReLU(inplace=True),
                conv2=nn.Conv3d(init_features, init_features, kernel_size=3, padding=1, bias=False),
            )
        )
        self.features_bn = nn.Sequential(OrderedDict(norm2=nn.BatchNorm3d(init_features), relu2=nn.ReLU(inplace=True)))
        self.conv_pool_first = nn.Conv3d(init_features, init_features, kernel_size=2, stride=2, bias=False)

        self.dense_blocks = nn.ModuleList()
        self.upsampling_blocks = nn.ModuleList()
        self.transit_blocks = nn.ModuleList()
        num_features = init_features
        for i, num_layers in enumerate(block_config):
            self.dense_blocks.append(DenseBlock(num_layers, num_features, growth_rate, bn_size, dropout_prob))
            num_features += num_layers * growth_rate
            self.upsampling_blocks.append(
                Upsampling(num_features, out_channels, 2 ** (i + 1), groups=out_channels if grouped_upsampling else 1)
            )
            if i < len(block_config) - 1:
                self.transit_blocks.append(Transition(num_features, num_features // 2, bias))
                num_features //= 2
            else:  # nothing follows the last block; Identity, without parameters, keeps both lists equally long
                self.transit_blocks.append(nn.Identity())

        num_branch_features = init_features + out_channels * len(block_config)
        self.bn_class = nn.BatchNorm3d(num_branch_features)
        self.relu_class = nn.ReLU(inplace=True)
        self.conv_class = nn.Conv3d(num_branch_features, out_channels, kernel_size=1, bias=bias)

        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        size = image.shape[2:]
        if size[0] % self.stride != 0 or size[1] % self.stride != 0 or size[2] % self.stride != 0:
            raise ValueError(
                f"SkipDenseSeg needs spatial sizes that are multiples of {self.stride}, "
                f"got {size[0]} x {size[1]} x {size[2]}"
            )
        full_resolution = self.features(image)
        features = self.conv_pool_first(self.features_bn(full_resolution))
        branches: list[torch.Tensor] = []
        for dense_block, upsampling, transition in zip(
            self.dense_blocks, self.upsampling_blocks, self.transit_blocks, strict=True
        ):
            features = dense_block(features)
            branches.append(upsampling(features))
            features = transition(features)
        branches.append(full_resolution)
        return self.conv_class(self.relu_class(self.bn_class(torch.cat(branches, dim=1))))
