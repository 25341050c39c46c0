"""The processes of a training run, by accelerate: one after a plain command, several under a launcher.

On GPUs that is `accelerate launch --num_processes N -m decoupled_policy_ros.cli train ...`. On CPUs it is `torchrun
--standalone --nproc_per_node N -m decoupled_policy_ros.cli train ...`: accelerate's own launcher starts a single
process there, whatever number it is given, unless it is told to use MPI.
"""

from __future__ import annotations

import importlib.util
import os
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import get_int_from_env

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.training.config import Optimisation

#: Where launchers say how many processes there are: torchrun and accelerate, MPI's.
WORLD_SIZES = ('WORLD_SIZE', 'PMI_SIZE', 'OMPI_COMM_WORLD_SIZE', 'MV2_COMM_WORLD_SIZE')
PROJECT = 'decoupled_policy'
#: How long the others wait for the first process while it validates.
PATIENCE = timedelta(hours=12)


def require_trackers(config: Optimisation) -> None:
    """Raise ConfigError where a tracker's package is missing: accelerate would go on without a word."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f'optimisation.trackers names {name!r}, but the Python package {name!r} is not installed; '
                f"'pip install {name}' brings it"
            )


def device_of_process(device: str) -> str:
    """The GPU of this process where several train together, each on one of its own; `device` otherwise."""
    local = os.environ.get('LOCAL_RANK')
    return f'cuda:{local}' if local is not None and device == 'cuda' else device


def accelerator_for(config: Optimisation, folder: Path) -> Accelerator:
    """What the trainer talks to the other processes and to the trackers through.

    Precision stays with the trainer: accelerate keeps its own for all runs of a process, and ours is a setting of
    each run.
    """
    # Alone nothing is placed or sent anywhere, and accelerate holds all runs of a process to one answer.
    together = get_int_from_env(WORLD_SIZES, 1) > 1
    return Accelerator(
        cpu=together and config.device.startswith('cpu'),
        device_placement=False,
        mixed_precision='no',
        log_with=list(config.trackers) or None,
        project_dir=str(folder),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def start_trackers(accelerator: Accelerator, identity: dict[str, str], folder: Path) -> None:
    """Write a run's settings to its trackers. What they write lies in `folder`; nothing is sent anywhere."""
    if accelerator.log_with:
        offline = {'dir': str(folder), 'mode': 'offline', 'name': folder.name}
        accelerator.init_trackers(PROJECT, config=dict(identity), init_kwargs={'wandb': offline})


def finish_trackers(accelerator: Accelerator) -> None:
    """Close their files. The process group stays, for a next run of the same processes."""
    for tracker in accelerator.trackers:
        tracker.finish()
