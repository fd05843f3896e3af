"""The U-Net with nested, dense skips (Zhou et al., "UNet++", DLMIA 2018, and IEEE TMI 39, 2020).

Node (i, j) lies at level i, 0 the highest, in column j: column 0 is the encoder, and a node takes all nodes to its left
at its level and the upsampled node (i + 1, j - 1) below. Here with transposed convolutions.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from medseg.networks.blocks import ConvBlock, Stage, conv_stage, transposed
from medseg.networks.unet import UNet


class UNetPlusPlus(UNet):
    """Nested U-Nets of every depth that share their encoder.

    Shapes, arguments and errors as ``UNet``, but that all logits of deep supervision have the size of the input: those
    of the nodes (0, L) to (0, 1), deepest first. What is to be ``pruned`` has to be trained with it, with a weight for
    every level, as by ``medseg.losses``.
    """

    def _build_decoder(self, conv: Callable[..., ConvBlock], stages: Sequence[Stage], convs: Sequence[int]) -> None:
        """Modules by column, within it highest resolution first."""
        self.upsample, self.decoder = nn.ModuleList(), nn.ModuleList()
        pairs = list(zip(itertools.pairwise(stages), convs, strict=True))
        up = transposed(self.spatial_dims)
        for column in range(1, len(stages)):
            rows = pairs[: len(stages) - column]
            self.upsample.append(
                nn.ModuleList(up(low.features, high.features, low.stride, low.stride) for (high, low), _ in rows)
            )
            self.decoder.append(
                nn.ModuleList(
                    conv_stage(conv, (column + 1) * high.features, high._replace(stride=high.ones, convs=count))
                    for (high, _), count in rows
                )
            )

    def _levels(self, stages: Sequence[Stage]) -> list[Stage]:
        return [stages[0]] * (len(stages) - 1)

    def decode(self, skips: Sequence[Tensor]) -> list[Tensor]:
        """Features of the nodes of the highest level, deepest first."""
        rows = [[skip] for skip in skips]
        columns: Any = zip(self.upsample, self.decoder, strict=True)
        for ups, nodes in columns:
            # from the top down, so that the last node below is still that of the column before
            for level, (up, node) in enumerate(zip(ups, nodes, strict=True)):
                below = rows[level + 1][-1]
                rows[level].append(self._run(node, torch.cat([up(below), *rows[level]], dim=1)))
        return rows[0][:0:-1]

    def pruned(self, depth: int) -> Self:
        """A smaller network for inference, whose logits are exactly those of node (0, depth).

        Args:
            depth: 1, the fastest, to the number of stages less 1, the whole network.

        Raises:
            ValueError: no such depth, or the network was made without deep supervision, so that only the whole depth
                has a head.
        """
        whole = len(self.decoder)
        heads = {whole - n: head for n, head in enumerate(self.heads)}
        if depth not in heads:
            raise ValueError(f"no head at depth {depth}; there are {sorted(heads)}")
        network = copy.deepcopy(self)
        network.deep_supervision = False
        network.encoder = network.encoder[: depth + 1]
        network.upsample, network.decoder = (
            nn.ModuleList(column[: depth - n] for n, column in enumerate(columns[:depth]))  # type: ignore[index]
            for columns in (network.upsample, network.decoder)
        )
        network.heads = network.heads[whole - depth : whole - depth + 1]
        return network
