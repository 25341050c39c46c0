"""Parts of a policy on a GPU: their kernels are recorded once and started as one.

A step of DP-MLP or DP-Mixer is some dozens of kernels of a few microseconds each, an encoder's as many; Python starts
them slower than the GPU runs them. A graph starts them with one call; they are the same kernels on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from decoupled_policy_ros.policy.backbones import Denoiser
from decoupled_policy_ros.runtime.fused import PlainNetwork, Step

#: Calls before the recording, in which libraries choose their kernels and take their memory.
WARM_UP = 3


class Recorded:
    """A function of tensors on a GPU, as a graph; to be called with tensors of the same shapes and types.

    Args:
        function: without random numbers, and without asking a tensor for its values.
        examples: what it is recorded with.
    """

    def __init__(self, function: Callable[..., Tensor], *examples: Tensor):
        self._inputs = [example.clone() for example in examples]
        device = self._inputs[0].device
        current, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                function(*self._inputs)
        current.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Of this thread alone: a task is loaded, and recorded, beside cycles of the one that is followed.
        with torch.cuda.graph(self._graph, stream=aside, capture_error_mode='thread_local'):
            self._output = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output.clone()  # the next call writes over this one, and results are kept


class GraphNetwork:
    """Any backbone on a GPU.

    A graph is of one number of chunks, and holds memory of its own. So only those of a single observation, which is
    what a cycle has, are recorded, each at its first step: `Engine.warm_up` comes before the first cycle. What
    evaluates many observations at once runs the plain network.
    """

    def __init__(self, denoiser: Denoiser):
        self._plain = PlainNetwork(denoiser)
        self._recorded: dict[torch.Size, Recorded] = {}

    def begin(self, modulation: Tensor) -> Step:
        """See `Network`."""
        if modulation.shape[1] != 1:
            return self._plain.begin(modulation)

        def step(i: int, x: Tensor) -> Tensor:
            inputs = modulation[i : i + 1], x
            if x.shape not in self._recorded:
                self._recorded[x.shape] = Recorded(lambda m, x: self._plain.begin(m)(0, x), *inputs)
            return self._recorded[x.shape](*inputs)

        return step
