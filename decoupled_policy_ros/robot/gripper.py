"""How a gripper is commanded by an action."""

from __future__ import annotations

from dataclasses import dataclass

from decoupled_policy_ros.errors import RobotDescriptionError
from decoupled_policy_ros.robot.settings import Section


@dataclass(frozen=True)
class GripperAction:
    """A control_msgs/action/GripperCommand server.

    Attributes:
        name: relative name of the action.
        half_width: its position is that of one finger, half of the opening width, as Franka has it.
        max_effort_n: force with which to close.
    """

    name: str
    half_width: bool
    max_effort_n: float

    def position_m(self, width_m: float) -> float:
        """What to ask for to get an opening width."""
        return width_m / 2 if self.half_width else width_m


def read_gripper_action(section: Section) -> GripperAction:
    """The action of a gripper; raises RobotDescriptionError for what is missing or no force."""
    action = GripperAction(
        section.text('name'), section.flag('half_width', False), section.number('max_effort_n')
    )
    if action.max_effort_n < 0:
        raise RobotDescriptionError(
            f'{section.where}: max_effort_n must not be negative, got {action.max_effort_n}'
        )
    return action
