"""Policies whose weights say what they predict, saved as real files: the same waypoints whatever they see.

The network is a real DP-MLP that predicts the sample: its embeddings tell the waypoints apart, its blocks add nothing,
and its head is solved for what each waypoint is to be. So a fault of the network is a fault of a file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from untrained import CONTRACT

from decoupled_policy_ros.policy.backbones import DPMLPBackbone, DPMLPSize
from decoupled_policy_ros.policy.checkpoint import save_backbone, save_task
from decoupled_policy_ros.policy.diffusion import NoiseSchedule
from decoupled_policy_ros.policy.policy import Backbone, Task
from decoupled_policy_ros.policy.schedule import ScheduleConfig
from decoupled_policy_ros.robot import poses
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.robot.kinematics import Kinematics

ROBOT = load_robot('panda_sim')
HOME = Kinematics(ROBOT).forward(ROBOT.home_rad)
HORIZON, CYCLE = 16, 8
INSTRUCTION = 'go round and round'
SMALL = DPMLPSize(width=32, hidden=64, blocks=2, time_width=32)
#: As the shipped backbone, for benches.
FULL = DPMLPSize()


def circle(radius_m: float = 0.01, centre_m: tuple[float, float, float] | None = None) -> NDArray[np.float64]:
    """Actions (16, 10) round a circle in the base frame's x and y, once in 8 waypoints: each chunk goes on the last."""
    centre = HOME[:3, 3] if centre_m is None else np.asarray(centre_m)
    angle = 2 * np.pi * np.arange(HORIZON) / CYCLE
    way = np.tile(HOME, (HORIZON, 1, 1))
    way[:, :3, 3] = centre + radius_m * np.stack([np.cos(angle), np.sin(angle), np.zeros(HORIZON)], -1)
    return poses.action_from_pose(way, -np.ones(HORIZON))


def stay(pose_base_ee: NDArray[np.float64]) -> NDArray[np.float64]:
    """Actions (16, 10) at one pose."""
    return poses.action_from_pose(np.tile(pose_base_ee, (HORIZON, 1, 1)), -np.ones(HORIZON))


def save_told_policy(
    folder: Path,
    actions: NDArray[np.float64],
    name: str = 'told',
    *,
    size: DPMLPSize = SMALL,
    training_steps: int = 100,
    not_finite: bool = False,
    instruction: str = INSTRUCTION,
) -> Path:
    """Write folder/backbones/NAME and folder/tasks/NAME; returns the task's folder.

    Args:
        folder: of models.
        actions: (16, 10), predicted for every observation.
        name: of both.
        size, training_steps: of the network and its schedule; many steps are slow.
        not_finite: overflow on every observation that is not all zeros, as the one of the warm-up is.
        instruction: of the task.
    """
    torch.manual_seed(7)
    schedule = NoiseSchedule(ScheduleConfig(training_steps=training_steps, prediction='sample'))
    backbone = Backbone(DPMLPBackbone(size), Fingerprint.of(ROBOT, 20.0), schedule, name)
    backbone.normaliser.fit(actions)
    _tell(backbone, torch.from_numpy(actions).float())
    save_backbone(folder / 'backbones' / name, backbone)
    task = Task(CONTRACT, backbone, {'crop': 76, 'base_channels': 16, 'keypoints': 8}, name, instruction)
    if not_finite:
        _overflow(task)
    save_task(folder / 'tasks' / name, task)
    return folder / 'tasks' / name


@torch.no_grad()
def _tell(backbone: Backbone, actions: torch.Tensor) -> None:
    """Solve the head for the actions (16, 10), with blocks that pass on the position's own embedding."""
    denoiser = backbone.denoiser
    denoiser.embed_weight.zero_()
    denoiser.embed_bias.copy_(torch.eye(*denoiser.embed_bias.shape))
    for block in denoiser.blocks:
        block.contract.weight.zero_()
        block.contract.bias.zero_()
    x = denoiser.embed_bias
    for block in denoiser.blocks:
        x = block.norm(x)
    features = torch.cat([denoiser.norm(x), torch.ones(len(x), 1)], 1)
    solved = torch.linalg.lstsq(features, backbone.normaliser(actions), driver='gelsd').solution
    denoiser.head.weight.copy_(solved[:-1].T)
    denoiser.head.bias.copy_(solved[-1])


@torch.no_grad()
def _overflow(task: Task) -> None:
    """Scale the state, which is zero only in the warm-up, so that the modulation goes beyond what float32 holds."""
    (scale,) = (value for name, value in task.named_buffers() if name.endswith('scale'))
    scale.fill_(3e38)
    for weight in task.conditioning.parameters():
        weight *= 1e3
