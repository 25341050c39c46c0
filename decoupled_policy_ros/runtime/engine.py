"""Fast inference: observation -> features -> modulation of all steps -> denoising -> chunk."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from decoupled_policy_ros.errors import ConfigError, InferenceError
from decoupled_policy_ros.policy.backbones import DPMLPBackbone
from decoupled_policy_ros.policy.device import usable_device
from decoupled_policy_ros.policy.packed import packs_on, usable_precision
from decoupled_policy_ros.policy.policy import Policy
from decoupled_policy_ros.policy.sampling import Generators, Known, Sampler
from decoupled_policy_ros.runtime.features import FrameFeatures, Frames
from decoupled_policy_ros.runtime.fused import FusedNetwork, Network, PlainNetwork
from decoupled_policy_ros.runtime.graphs import GraphNetwork
from decoupled_policy_ros.runtime.prefix import Prefix


@dataclass(frozen=True)
class Prediction:
    """Chunks as the network gives them, samples of one observation.

    Attributes:
        samples: (K, horizon, 10) float64, in metres, 6-D rotation not yet orthonormalised.
        timings_ms: encode, modulate, denoise, total.
    """

    samples: NDArray[np.float64]
    timings_ms: dict[str, float]

    @property
    def actions(self) -> NDArray[np.float64]:
        """The first of them, (horizon, 10)."""
        return self.samples[0]


def noise_seed(seed: int, stamp_ns: int) -> int:
    """Seed of the noise of one cycle, from that of all cycles and the stamp of its observation.

    So a chunk can be computed again from seed, observation and prefix alone, whatever came before it.
    """
    return int(np.random.SeedSequence([seed, stamp_ns]).generate_state(1, np.uint64)[0] >> 1)


class Engine:
    """Runs a policy cycle with everything constant computed beforehand.

    Where the backbone is modulated, the timestep half of the modulation is one table per policy and the
    observation half one matrix-vector product per cycle (see `SplitConditioning`). Where it is given tokens, they
    are computed for all steps at once (see `TokenConditioning`). The denoising loop runs through the backbone alone,
    DP-MLP and DP-Mixer in a form made for it (see `FusedNetwork`), on a GPU any in one call a step (see
    `GraphNetwork`). Pictures are encoded once, ahead where there is time.

    `Policy.predict_naive` is the reference. In float32 chunks equal its within 1e-4 of the normalised range.

    Args:
        policy: a matching backbone, task and robot.
        steps: denoising steps.
        seed: of the noise from which each chunk is denoised.
        device: 'cpu', 'cuda', ...
        sampler: one of the backbone's schedule; DDIM for diffusion and Euler for flow matching by default.
        instruction: what to do; by default the only one that the policy has.
        shared_noise: all waypoints of a chunk are denoised from the same noise, see `Sampler`.
        precision: 'float32', or 'bfloat16' for the large products and convolutions on a CPU.

    Attributes:
        instruction: the one that is followed.
        precision: as given.

    Raises:
        ConfigError: no such device or precision here, a sampler or number of steps that the schedule does not have,
            shared noise for a backbone that mixes time, or see `instruct`.
    """

    def __init__(
        self,
        policy: Policy,
        steps: int = 10,
        seed: int = 0,
        device: str = 'cpu',
        sampler: str | None = None,
        instruction: str | None = None,
        precision: str = 'float32',
        shared_noise: bool = False,
    ):
        self.policy, self.precision = policy, precision
        self.device = usable_device(device)
        if self.device.type == 'cuda':
            torch.backends.cudnn.allow_tf32 = False  # convolutions in float32, of the whole process
        self.backbone = policy.backbone.to(self.device)
        self.task = policy.task.to(self.device)
        denoiser = self.backbone.denoiser
        if shared_noise and denoiser.mixes_time:
            raise ConfigError(
                f'shared_noise is for a backbone that does not mix time, dp_mlp; {denoiser.kind} was trained on '
                'noise that differs from waypoint to waypoint'
            )
        self.sampler = Sampler(self.backbone.schedule, steps, sampler, shared_noise)
        dtype = usable_precision(precision, self.device)
        with torch.inference_mode():
            tau = self.backbone.denoiser.tau(torch.tensor(self.sampler.ks, device=self.device))
            self.modulate = self.task.conditioning.over_steps(tau, dtype if packs_on(self.device) else None)
            self.network = self._network(dtype)
            self.features = FrameFeatures(self.task, self.device, dtype)
        self.generator = torch.Generator().manual_seed(seed)
        self.instruct(instruction)

    def _network(self, dtype: torch.dtype) -> Network:
        denoiser = self.backbone.denoiser
        if isinstance(denoiser, DPMLPBackbone) and packs_on(self.device):
            return FusedNetwork(denoiser, len(self.sampler.ks), dtype)
        return GraphNetwork(denoiser) if self.device.type == 'cuda' else PlainNetwork(denoiser)

    def instruct(self, instruction: str | None) -> None:
        """Follow another instruction from the next cycle on; it is embedded here, once.

        Raises:
            ConfigError: it is none that this policy understands; see `Task.understood` and `Task.spoken`.
        """
        self._spoken = self.task.spoken(instruction)
        self.instruction = self.task.understood(instruction)

    def reset(self, seed: int, stamp_ns: int | None = None) -> None:
        """Start the noise sequence of a seed again, or that of the cycle whose observation has a stamp."""
        self.generator.manual_seed(seed if stamp_ns is None else noise_seed(seed, stamp_ns))

    def warm_up(self, cycles: int = 3, samples: int = 1) -> None:
        """Run cycles of so many samples on zeros, so that the first real one is as fast; keeps the noise sequence."""
        contract, state = self.policy.contract, self.generator.get_state()
        zeros = {
            s.name: np.zeros((contract.n_obs_steps, *s.shape), np.uint8 if s.kind == 'image' else np.float32)
            for s in contract.streams
        }
        for _ in range(cycles):
            self(zeros, samples=samples)
        self.generator.set_state(state)

    @torch.inference_mode()
    def ahead(self, frames: Mapping[str, NDArray]) -> bool:
        """Encode one picture that may be part of a coming observation; False if none of these frames is a new one.

        Args:
            frames: of some streams, the array that `Observation.frames` will hold.
        """
        return self.features.ahead(frames)

    def __call__(self, observation: Frames, known: Prefix | None = None, samples: int = 1) -> Prediction:
        """One cycle on the n_obs_steps frames of each stream.

        Args:
            observation: what was seen.
            known: waypoints that the chunk shall agree with.
            samples: so many chunks are drawn, in one pass of the network.

        Raises:
            InferenceError: a chunk is not finite.
        """
        chunks, timings_ms = self._cycle([observation], self.generator, [known], samples)
        return Prediction(chunks[0], timings_ms)

    def many(
        self,
        observations: Sequence[Frames],
        generators: Sequence[torch.Generator],
        known: Sequence[Prefix | None] | None = None,
        samples: int = 1,
    ) -> NDArray[np.float64]:
        """Samples (B, K, horizon, 10) of B observations in one pass of the network, as `Prediction.samples`.

        Args:
            observations: B of them, as for a single cycle.
            generators: on the CPU, of each one's noise, so that a chunk does not depend on its neighbours.
            known: for each of them, waypoints that its chunks shall agree with.
            samples: K, chunks of each observation.

        Raises:
            InferenceError: a chunk is not finite.
        """
        each = [generator for generator in generators for _ in range(samples)]
        return self._cycle(observations, each, known or [None] * len(observations), samples)[0]

    @torch.inference_mode()
    def _cycle(
        self,
        observations: Sequence[Frames],
        generators: Generators,
        known: Sequence[Prefix | None],
        samples: int,
    ) -> tuple[NDArray[np.float64], dict[str, float]]:
        """Samples (B, K, horizon, 10) and what their parts took."""
        start = self._now_s()
        count = len(observations)
        features = self.features(observations, self._spoken)
        encoded = self._now_s()
        modulation = self.modulate(features)
        modulated = self._now_s()
        horizon = self.backbone.denoiser.horizon
        noise = self.sampler.noise((count * samples, horizon, 10), generators).to(self.device)
        normalised = self.sampler.run(
            self.network.begin(modulation), noise, generators, self._known(known, samples)
        )
        actions = self.backbone.normaliser.inverse(normalised).double().cpu().numpy()
        end = self._now_s()
        if not np.isfinite(actions).all():
            raise InferenceError(
                f'the chunk has {np.count_nonzero(~np.isfinite(actions))} values that are not finite'
            )
        timings_ms = {
            'encode': 1e3 * (encoded - start),
            'modulate': 1e3 * (modulated - encoded),
            'denoise': 1e3 * (end - modulated),
            'total': 1e3 * (end - start),
        }
        return actions.reshape(count, samples, horizon, 10), timings_ms

    def _known(self, prefixes: Sequence[Prefix | None], samples: int) -> Known | None:
        """Prefixes of B observations as the sampler takes them, for each of their samples."""
        if all(prefix is None for prefix in prefixes):
            return None
        horizon = self.backbone.denoiser.horizon
        actions, weight = np.zeros((len(prefixes), horizon, 10)), np.zeros((len(prefixes), horizon))
        for i, prefix in enumerate(prefixes):
            if prefix is not None:
                actions[i], weight[i] = prefix.actions, prefix.weight
        normalised, weights = (
            torch.from_numpy(array).float().to(self.device).repeat_interleave(samples, 0)
            for array in (actions, weight)
        )
        return Known(self.backbone.normaliser(normalised), weights)

    def _now_s(self) -> float:
        """Monotonic time once all that this thread asked of the device is done: a GPU's calls return before their work.

        Not the whole device: it must not be waited for while another thread records a graph.
        """
        if self.device.type == 'cuda':
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()
