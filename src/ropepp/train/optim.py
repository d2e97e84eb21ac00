"""Optimizers as specs of plain values."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from ropepp.errors import InputError, at_least


@dataclass(frozen=True)
class OptimizerSpec:
    """What `ropepp.train.module.LanguageModel` asks of an optimizer."""

    lr: float = 5e-4

    def __post_init__(self) -> None:
        for one in fields(self):  # the parser lets null pass
            if one.default is not None and getattr(self, one.name) is None:
                raise InputError(f"{one.name} of {type(self).__name__} is null; it needs a value")
        at_least(0, lr=self.lr)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        raise TypeError(f"{type(self).__name__} is no optimizer; choose a sub-class such as AdamW")


@dataclass(frozen=True)
class AdamW(OptimizerSpec):
    """AdamW with decoupled weight decay (arXiv 1711.05101), fused; defaults are the paper's recipe.

    Args:
        lr: Peak learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decay per step, times the learning rate.
        decay_norms: Whether the weights of norms decay too.
        decay_embeddings: Whether the embedding matrix decays too.
    """

    betas: tuple[float, float] = (0.95, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_norms: bool = False
    decay_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, eps=self.eps, weight_decay=self.weight_decay)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas is {self.betas}; each must be at least 0 and less than 1")

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        return self.over(model, model.named_parameters())

    def over(
        self, model: nn.Module, parameters: Iterable[tuple[str, nn.Parameter]]
    ) -> torch.optim.AdamW:
        """The optimizer over some parameters of a model, given with their names in it."""
        named = dict(parameters)
        decay = {name: p for name, p in named.items() if self._decays(name, p)}
        keep = [parameter for name, parameter in named.items() if name not in decay]
        usual, *others = by_step(model, decay.items(), self.lr, self.weight_decay)
        groups = [usual, {"params": keep, "weight_decay": 0.0}, *others]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)

    def _decays(self, name: str, parameter: nn.Parameter) -> bool:
        if name.startswith("embed_tokens."):
            return self.decay_embeddings
        return parameter.ndim > 1 or self.decay_norms


def by_step(
    model: nn.Module, named: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups of parameters by the ``step`` that their modules ask for (`MatrixScale`), the usual
    ones first, empty or not. It scales the learning rate; weight decay, which optimizers take times
    the rate, is divided by it: a shorter step does not loosen it. 0 freezes the matrix."""
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in named:
        module = model.get_submodule(name.rpartition(".")[0])
        groups.setdefault(float(getattr(module, "step", 1.0)), []).append(parameter)
    return [
        {"params": own, "lr": lr * step, "weight_decay": weight_decay / step if step else 0.0}
        for step, own in groups.items()
    ]


@dataclass(frozen=True)
class Muon(OptimizerSpec):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for the matrices of the
    blocks; AdamW, as in the spec of that name, for embeddings, output layer and norms.

    Its steps have the size of AdamW's (arXiv 2502.16982): one learning rate, one weight decay.

    Args:
        lr: Peak learning rate.
        momentum: Decay rate of the running mean of gradients.
        nesterov: Whether to look one step ahead.
        weight_decay: Decay per step, times the learning rate.
        ns_steps: Newton-Schulz iterations that make a matrix orthogonal.
        adam_betas: Decay rates of AdamW's two moments.
        adam_eps: Added to the root of AdamW's second moment.
    """

    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.1
    ns_steps: int = 5
    adam_betas: tuple[float, float] = (0.95, 0.99)
    adam_eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum is {self.momentum}; it must be at least 0 and less than 1")
        if not 1 <= self.ns_steps < 100:
            raise InputError(f"ns_steps is {self.ns_steps}; it must be from 1 to 99")
        self._adamw()  # which checks what is its own

    def _adamw(self) -> AdamW:
        return AdamW(self.lr, self.adam_betas, self.adam_eps, self.weight_decay)

    def build(self, model: nn.Module) -> "MuonWithAdamW":
        named = dict(model.named_parameters())
        matrices = {n: p for n, p in named.items() if n.startswith("layers.") and p.ndim == 2}
        rest = {name: parameter for name, parameter in named.items() if name not in matrices}
        muon = torch.optim.Muon(
            by_step(model, matrices.items(), self.lr, self.weight_decay),
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.ns_steps,
            adjust_lr_fn="match_rms_adamw",
        )
        return MuonWithAdamW(muon, self._adamw().over(model, rest.items()))


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers, over different parameters, as one. A group's key ``part`` says whether
    ``muon`` or ``adamw`` updates it. Matrices may be shards (FSDP2), see `step_shard`."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self._parts: dict[str, torch.optim.Optimizer] = {"muon": muon, "adamw": adamw}
        groups = [{**g, "part": name} for name, p in self._parts.items() for g in p.param_groups]
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; returns the loss of ``closure``, which computes gradients, once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, part in self._parts.items():
            # `load_state_dict` made new groups and a new state.
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["part"] == name]
            members = [(p, group) for group in part.param_groups for p in group["params"]]
            if name == "muon" and any(isinstance(p, DTensor) for p, _ in members):
                for parameter, group in members:
                    if parameter.grad is not None:
                        step_shard(parameter, group, self.state[parameter])
            else:
                part.step()
        return loss


def state_of(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter
) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of what an optimizer keeps of a parameter; None if it is not known here."""
    shape = tuple(parameter.shape)
    if isinstance(optimizer, torch.optim.Muon) or group.get("part") == "muon":
        return {"momentum_buffer": shape}
    if isinstance(optimizer, torch.optim.AdamW | MuonWithAdamW):
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    return None


def step_shard(parameter: DTensor, group: dict[str, Any], state: dict[str, Any]) -> None:
    """`torch.optim.Muon`'s step on a sharded (out, in) matrix with its gradient, with the bits of
    its step on the whole one; changes its ``state`` in place.

    That optimizer itself runs on shards, but its bfloat16 sums over processes round differently,
    and each of its matrix products communicates. Here momentum is kept in shards; the update is
    gathered once, in bfloat16, and made orthogonal by every process, which takes its part."""
    from torch.optim._muon import _zeropower_via_newtonschulz as orthogonalize

    grad: Any = parameter.grad  # a DTensor, which torch's annotations do not say
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(grad)
    mean = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
    update = grad.lerp(mean, group["momentum"]) if group["nesterov"] else mean
    whole = orthogonalize(
        update.bfloat16().full_tensor(), group["ns_coefficients"], group["ns_steps"], group["eps"]
    )
    mesh = parameter.device_mesh
    change = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    # match_rms_adamw (arXiv 2502.16982)
    size = 0.2 * math.sqrt(max(parameter.shape))
    parameter.add_(change.redistribute(placements=parameter.placements), alpha=-group["lr"] * size)
