"""One control period of a robosuite environment, as `env.step` computes it, in half of its time.

robosuite computes all of the physics three times in each of the 25 physics steps of a period (before its
controller, within it, and in MuJoCo's step), the Jacobian of the hand four times, a reward that nobody asks for,
and looks names up throughout. MuJoCo's own two halves of a step leave room for a controller between them, which
robosuite itself uses since 1.5. Both ways solve the same equations; only the contact solver starts from another
guess. For the Panda the states are equal to round-off (test/test_stepping.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class ControlPeriod:
    """Advances an environment of one arm with an operational-space controller by one command at a time.

    It holds on to the environment's model and data, so the environment must reset without building them anew
    (`hard_reset=False`). Rewards, observations and the arm's buffers of recent values are not kept up.

    Args:
        env: robosuite's environment; its own physics must be that of `MujocoEnv.step`.
    """

    def __init__(self, env: Any):
        import mujoco  # not sooner: what it can draw with is chosen by its first import

        self._mujoco = mujoco
        self._arm = arm = env.robots[0]
        self._model, self._data = env.sim.model._model, env.sim.data._data
        self._physics_steps = int(env.control_timestep / env.model_timestep)
        self._lowest_torques, self._highest_torques = arm.torque_limits
        self._arm_actuators = np.array(arm._ref_joint_actuator_indexes)
        self._grip_actuators = np.array(
            [env.sim.model.actuator_name2id(name) for name in arm.gripper.actuators], int
        )
        low, high = self._model.actuator_ctrlrange[self._grip_actuators].T
        self._grip_centre, self._grip_reach = 0.5 * (high + low), 0.5 * (high - low)
        self._jacobian_position = np.zeros((3, self._model.nv))
        self._jacobian_rotation = np.zeros((3, self._model.nv))
        self._mass = np.zeros((self._model.nv, self._model.nv))

    def __call__(self, action: Array) -> None:
        """Advance by one period; the action is the controller's (6,), then the gripper's (n,)."""
        controller = self._arm.controller
        arm_action, grip_action = action[: controller.control_dim], action[controller.control_dim :]
        for step in range(self._physics_steps):
            self._mujoco.mj_step1(self._model, self._data)
            self._measure(controller)
            if step == 0:
                controller.set_goal(arm_action)
            torques = np.maximum(controller.run_controller(), self._lowest_torques)
            self._data.ctrl[self._arm_actuators] = np.minimum(torques, self._highest_torques)
            fingers = self._arm.gripper.format_action(grip_action)
            self._data.ctrl[self._grip_actuators] = self._grip_centre + self._grip_reach * fingers
            self._mujoco.mj_step2(self._model, self._data)

    def _measure(self, controller: Any) -> None:
        """Give the controller the arm's state, which it then does not compute itself."""
        data, site, dofs = self._data, self._arm.eef_site_id, controller.qvel_index
        self._mujoco.mj_jacSite(self._model, data, self._jacobian_position, self._jacobian_rotation, site)
        self._mujoco.mj_fullM(self._model, self._mass, data.qM)
        controller.ee_pos = data.site_xpos[site].copy()
        controller.ee_ori_mat = data.site_xmat[site].reshape(3, 3).copy()
        controller.ee_pos_vel = np.dot(self._jacobian_position, data.qvel)
        controller.ee_ori_vel = np.dot(self._jacobian_rotation, data.qvel)
        controller.joint_pos = data.qpos[controller.qpos_index]
        controller.joint_vel = data.qvel[dofs]
        controller.J_pos = self._jacobian_position[:, dofs]
        controller.J_ori = self._jacobian_rotation[:, dofs]
        controller.J_full = np.vstack([controller.J_pos, controller.J_ori])
        controller.mass_matrix = self._mass[dofs, :][:, dofs]
        controller.new_update = False
