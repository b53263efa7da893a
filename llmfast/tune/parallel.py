"""Several processes as one run: under `torchrun` or `accelerate launch`, on one machine or many.

Each process computes its share of every batch. With ddp each has the whole model, and gradients are averaged while the
backward pass goes on; with fsdp each keeps a part of every weight, gradient and optimizer state, and gathers a block of
layers when it computes.
Sources: Li et al. 2020, https://arxiv.org/abs/2006.15704; Zhao et al. 2023, https://arxiv.org/abs/2304.11277
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast.errors import OptionError, UnsupportedError

if TYPE_CHECKING:
    import torch


class Parallel:
    """This process's place among all.

    Args:
        device: cpu or cuda; None takes a GPU if there is one.
        mode: ddp or fsdp.

    Attributes:
        device: where this process computes.
    """

    def __init__(self, device: str | None, mode: str) -> None:
        import torch

        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self._mode = mode
        has_gpu = torch.cuda.is_available()
        if device == "cuda" and not has_gpu:
            raise UnsupportedError(
                "--device cuda: PyTorch sees no GPU", "use --device cpu, or install PyTorch for CUDA"
            )
        if device == "cuda" or (device is None and has_gpu):
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
        if mode == "fsdp" and self.world == 1:
            raise OptionError(
                "--parallel fsdp needs several processes", "torchrun --nproc-per-node N -m llmfast tune ..."
            )

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Connect the processes while the body runs; all but the first are silent, their errors aside."""
        import torch.distributed as dist

        if self.world == 1:
            yield
            return
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(sys.stderr if self.is_main else nowhere):
                yield
        finally:
            dist.destroy_process_group()

    def wrap(self, model: "torch.nn.Module") -> "torch.nn.Module":
        """Return what the forward pass is called on; with fsdp the model itself is changed."""
        import torch

        if self.world == 1:
            return model
        if self._mode == "ddp":
            ids = [self.device.index] if self.device.type == "cuda" else None
            return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        for blocks in [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]:
            for block in blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def unwrap(self, model: Any) -> Any:
        """Return a model whose weights are whole again, in the first process; the others keep theirs."""
        if self.world == 1 or self._mode == "ddp":
            return model
        import torch
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        from torch.distributed.fsdp import FSDPModule

        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not self.is_main:
            return model
        kind = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
        with torch.device("meta"):
            plain = kind(model.config)
        plain.load_state_dict(weights, strict=False, assign=True)
        plain.tie_weights()
        return plain

    def share(self, rows: Sequence[Any], passes: int) -> list[tuple[list[Any], bool]]:
        """Return this process's part of a batch in some passes, all processes as many.

        Returns:
            Rows, and whether they count: a process without a row of its own computes one for company.
        """
        own = list(rows[self.rank :: self.world])
        passes = min(passes, -(-len(rows) // self.world))
        parts = [[own[index] for index in part] for part in np.array_split(np.arange(len(own)), passes)]
        return [(part, True) if part else (list(rows[:1]), False) for part in parts]

    def passing(self, model: "torch.nn.Module", is_last: bool) -> Any:
        """Return the context of one pass: gradients are exchanged in the last one only."""
        if self.world == 1:
            return contextlib.nullcontext()
        if self._mode == "ddp":
            return contextlib.nullcontext() if is_last else model.no_sync()
        model.set_requires_gradient_sync(is_last)
        return contextlib.nullcontext()

    def sum(self, *values: float) -> list[float]:
        """Return numbers added up over all processes."""
        if self.world == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, in the order of their ranks."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Wait for the others."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()


def read_state(model: "torch.nn.Module", optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return trained weights and optimizer state by parameter names, whole; empty in all processes but the first."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    return weights, state


def write_state(model: "torch.nn.Module", optimizer: Any, weights: dict[str, Any], state: dict[str, Any]) -> None:
    """Take over what `read_state` returned, given to every process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)


def read_weights(model: "torch.nn.Module") -> dict[str, Any]:
    """Return the trained weights, whole and copied; empty in all processes but the first."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return {name: value.clone() for name, value in get_model_state_dict(model, options=options).items()}
