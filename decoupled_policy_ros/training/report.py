"""What a training run leaves beside its weights: run.json and loss.png."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pydantic import BaseModel

from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.training.loop import Trainer


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
    losses = np.array(trainer.losses)
    window = max(1, len(losses) // 100)
    smooth = np.convolve(losses, np.ones(window) / window, 'valid')
    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.subplots()
    axes.semilogy(losses, color='0.8', linewidth=0.5)
    axes.semilogy(np.arange(len(smooth)) + window - 1, smooth)
    axes.set(xlabel='step', ylabel='prediction error', title=f'{out.name}: {stage}')
    figure.savefig(out / 'loss.png', dpi=120)
