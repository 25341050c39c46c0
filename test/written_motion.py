"""Motion that is known exactly, and datasets and recordings of it, for tests of what training reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from decoupled_policy_ros.data.datasets.dataset import DatasetSpec, DatasetWriter
from decoupled_policy_ros.data.motions.motions import Motion, motion_actions
from decoupled_policy_ros.observation.proprioception import Proprioception
from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.robot.kinematics import Kinematics


def near_home(robot: RobotDescription, reach_rad: float) -> Motion:
    """Two seconds in which the first joint swings about home and the gripper opens and closes."""
    time_s = np.arange(40) / 20
    joints = np.tile(np.append(robot.home_rad, 0.0), (len(time_s), 1))
    joints[:, 0] += reach_rad * np.sin(3 * time_s)
    joints[:, -1] = np.sin(4 * time_s)
    actions = motion_actions(Kinematics(robot), joints)
    fingerprint = Fingerprint.of(robot, 20.0)
    return Motion((time_s * 1e9).astype(np.int64), joints.astype('f'), actions.astype('f'), fingerprint)


def write_demonstrations(root: Path, robot: RobotDescription, motions: list[Motion]) -> Path:
    """A dataset in which the arm was commanded where it went."""
    proprioception = Proprioception(robot, Kinematics(robot))
    with DatasetWriter(root, DatasetSpec.of(robot, 20.0)) as writer:
        for motion in motions:
            width_m = robot.gripper.width_from_normalised(motion.joint_positions[:, -1].astype(float))
            joints = np.column_stack(
                [motion.joint_positions[:, :-1], robot.gripper.joint_positions(width_m)]
            ).astype(float)
            rows = {
                'observation.joint_positions': joints,
                'observation.proprioception': proprioception.many(joints),
                'observation.pose': motion.actions,
                'action': motion.actions,
            }
            writer.add_episode('swing', True, rows)
    return root
