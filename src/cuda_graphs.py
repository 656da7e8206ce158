"""A network's forward and backward pass recorded once on a GPU and replayed: a small network is otherwise bound by its launches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .console import say


def replayed(network: nn.Module, log_mel: Tensor) -> bool:
    """Lets `network`, in training mode, replay CUDA graphs of both passes over inputs of `log_mel`'s shape
    (torch.cuda.make_graphed_callables); in evaluation it works as before. Weights and running means stay as they are.

    False, and nothing changed, where the network cannot be recorded.
    """
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # recording works in a stream of its own; training does not
    try:
        torch.cuda.make_graphed_callables(network, (log_mel,))
    except RuntimeError as error:
        torch.cuda.set_stream(torch.cuda.default_stream())  # a capture that fails at its end leaves its own stream current
        say(f"its steps cannot be recorded as CUDA graphs ({str(error).splitlines()[0]}); they are launched one by one (--no-cuda-graphs does not try)")
        return False
    finally:
        network.zero_grad(set_to_none=True)
        with torch.no_grad():  # recording has run the network a few times: batch norm's running means have moved
            for name, tensor in network.state_dict().items():
                tensor.copy_(before[name])
    return True
