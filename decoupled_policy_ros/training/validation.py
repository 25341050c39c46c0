"""Which of the weights of a run are the best: by rollouts in the simulator, or by demonstrations held out."""

from __future__ import annotations

import math
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from decoupled_policy_ros.training.config import Stage2Config, ValidationConfig

if TYPE_CHECKING:
    from decoupled_policy_ros.training.rollout import Rollout

#: Scenes of validation start here, far from the small seeds that evaluations count up from, and from the numbers of
#: LIBERO's fixed starts.
VALIDATION_SCENES = 1_500_000_000
#: A policy that is scored lies in a folder of this name for so long.
SCRATCH = '.validation-'
DENOISING_STEPS = 10
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
        if self.best.exists():
            self.best.rename(self._before)
        partial.rename(self.best)
        shutil.rmtree(self._before, ignore_errors=True)

    @property
    def _before(self) -> Path:
        """Where the best weights are for the moment in which better ones get their name."""
        return self.best.with_name(f'{self.best.name}.before')

    def prepare(self) -> None:
        """Put in order what a killed run left, and find out before any training whether scoring will work."""
        if self._before.exists() and not self.best.exists():
            self._before.rename(self.best)
        shutil.rmtree(self._before, ignore_errors=True)

    def close(self) -> None:  # noqa: B027 (most have started nothing)
        """End what was started."""


class Rollouts(Validator):
    """Share of successful episodes in the simulator, of all tasks, always from the same scenes and with the same noise.

    Args:
        config: of training.
        validation: its section.
        training_steps: of the objective; at most so many are taken to denoise.
        out: folder of the run.
        write: writes the weights as they stand.
    """

    def __init__(
        self,
        config: Stage2Config,
        validation: ValidationConfig,
        training_steps: int,
        out: Path,
        write: Write,
    ):
        from decoupled_policy_ros.sim.benchmarks import expanded
        from decoupled_policy_ros.training.rollout import Arms

        super().__init__(validation, out / 'best', write)
        assert validation.task is not None
        # A backbone without a file of its own lies beside the task's.
        frozen = config.backbone if isinstance(config.backbone, str) else None
        self.tasks, self.robot, self.backbone = expanded(validation.task), config.robot, frozen
        first = VALIDATION_SCENES + validation.seed
        self.seeds = range(first, first + validation.episodes)
        self.denoising_steps = min(DENOISING_STEPS, training_steps)
        self.out, self.arms = out, Arms()

    def prepare(self) -> None:
        """Besides, put the untrained policy before a simulated arm.

        Raises:
            ConfigError, SimulationError: there is no such task, no simulator for it here, or the policy does not fit.
        """
        super().prepare()
        for left in self.out.glob(f'{SCRATCH}*'):
            shutil.rmtree(left, ignore_errors=True)
        with self._rollouts() as rollouts:
            for _ in rollouts:
                pass

    def score(self) -> float:
        with self._rollouts() as rollouts:
            results = [result for rollout in rollouts for result in rollout.run_all(self.seeds)]
        return sum(result.success for result in results) / len(results)

    @contextmanager
    def _rollouts(self) -> Iterator[Iterator[Rollout]]:
        """The weights as they stand, with a simulated arm in one task after the other."""
        from decoupled_policy_ros.training.rollout import Evaluation, Rollout

        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=self.out) as folder:
            self.write(Path(folder), {})
            given = self.backbone, self.robot, self.denoising_steps
            specs = [Evaluation(folder, task, *given) for task in self.tasks]
            yield (Rollout(spec, arms=self.arms) for spec in specs)

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
        finite = [other for other in earlier if math.isfinite(other)]
        return math.isfinite(score) and score <= min(finite, default=score)
