"""What a training run leaves beside its weights: run.json and loss.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import BaseModel

from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.training.loop import Trainer


def smoothed(losses: Sequence[float]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Steps, and the mean of the losses up to each of them, over a hundredth of all."""
    window = max(1, len(losses) // 100)
    means = np.convolve(losses, np.ones(window) / window, 'valid')
    return np.arange(len(means)) + window - 1, means


def write_report(out: Path, stage: str, config: BaseModel, trainer: Trainer, result: dict) -> None:
    """Write `out`/run.json (configuration, result, losses) and `out`/loss.png."""
    run = {
        'stage': stage,
        'config': config.model_dump(mode='json'),
        **result,
        'seconds': round(trainer.seconds, 1),
        'computed_in': trainer.computed_in,
        'trained_parameters': sum(p.numel() for p in trainer.parameters),
        'scores': [{'step': step, 'score': score} for step, score in trainer.scores],
        'losses': [float(f'{loss:.6g}') for loss in trainer.losses],
    }
    write_json(out / 'run.json', run, indent=None)
    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.subplots()
    axes.semilogy(trainer.losses, color='0.8', linewidth=0.5)
    axes.semilogy(*smoothed(trainer.losses))
    axes.set(xlabel='step', ylabel='prediction error', title=f'{out.name}: {stage}')
    figure.savefig(out / 'loss.png', dpi=120)
