"""Where a model's heads look: attention weights of each kind of head, real, imaginary or another.

The weights are computed beside the kernel, from the queries and keys that it gets, in blocks of
queries: memory grows with the length, not with its square. The model's output stays what it was.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropepp.eval.analyze.heads import kinds_of
from ropepp.eval.analyze.output import canvas
from ropepp.model.transformer import Transformer

MEASURES = ("distance", "entropy", "first_token", "same_token")
BLOCK = 64  # queries whose weights are in memory at a time
BINS = 128  # most of a map in each direction


@dataclass(frozen=True)
class AttentionMaps:
    """Mean attention of the heads of each kind. L layers, T tokens, n = ceil(T / bin_width).

    ``weights`` are by kind (L, n, n) float32: the mean weight that a query of the first bin gives
    to a key of the second, over rows, heads and the pairs that causality allows; NaN where there is
    none. ``by_head`` is (rows, L, heads, measures) float64: of each row and head, in the order of
    the layout and of `MEASURES`, means over queries of the ``distance`` to the attended tokens
    (tokens), the ``entropy`` of the weights (nats), and the share on the row's ``first_token`` and
    on the ``same_token`` as the query's.
    """

    kinds: dict[str, list[int]]  # indices of the heads of each kind in a layer, see `kinds_of`
    length: int  # tokens in a row (T)
    bin_width: int  # tokens in a bin of the maps
    weights: dict[str, Tensor]
    by_head: Tensor

    @property
    def heads(self) -> dict[str, int]:
        """Number of heads of each kind in a layer."""
        return {kind: len(heads) for kind, heads in self.kinds.items()}

    @property
    def measures(self) -> dict[str, dict[str, list[float]]]:
        """By kind and name, means over rows and heads in each layer."""
        return {
            kind: {
                name: self.by_head[:, :, heads, index].mean((0, 2)).tolist()
                for index, name in enumerate(MEASURES)
            }
            for kind, heads in self.kinds.items()
        }

    def uniform(self) -> dict[str, float]:
        """The measures of a head that looks at all tokens before it equally."""
        seen = torch.arange(1, self.length + 1, dtype=torch.float64)
        values = ((seen - 1) / 2, seen.log(), 1 / seen, 1 / seen)
        return {name: float(x.mean()) for name, x in zip(MEASURES, values, strict=True)}


@torch.no_grad()
def attention_maps(model: Transformer, input_ids: Tensor) -> AttentionMaps:
    """Attention maps of a model of any variant on rows of tokens, (B, T) int64, each read as one
    document from position 0, one row at a time."""
    B, T = input_ids.shape
    width = -(-T // BINS)
    kinds = kinds_of(model.layout)
    sums = [_Sums(kinds, T, width) for _ in model.blocks()]
    with ExitStack() as hooks:
        for module, own in zip(model.blocks(), sums, strict=True):
            hooks.enter_context(module.self_attn.position.register_forward_hook(own.add))
        for row in input_ids.split(1):
            model.hidden(row)
    by_head = torch.stack([torch.stack(one.measures) for one in sums], dim=1) / T
    pairs = _visible_pairs(T, width)
    maps = {kind: torch.stack([one.maps[kind] for one in sums]) for kind in kinds}
    weights = {kind: (total / (B * pairs)).float() for kind, total in maps.items()}
    return AttentionMaps(kinds, T, width, weights, by_head)


class _Sums:
    """Adds up what a layer's heads attend to, on the CPU in float64."""

    def __init__(self, kinds: dict[str, list[int]], T: int, width: int) -> None:
        self.kinds, self.width = kinds, width
        n = -(-T // width)
        self.maps = {kind: torch.zeros(n, n, dtype=torch.float64) for kind in kinds}
        self.measures: list[Tensor] = []  # of each row, (heads, measures)

    def add(self, layer: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """A hook of a position layer: adds what the heads of one row attend to."""
        q_THD, k_SKD = (x[0].float() for x in output)
        slopes, blocks = layer.alibi_slopes(args[2]), []
        for start in range(0, len(q_THD), BLOCK):
            weights_HtS = _weights(q_THD[start : start + BLOCK], k_SKD, start, slopes)
            H, t, S = weights_HtS.shape
            query = torch.arange(start, start + t, device=weights_HtS.device)
            distance = query[:, None] - torch.arange(S, device=query.device)
            values = (
                (weights_HtS * distance).sum(-1),
                torch.special.entr(weights_HtS).sum(-1),
                weights_HtS[..., 0],
                weights_HtS[..., start:].diagonal(dim1=1, dim2=2),
            )
            blocks.append(torch.stack(values, dim=-1).double().sum(1).cpu())
            n, bins = -(-S // self.width), (query // self.width).cpu()
            filled = torch.nn.functional.pad(weights_HtS, (0, n * self.width - S))
            binned = filled.view(H, t, n, self.width).sum(-1).double().cpu()
            for kind, heads in self.kinds.items():
                self.maps[kind][:, :n].index_add_(0, bins, binned[heads].mean(0))
        self.measures.append(torch.stack(blocks).sum(0))


def _weights(q_tHD: Tensor, k_SKD: Tensor, start: int, slopes_H: Tensor | None) -> Tensor:
    """Attention weights (H, t, start + t) of the row's queries from ``start`` on, float32, as
    `ropepp.model.kernels.definition` has them."""
    q, k = q_tHD.unflatten(1, (k_SKD.shape[1], -1)), k_SKD[: start + len(q_tHD)]
    scores = torch.einsum("tkgd,skd->kgts", q, k).flatten(0, 1) * q.shape[-1] ** -0.5
    index = torch.arange(len(k), device=k.device)
    distance = index[start:, None] - index[None, :]
    if slopes_H is not None:
        scores = scores - slopes_H.float()[:, None, None] * distance.abs()
    return scores.masked_fill(distance < 0, -torch.inf).softmax(-1)


def _visible_pairs(T: int, width: int) -> Tensor:
    """Number of pairs of a query and a key not after it in each pair of bins, (n, n); NaN for 0."""
    n = -(-T // width)
    query = torch.arange(T)
    keys = (query[:, None] + 1 - width * torch.arange(n)).clamp(0, width).double()
    pairs = torch.zeros(n, n, dtype=torch.float64).index_add_(0, query // width, keys)
    return pairs.masked_fill(pairs == 0, torch.nan)


def draw(maps: AttentionMaps, path: Path) -> None:
    """Writes a PNG: the first, middle and last layer side by side, a line of panels for each kind
    of head; logarithmic colours from a tenth of the uniform weight 1 / T up to 1."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    kinds, T = list(maps.weights), maps.length
    layers = len(maps.weights[kinds[0]])
    shown = sorted({0, layers // 2, layers - 1})
    norm, edge = LogNorm(0.1 / T, 1.0), maps.bin_width * maps.weights[kinds[0]].shape[-1]
    colours = colormaps["viridis"].with_extremes(bad="white")
    with canvas(path, 3.5 * len(shown) + 1.8, 3.7 * len(kinds) + 0.5) as figure:
        axes = figure.subplots(len(kinds), len(shown), squeeze=False, sharex=True, sharey=True)
        for line, kind in zip(axes, kinds, strict=True):
            line[0].set_ylabel("query (token)")
            for panel, layer in zip(line, shown, strict=True):
                values = maps.weights[kind][layer].clamp(min=0.1 / T).numpy()
                image = panel.imshow(values, norm=norm, cmap=colours, extent=(0, edge, edge, 0))
                panel.set_title(f"{kind}, layer {layer + 1} of {layers}")
                panel.locator_params(nbins=3)
        for panel in axes[-1]:
            panel.set_xlabel("key (token)")
        figure.colorbar(image, ax=axes).set_label("mean attention weight")
