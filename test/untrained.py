"""Small policies with random weights, saved as real files: for tests of everything around the network."""

from pathlib import Path

import numpy as np
import torch

from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.policy.backbones import DPMLPBackbone, DPMLPSize
from decoupled_policy_ros.policy.checkpoint import load_backbone, save_backbone, save_task
from decoupled_policy_ros.policy.diffusion import NoiseSchedule
from decoupled_policy_ros.policy.language import InstructionEncoder
from decoupled_policy_ros.policy.policy import Backbone, Task
from decoupled_policy_ros.policy.schedule import ScheduleConfig
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.fingerprint import Fingerprint

INSTRUCTION = 'wave at nobody'
MAX_AGE_S = 0.2
STATE = StreamSpec('proprioception', 'proprioception', (9,), MAX_AGE_S)


def camera(name: str, size: int = 84) -> StreamSpec:
    """A square picture."""
    return StreamSpec(name, 'image', (size, size, 3), MAX_AGE_S)


CONTRACT = ObservationContract(20.0, 2, (camera('agentview'), camera('wrist'), STATE), 0.1)


def save_untrained_policy(folder: Path, robot: str = 'panda_sim', seed: int = 7) -> Path:
    """Write folder/backbones/tiny and folder/tasks/tiny; returns the task's folder."""
    torch.manual_seed(seed)
    fingerprint = Fingerprint.of(load_robot(robot), 20.0)
    denoiser = DPMLPBackbone(DPMLPSize(width=32, hidden=64, blocks=2, time_width=32))
    schedule = NoiseSchedule(ScheduleConfig(prediction='v'))  # never clipped to what is no rotation
    backbone = Backbone(denoiser, fingerprint, schedule, 'tiny')
    corners = np.zeros((2, 10))
    corners[:, :3] = [[0.45, -0.05, 0.02], [0.60, 0.05, 0.15]]  # whatever it predicts, the arm can go there
    backbone.normaliser.fit(corners)
    save_backbone(folder / 'backbones' / 'tiny', backbone)
    return _save_task(folder / 'tasks' / 'tiny', backbone, CONTRACT, INSTRUCTION, None)


def save_untrained_task(
    folder: Path,
    backbone: Path,
    contract: ObservationContract = CONTRACT,
    instruction: str = INSTRUCTION,
    language: InstructionEncoder | None = None,
    seed: int = 8,
) -> Path:
    """Write another task of a backbone into a folder; returns the folder."""
    torch.manual_seed(seed)
    return _save_task(folder, load_backbone(backbone), contract, instruction, language)


def _save_task(
    folder: Path,
    backbone: Backbone,
    contract: ObservationContract,
    instruction: str,
    language: InstructionEncoder | None,
) -> Path:
    crop = (
        {'crop': round(contract.streams[0].shape[0] * 76 / 84)} if len(contract.streams[0].shape) == 3 else {}
    )
    encoder = {**crop, 'base_channels': 16, 'keypoints': 8}
    task = Task(contract, backbone, encoder, folder.name, instruction, language=language)
    save_task(folder, task)
    return folder
