"""kinematics_recorder_node: joint states in, Stage 1 motions on disk, whoever it is that moves the arm.

    joint states -> by name -> motions without idle time -> forward kinematics -> motion_000000.arrow ...

The executor's thread only collects messages; a thread of the recorder's own converts, computes and writes them
five times a second. Where the arm publishes its end-effector pose, forward kinematics is compared with it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseStamped
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.node import Node
from sensor_msgs.msg import JointState

from decoupled_policy_ros.data.motions.joint_rows import JointRows
from decoupled_policy_ros.nodes.common import (
    LATCHED,
    declare_settings,
    diagnostics_name,
    parameter,
    read_robot,
    spin_main,
)
from decoupled_policy_ros.nodes.recorder_intake import Intake

if TYPE_CHECKING:  # they need PyArrow, which rosdep can't install: the node says so if it is missing
    from decoupled_policy_ros.nodes.recorder_worker import Take

_ADAPT_S = 0.2


@dataclass(frozen=True)
class RecorderNodeSettings:
    """Parameters of the node."""

    robot: str = parameter('panda_sim', 'name in config/robots or path of a YAML file')
    robot_description_timeout_s: float = parameter(
        5.0, "longest wait for the URDF's topic, where the robot names one (s)", floating=(0.0, 600.0)
    )
    output_dir: str = parameter('motions', 'folder for the motion files; made if it is missing')
    gripper_joint_states: str = parameter(
        '', "topic of the gripper's joint states where the arm's do not hold them; empty: they do"
    )
    use_current_pose: bool = parameter(
        True, 'compare forward kinematics with the measured end-effector pose, where it is published'
    )
    idle_speed_rad_s: float = parameter(
        0.01, 'an arm whose joints are all slower than this rests (rad/s)', floating=(1e-4, 1.0)
    )
    idle_gripper_speed: float = parameter(
        0.05, 'a gripper slower than this rests (its range is 2, per second)', floating=(1e-3, 10.0)
    )
    # A rest is held in memory until it is over, and whoever kills this node may cost a second at most.
    idle_time_s: float = parameter(0.5, 'a rest of this length ends a motion (s)', floating=(0.1, 0.75))
    min_motion_s: float = parameter(0.5, 'shorter motions are dropped (s)', floating=(0.05, 60.0))
    max_gap_s: float = parameter(0.15, 'a gap between stamps that ends a motion (s)', floating=(0.001, 10.0))
    residual_limit_m: float = parameter(
        0.005,
        'warn when forward kinematics is further than this from the measured pose on average (m)',
        floating=(0.0, 1.0),
    )
    residual_limit_rad: float = parameter(
        0.02,
        'warn when forward kinematics is turned by more than this on average (rad)',
        floating=(0.0, 3.15),
    )
    min_free_mb: float = parameter(
        200.0, 'nothing is recorded while the disk has less space than this (MiB)', floating=(0.0, 1e6)
    )


class KinematicsRecorderNode(Node):
    """Records motions for as long as it lives."""

    def __init__(self, **options: Any) -> None:
        from decoupled_policy_ros.data.motions.recorder import MotionRecorder, MotionSettings
        from decoupled_policy_ros.nodes.recorder_worker import RecorderWorker

        super().__init__('kinematics_recorder_node', **options)
        settings = self.settings = declare_settings(self, RecorderNodeSettings)
        self.robot = read_robot(self, settings.robot, settings.robot_description_timeout_s)
        motion_settings = MotionSettings(
            idle_speed_rad_s=settings.idle_speed_rad_s,
            idle_gripper_speed=settings.idle_gripper_speed,
            idle_time_s=settings.idle_time_s,
            min_motion_s=settings.min_motion_s,
            max_gap_s=settings.max_gap_s,
        )
        folder = Path(settings.output_dir).expanduser()
        recorder = MotionRecorder(folder, self.robot, motion_settings)
        self._recover(folder)
        self._intakes = [Intake(self, JointState, self.robot.topics['joint_states'])]
        take_gripper: Take = list
        take_poses: Take = list
        if settings.gripper_joint_states:
            self._intakes.append(Intake(self, JointState, settings.gripper_joint_states))
            take_gripper = self._intakes[-1].take
        if settings.use_current_pose:
            self._intakes.append(Intake(self, PoseStamped, self.robot.topics['current_pose']))
            take_poses = self._intakes[-1].take
        self.worker = RecorderWorker(
            recorder,
            JointRows(self.robot, gripper_apart=bool(settings.gripper_joint_states)),
            self._intakes[0].take,
            take_gripper,
            take_poses,
            settings.min_free_mb,
            self.get_logger().warning,
        )
        self._status = self.create_publisher(DiagnosticStatus, '~/status', LATCHED)
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', 10)
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # reports go on when simulated time stands still
        self.create_timer(_ADAPT_S, self._adapt, clock=steady)
        self.create_timer(1.0, self._report, clock=steady)
        self._before: dict[str, float] = {}
        self._reported_at = time.monotonic()
        self.worker.start()
        self.get_logger().info(f'recording the motions of {self.robot.name} in {folder.resolve()}')

    def _recover(self, folder: Path) -> None:
        from decoupled_policy_ros.data.motions.files import MotionWriter

        for recovery in MotionWriter.recover(folder):
            self.get_logger().warning(
                f'{recovery.part.name} was left by a recorder that was killed: {recovery}'
            )

    def _adapt(self) -> None:
        for intake in self._intakes:
            intake.adapt()

    # --- diagnostics ----------------------------------------------------------------------------

    def _report(self) -> None:
        if self.worker.failure is not None:
            raise self.worker.failure
        values = self._values()
        level, text = self._judge(values)
        status = DiagnosticStatus(
            level=level,
            name=diagnostics_name(self, 'motions'),
            message=text,
            hardware_id=self.robot.name,
            values=[KeyValue(key=key, value=_text(value)) for key, value in values.items()],
        )
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)
        self._status.publish(status)

    def _values(self) -> dict[str, Any]:
        """What is reported; `new_*` are since the last report."""
        worker, now = self.worker, time.monotonic()
        values = worker.recorder.report()
        values |= {
            'recording': worker.recorder.recording,
            'rejected': sum(worker.rows.rejected.values()),
            'foreign': worker.rows.foreign,
            'unrecorded': worker.unrecorded,
            'rejected_poses': worker.rejected_poses,
            'lost_by_dds': sum(intake.lost for intake in self._intakes),
            'disk_free_mb': worker.free_mb,
        }
        period_s, self._reported_at = now - self._reported_at, now
        new = {
            key: values[key] - self._before.get(key, 0)
            for key in ('samples', 'rejected', 'rejected_poses', 'lost_by_dds', 'out_of_order', 'clock_jumps')
        }
        self._before = {key: values[key] for key in new}
        values |= {f'new_{key}': value for key, value in new.items()}
        values['rate_hz'] = new['samples'] / period_s
        return values

    def _judge(self, values: dict[str, Any]) -> tuple[bytes, str]:
        """Level and sentence; the worst comes first."""
        worker, settings = self.worker, self.settings
        if worker.stopped:
            return DiagnosticStatus.ERROR, f'recording stopped: {worker.stopped}'
        warnings = []
        if values['new_rejected']:
            warnings.append(f'{values["new_rejected"]} joint states rejected: {worker.rows.last_rejection}')
        if values['new_lost_by_dds']:
            warnings.append(f'{values["new_lost_by_dds"]} messages lost by DDS')
        if values['new_out_of_order'] or values['new_clock_jumps']:
            warnings.append('stamps went back')
        if values['new_rejected_poses']:
            warnings.append(f'{values["new_rejected_poses"]} poses rejected: {worker.last_pose_rejection}')
        mean_m, mean_rad = values.get('residual_mean_m', 0.0), values.get('residual_mean_rad', 0.0)
        if mean_m > settings.residual_limit_m or mean_rad > settings.residual_limit_rad:
            warnings.append(
                f'forward kinematics is {mean_m:.4f} m and {mean_rad:.4f} rad from the measured pose on average: '
                f'check frames and URDF'
            )
        if not values['new_samples'] and not warnings:
            warnings.append(f'no joint states on {self._intakes[0].topic}')
        for warning in warnings:
            self.get_logger().warning(warning, throttle_duration_sec=10.0)
        if warnings:
            return DiagnosticStatus.WARN, '; '.join(warnings)
        return DiagnosticStatus.OK, 'recording' if values['recording'] else 'the arm rests'

    def destroy_node(self) -> None:
        """Finish the motion, then the node."""
        worker = getattr(self, 'worker', None)
        if worker is not None:
            worker.stop()
        super().destroy_node()


def _text(value: Any) -> str:
    return (
        f'{value:.6g}'
        if isinstance(value, float)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )


def main(args: list[str] | None = None) -> int:
    """Console entry point."""
    return spin_main(KinematicsRecorderNode, args)


if __name__ == '__main__':
    raise SystemExit(main())
