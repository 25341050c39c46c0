"""What there is to do in the simulator: scenes, instructions, and when an attempt counts as done.

Several tasks can share a scene, told apart by the instruction alone: `stack`, `stack_green`, `lift_red` and
`lift_green` look the same until the arm acts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from decoupled_policy_ros.errors import SimulationError

if TYPE_CHECKING:
    from decoupled_policy_ros.sim.environment import SimRobot

#: Of the experts, and of the benchmarks that measure an attempt in steps.
RATE_HZ = 20.0
#: Heights of a cube's centre above the table at which it counts as lifted; robosuite's own margin.
LIFTED_M = 0.04
#: How near the end effector has to come to the goal of `detour`.
GOAL_REACHED_M = 0.02


@dataclasses.dataclass(frozen=True)
class SimTask:
    """What a task's name stands for.

    Attributes:
        name: ours.
        environment: robosuite's, or that of a package that registers its environments with robosuite.
        objects: our name of each object -> MuJoCo body, or site where there is no such body; None for all
            objects that the scene has, by their names there.
        instruction: what to do, in words.
        max_steps: how long an attempt may take, at `RATE_HZ`.
        success: whether the task is done now; None for the environment's own check.
        failure: whether the attempt is lost for good, whatever follows; None where that can't happen.
        suite: the benchmark that has to be installed; empty for what robosuite and this package bring.
        settle_steps: that a reset lets the scene settle, gripper opening, so that an episode starts at rest.
    """

    name: str
    environment: str
    objects: Mapping[str, str] | None
    instruction: str
    max_steps: int
    success: Callable[[SimRobot], bool] | None = None
    failure: Callable[[SimRobot], bool] | None = None
    suite: str = ''
    settle_steps: int = 10

    @property
    def object_state_dim(self) -> int:
        """Size of `SimRobot.object_state`.

        Raises:
            SimulationError: only the built scene tells how many objects there are.
        """
        if self.objects is None:
            raise SimulationError(f'{self.name}: how many objects there are is known once the scene is built')
        return 10 * len(self.objects) + 3 * (len(self.objects) - 1)

    def steps_at(self, rate_hz: float) -> int:
        """How many steps an attempt may take at another rate: as many seconds."""
        return math.ceil(self.max_steps * rate_hz / RATE_HZ - 1e-9)


def _is_lifted(name: str) -> Callable[[SimRobot], bool]:
    def success(sim: SimRobot) -> bool:
        return float(sim.object_poses()[name][2, 3]) > sim.table_height_m + LIFTED_M

    return success


def _green_is_on_red(sim: SimRobot) -> bool:
    """The mirror image of robosuite's check: green off the table, on red, and let go."""
    lifted = sim.object_poses()['cube_b'][2, 3] > sim.table_height_m + LIFTED_M
    return bool(lifted and sim.touching('cube_b', 'cube_a') and not sim.holding('cube_b'))


def _is_at_goal(sim: SimRobot) -> bool:
    distance = np.linalg.norm(sim.pose_base_ee[:3, 3] - sim.object_poses()['goal'][:3, 3])
    return bool(distance < GOAL_REACHED_M)


def _pillar_is_touched(sim: SimRobot) -> bool:
    return sim.touching('pillar', 'robot')


_TWO_CUBES = {'cube_a': 'cubeA_main', 'cube_b': 'cubeB_main'}

TASKS = {
    task.name: task
    for task in (
        SimTask('lift', 'Lift', {'cube': 'cube_main'}, 'lift the red cube', 120),
        SimTask('stack', 'Stack', _TWO_CUBES, 'stack the red cube on the green cube', 240),
        SimTask(
            'stack_green', 'Stack', _TWO_CUBES, 'stack the green cube on the red cube', 240, _green_is_on_red
        ),
        SimTask('lift_red', 'Stack', _TWO_CUBES, 'lift the red cube', 120, _is_lifted('cube_a')),
        SimTask('lift_green', 'Stack', _TWO_CUBES, 'lift the green cube', 120, _is_lifted('cube_b')),
        SimTask(
            'square',
            'NutAssemblySquare',
            {'nut': 'SquareNut_main', 'handle': 'SquareNut_handle_site'},
            'put the square nut on the square peg',
            400,
        ),
        SimTask('can', 'PickPlaceCan', {'can': 'Can_main'}, 'put the can into its bin', 400),
        SimTask(
            'detour',
            'Detour',
            {'pillar': 'pillar_main', 'goal': 'goal_main'},
            'reach the goal behind the pillar without touching the pillar',
            120,
            _is_at_goal,
            _pillar_is_touched,
        ),
    )
}


def sim_task(name: str) -> SimTask:
    """Task of that name; a name with a slash in it is a benchmark's, see `sim.benchmarks`.

    Raises:
        SimulationError: there is none; the message names the valid ones.
    """
    if '/' in name:
        from decoupled_policy_ros.sim.benchmarks import benchmark_task

        return benchmark_task(name)
    if name not in TASKS:
        raise SimulationError(
            f'unknown simulated task {name!r}, valid: {", ".join(sorted(TASKS))}, mimicgen/..., libero_.../...'
        )
    return TASKS[name]
