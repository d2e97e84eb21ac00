"""Initial weights, drawn for each tensor from (seed, its name).

So they do not depend on the number of processes, can be drawn after building on the meta device,
and two variants with one seed share all tensors that both have, which gives pairing a meaning.
"""

import hashlib
from itertools import chain

import torch
from torch import Tensor, nn


@torch.no_grad()
def initialize(model: nn.Module, seed: int, std: float) -> None:
    """Fills all parameters and buffers of ``model`` in place.

    A module may define ``initial_value(name, shape, generator) -> Tensor`` for its own tensors
    (norms are ones, an encoding may have coefficients); all others are normal with standard
    deviation ``std``, times the module's own ``std``, in its columns ``drawn``, if it has these.
    """
    # Tied embeddings come once, under the name they are registered under first.
    for full_name, tensor in chain(model.named_parameters(), model.named_buffers()):
        module_name, _, name = full_name.rpartition(".")
        module = model.get_submodule(module_name)
        digest = hashlib.sha256(f"{seed}/{module_name}.{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        if (draw := getattr(module, "initial_value", None)) is not None:
            value = draw(name, tensor.shape, generator)
        else:
            value = torch.zeros(tensor.shape)
            columns = getattr(module, "drawn", None) or list(range(value.shape[-1]))
            own = torch.Size((*value.shape[:-1], len(columns)))
            value[..., columns] = normal(own, std * getattr(module, "std", 1.0), generator)
        tensor.copy_(as_sharded(tensor, value))


def normal(shape: torch.Size, std: float, generator: torch.Generator) -> Tensor:
    """Float32 on the CPU, so that every device gets the same values."""
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


def as_sharded(tensor: Tensor, value: Tensor) -> Tensor:
    """``value`` cut as ``tensor`` is; every process has all of it, so nothing is sent."""
    if not hasattr(tensor, "device_mesh"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor  # slow to import

    assert isinstance(tensor, DTensor)
    value = value.to(tensor.device)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
