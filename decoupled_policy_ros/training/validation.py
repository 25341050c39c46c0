"""Which of the weights of a run are the best: by rollouts in the simulator, or by demonstrations held out."""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from decoupled_policy_ros.observation.contract import ObservationContract
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.training.config import Stage2Config, ValidationConfig

#: Scenes of validation start here, far from the small seeds that evaluations count up from, and from the numbers of
#: LIBERO's fixed starts.
VALIDATION_SCENES = 1_500_000_000
#: At most so many windows of held-out demonstrations are predicted.
WINDOWS = 512

#: Writes the policy as it stands into a folder, complete; the dictionary goes into its provenance.
Write = Callable[[Path, dict[str, object]], object]


class Validator(ABC):
    """Scores weights every so many steps, and keeps the best in a folder of their own.

    Args:
        config: of validation.
        best: folder of the best weights.
        write: writes the weights as they stand.

    Attributes:
        every: steps between two validations.
    """

    def __init__(self, config: ValidationConfig, best: Path, write: Write):
        self.config, self.best, self.write = config, best, write
        self.every = config.every

    @abstractmethod
    def score(self) -> float:
        """How good the weights are as they stand."""

    @abstractmethod
    def is_best(self, score: float, earlier: Sequence[float]) -> bool:
        """Whether no earlier score is better. Of equals the latest is kept: it was trained for longer."""

    def keep(self, step: int, score: float) -> None:
        """Replace the best weights by those that stand."""
        partial = self.best.with_name(f'{self.best.name}.part')
        shutil.rmtree(partial, ignore_errors=True)
        self.write(partial, {'step': step, 'score': score, **self.config.model_dump(exclude_none=True)})
        shutil.rmtree(self.best, ignore_errors=True)
        partial.rename(self.best)

    def prepare(self) -> None:  # noqa: B027 (most need nothing)
        """Find out before any training whether scoring will work."""

    def close(self) -> None:  # noqa: B027 (most have started nothing)
        """End what was started."""


class Rollouts(Validator):
    """Share of successful episodes in the simulator, always from the same scenes and with the same noise.

    Args:
        config: of training.
        validation: its section.
        contract: of the policy's observations.
        out: folder of the run.
        write: writes the weights as they stand.
    """

    def __init__(
        self,
        config: Stage2Config,
        validation: ValidationConfig,
        contract: ObservationContract,
        out: Path,
        write: Write,
    ):
        from decoupled_policy_ros.training.rollout import Arms

        super().__init__(validation, out / 'best', write)
        assert validation.task is not None
        # A backbone without a file of its own lies beside the task's.
        frozen = config.backbone if isinstance(config.backbone, str) else None
        self.task, self.robot, self.backbone = validation.task, config.robot, frozen
        first = VALIDATION_SCENES + validation.seed
        self.seeds = range(first, first + validation.episodes)
        self.contract, self.out, self.arms = contract, out, Arms()

    def prepare(self) -> None:
        """Build the simulated arm.

        Raises:
            SimulationError: there is no such task, or no simulator for it here.
        """
        robot, rate_hz = load_robot(self.robot), self.contract.rate_hz
        self.arms.get(1, self.task, robot, self.contract.picture_sizes, rate_hz)

    def score(self) -> float:
        from decoupled_policy_ros.training.rollout import Evaluation, Rollout

        with tempfile.TemporaryDirectory(prefix='.validation-', dir=self.out) as folder:
            self.write(Path(folder), {})
            spec = Evaluation(folder, self.task, self.backbone, self.robot)
            results = list(Rollout(spec, arms=self.arms).run_all(self.seeds))
        return sum(result.success for result in results) / len(results)

    def is_best(self, score: float, earlier: Sequence[float]) -> bool:
        return score >= max(earlier, default=score)

    def close(self) -> None:
        self.arms.close()


class HeldOut(Validator):
    """Prediction error on demonstrations held out, always of the same windows with the same noise.

    Args:
        validation: section of the configuration.
        out: folder of the run.
        write: writes the weights as they stand.
        windows: of the held-out demonstrations, (N,).
        loss: prediction error of some windows.
        batch_size: windows at a time.
    """

    def __init__(
        self,
        validation: ValidationConfig,
        out: Path,
        write: Write,
        windows: Tensor,
        loss: Callable[[Tensor], Tensor],
        batch_size: int,
    ):
        super().__init__(validation, out / 'best', write)
        self.loss, self.batch_size = loss, batch_size
        evenly = torch.linspace(0, len(windows) - 1, min(WINDOWS, len(windows))).long()
        self.windows = windows[evenly]

    @torch.no_grad()
    def score(self) -> float:
        total = 0.0
        for number, batch in enumerate(self.windows.split(self.batch_size)):
            torch.manual_seed(self.config.seed + number)  # of noise and diffusion steps
            total += float(self.loss(batch)) * len(batch)
        return total / len(self.windows)

    def is_best(self, score: float, earlier: Sequence[float]) -> bool:
        return score <= min(earlier, default=score)
