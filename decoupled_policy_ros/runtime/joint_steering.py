"""The way of the joints beside the way of the end effector, for controllers that want joint trajectories.

Each adopted path becomes one trajectory with absolute stamps. It begins now, on the trajectory before it, so that a
controller which replaces one by the other notices nothing, and it ends at rest, so that an arm which hears nothing
more comes to rest by itself. A hold becomes the trajectory of coming to rest, and so does the end of all commands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.robot.description import RobotDescription
from decoupled_policy_ros.runtime.chunks import NS_PER_S, Chunk
from decoupled_policy_ros.runtime.guard.guard import missing_joints
from decoupled_policy_ros.runtime.guard.verdict import Finding
from decoupled_policy_ros.runtime.joint_motion import JointMotion, JointPlanner
from decoupled_policy_ros.runtime.joint_stopping import STOP_INTERVALS, STOP_NS, slowed_to_rest
from decoupled_policy_ros.runtime.motion import Motion, UnderWay
from decoupled_policy_ros.runtime.steering import ChunkRejected, Guarded, Joints, Plan
from decoupled_policy_ros.runtime.stopping import JointBraking, Stop

Array = NDArray[np.float64]

#: Longest time from one point to the next (ns): the cubic between them is off by less than 0.5 mm then.
LONGEST_NS = 100_000_000
#: Least time from one point to the next (ns): what a point is off by would be a large acceleration otherwise.
SHORTEST_NS = 5_000_000
#: Share of the joints' accelerations that a stop uses: its joints are found anew, and differ a little.
BRAKING_SHARE = 0.95
#: How much later than now a stop ends at least (ns), at rest: a controller drops what has ended when it hears of it.
REST_NS = 100_000_000


@dataclass(frozen=True, eq=False)
class JointPlan(Plan):
    """A path with the joints' motion along it.

    Attributes:
        joints: the motion.
        joints_before: the one that it goes on from.
    """

    joints: JointMotion | None = None
    joints_before: JointMotion | None = None


class InJoints:
    """Steering that also publishes what it does as motions of the joints.

    Args:
        steering: decides what is followed.
        robot: gives kinematics.
        joints: where the arm is, for the beginning.
        publish: told of each motion of the joints; the newest replaces all others.
        now_ns: the node's clock.
        lockstep: time waits for commands: what is published of a motion ends where the next chunk is due.
    """

    def __init__(
        self,
        steering: Guarded,
        robot: RobotDescription,
        joints: Joints,
        publish: Callable[[JointMotion], None],
        now_ns: Callable[[], int],
        lockstep: bool,
    ):
        self._steering, self._joints, self._publish, self._now_ns = steering, joints, publish, now_ns
        self._lockstep = lockstep
        self.guard = steering.guard
        self._limits = self.guard.limits
        # Paths are planned on the worker while the streamer may have to stop: one object for each.
        looks = self.guard.settings.looks_at('joint_acceleration')
        self._planner = JointPlanner(robot, self._limits, looks)
        self._stopper = JointPlanner(robot, self._limits, looks)
        self._commanded: JointMotion | None = None
        self._stop: Motion | None = None
        self._last_ns = self._published_ns = 0

    def plan(self, chunk: Chunk, now_ns: int) -> Plan:
        """What the steering plans, with the joints for it; raises ChunkRejected where there are none."""
        begin = time.perf_counter()
        commanded, measured = self._commanded, self._joints.positions(now_ns)
        plan = self._steering.plan(chunk, now_ns)
        path = plan.path
        assert path is not None
        if commanded is None and measured is None:
            raise self._rejected(missing_joints(self._joints.why_not(now_ns)))
        stamps_ns = _spaced(path.borders_ns)
        if commanded is None:
            motion, found = self._motion(self._planner, path, stamps_ns, measured)
        else:
            motion, found = self._motion(self._planner, path, stamps_ns, commanded.at(stamps_ns[0])[0])
            motion = _joined(commanded, now_ns, motion)
        found = found or self._planner.breach(motion)
        if found is not None:
            raise self._rejected(found)
        self._steering.took(time.perf_counter() - begin)
        return JointPlan(**vars(plan), joints=motion, joints_before=commanded)

    def adopt(self, plan: Plan) -> bool:
        """Follow a plan, and publish its joints; False where it came too late."""
        assert isinstance(plan, JointPlan) and plan.joints is not None
        # Poses would go on from wherever a tick finds them; a controller has gone on along what it was told before.
        begun = not self._lockstep and plan.begins_ns < self._now_ns()
        if begun or plan.joints_before is not self._commanded or not self._steering.adopt(plan):
            return False
        self._commanded, self._stop = plan.joints, None
        if self._lockstep:
            chunk = plan.chunk
            last_ns = chunk.replan_stamp_ns - round(NS_PER_S / chunk.rate_hz)
            self._published_ns = max(last_ns, plan.joints.stamps_ns[0])
            self._publish(plan.joints.until(self._published_ns))
        else:
            self._publish(plan.joints)
        return True

    def under_way(self) -> UnderWay | None:
        """What the arm does if nothing new comes."""
        return self._steering.under_way()

    def follow(self, now_ns: int) -> tuple[Array, float | None]:
        """Where the steering is at a time."""
        self._last_ns = now_ns
        return self._steering.follow(now_ns)

    def hold(self, now_ns: int, begin: bool = False) -> Array | None:
        """Come to rest as the steering does, once for each time that it has to."""
        begins = begin and self._commanded is None
        if begins and (measured := self._joints.positions(now_ns)) is not None:
            self._commanded = JointMotion([now_ns], measured[None], np.zeros((1, len(measured))))
        led_ns = self._last_ns if self._lockstep else now_ns  # a controller has gone on by itself until now
        pose = self._steering.hold(now_ns, begin, self._braking(), led_ns or None)
        stop = self._steering.motion
        if isinstance(stop, Stop) and stop is not self._stop and self._commanded is not None:
            self._stop = stop
            # A stop that goes on began earlier, and what it replaces may begin later.
            since_ns = max(stop.start_ns, led_ns, self._commanded.stamps_ns[0])
            left_ns = stop.start_ns + round(stop.duration_s * NS_PER_S) - since_ns
            count = max(STOP_INTERVALS, -(-left_ns // STOP_NS))
            times_ns = np.linspace(0, max(left_ns, 1_000_000), count + 1)
            stamps_ns = [since_ns + round(time_ns) for time_ns in times_ns]
            before = self._commanded.at(stamps_ns[0])[0]
            self._commanded, _ = self._motion(self._stopper, stop, stamps_ns, before)
            self._published_ns = stamps_ns[-1]
            if not self._lockstep and self._published_ns < now_ns + REST_NS:
                self._commanded = self._commanded.resting_until(now_ns + REST_NS)
            self._publish(self._commanded)
        elif self._lockstep and self._commanded is not None:
            self._publish(_point(self._commanded, now_ns))  # each step is waited for
        self._last_ns = now_ns
        return pose

    def missed_s(self, now_ns: int) -> float:
        """Nothing is too long: the controller goes on by itself."""
        return 0.0

    def reset(self, silently: bool = False) -> None:
        """Bring the arm to rest, unless it is to be done silently, and forget what was commanded."""
        commanded, self._commanded, self._stop = self._commanded, None, None
        last_ns, self._last_ns = self._last_ns, 0
        self._steering.reset()
        if commanded is None or silently:
            return
        start_ns = now_ns = self._now_ns()
        # Time may have been set back: then the arm is where it was told to be last.
        since_ns = now_ns if now_ns >= commanded.stamps_ns[0] else last_ns
        if self._lockstep and since_ns == now_ns:
            # The arm goes as far as was published and no farther, whatever time it is.
            since_ns = start_ns = self._published_ns
        # What was adopted since the last command begins later than that, where that has led by then.
        since_ns = max(since_ns, commanded.stamps_ns[0])
        positions, velocities = commanded.at(since_ns)
        # What a controller was sent may begin only later; in lockstep it was sent no more than until then.
        still_to_come = not self._lockstep and (commanded.positions_rad[-1] != positions).any()
        if velocities.any() or still_to_come:
            stop = slowed_to_rest(commanded, since_ns, start_ns, self._limits.acceleration_rad_s2)
            ends_ns, rest_ns = (now_ns, STOP_NS) if self._lockstep else (now_ns + REST_NS, REST_NS)
            self._publish(stop if stop.stamps_ns[-1] > ends_ns else stop.resting_until(now_ns + rest_ns))

    def _braking(self) -> JointBraking | None:
        commanded = self._commanded
        if commanded is None or not self.guard.settings.looks_at('joint_acceleration'):
            return None
        limits_rad_s2 = BRAKING_SHARE * self._limits.acceleration_rad_s2
        return JointBraking(lambda stamp_ns: commanded.at(stamp_ns)[1], limits_rad_s2)

    def values(self) -> dict[str, str]:
        """What the steering reports."""
        return self._steering.values()

    def _motion(
        self, planner: JointPlanner, motion: Motion, stamps_ns: Sequence[int], from_rad: Array | None
    ) -> tuple[JointMotion, Finding | None]:
        assert from_rad is not None
        return planner.motion([motion.state(stamp) for stamp in stamps_ns], stamps_ns, from_rad)

    def _rejected(self, found: Finding) -> ChunkRejected:
        self._steering.statistics.found((found,))
        return ChunkRejected(str(found))


def _point(motion: JointMotion, stamp_ns: int) -> JointMotion:
    positions, velocities = motion.at(stamp_ns)
    return JointMotion([stamp_ns], positions[None], velocities[None])


def _joined(before: JointMotion, now_ns: int, after: JointMotion) -> JointMotion:
    """One motion: what was commanded from now on, until another one begins."""
    stamps_ns = [
        now_ns,
        *(stamp for stamp in before.stamps_ns if now_ns < stamp <= after.stamps_ns[0] - SHORTEST_NS),
    ]
    if now_ns >= after.stamps_ns[0]:
        return after
    points = [before.at(stamp) for stamp in stamps_ns]
    assert after.velocities_rad_s is not None
    return JointMotion(
        [*stamps_ns, *after.stamps_ns],
        np.concatenate([np.stack([position for position, _ in points]), after.positions_rad]),
        np.concatenate([np.stack([velocity for _, velocity in points]), after.velocities_rad_s]),
    )


def _spaced(stamps_ns: Sequence[int]) -> list[int]:
    """Stamps without those that follow another too soon, and with others evenly between where two are far apart."""
    apart = [stamps_ns[0]]
    for stamp in stamps_ns[1:-1]:
        if stamp - apart[-1] >= SHORTEST_NS and stamps_ns[-1] - stamp >= SHORTEST_NS:
            apart.append(stamp)
    finer = [stamps_ns[0]]
    for begin, end in pairwise([*apart, stamps_ns[-1]]):
        parts = -(-(end - begin) // LONGEST_NS)
        finer += [begin + (end - begin) * part // parts for part in range(1, parts + 1)]
    return finer
