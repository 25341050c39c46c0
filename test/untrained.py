"""A small policy with random weights, saved as real files: for tests of everything around the network."""

from pathlib import Path

import numpy as np
import torch

from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.policy.backbones import DPMLPBackbone, DPMLPSize
from decoupled_policy_ros.policy.checkpoint import save_backbone, save_task
from decoupled_policy_ros.policy.diffusion import NoiseSchedule
from decoupled_policy_ros.policy.policy import Backbone, Task
from decoupled_policy_ros.policy.schedule import ScheduleConfig
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.fingerprint import Fingerprint

INSTRUCTION = 'wave at nobody'
MAX_AGE_S = 0.2


def save_untrained_policy(folder: Path, robot: str = 'panda_sim') -> Path:
    """Write folder/backbones/tiny and folder/tasks/tiny; returns the task's folder."""
    torch.manual_seed(7)
    fingerprint = Fingerprint.of(load_robot(robot), 20.0)
    denoiser = DPMLPBackbone(DPMLPSize(width=32, hidden=64, blocks=2, time_width=32))
    schedule = NoiseSchedule(ScheduleConfig(prediction='v'))  # never clipped to what is no rotation
    backbone = Backbone(denoiser, fingerprint, schedule, 'tiny')
    corners = np.zeros((2, 10))
    corners[:, :3] = [[0.45, -0.05, 0.02], [0.60, 0.05, 0.15]]  # whatever it predicts, the arm can go there
    backbone.normaliser.fit(corners)
    save_backbone(folder / 'backbones' / 'tiny', backbone)
    cameras = [StreamSpec(name, 'image', (84, 84, 3), MAX_AGE_S) for name in ('agentview', 'wrist')]
    state = StreamSpec('proprioception', 'proprioception', (9,), MAX_AGE_S)
    contract = ObservationContract(20.0, 2, (*cameras, state), 0.1)
    task = Task(contract, backbone, {'crop': 76, 'base_channels': 16, 'keypoints': 8}, 'tiny', INSTRUCTION)
    save_task(folder / 'tasks' / 'tiny', task)
    return folder / 'tasks' / 'tiny'
