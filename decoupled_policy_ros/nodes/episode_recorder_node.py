"""episode_recorder_node: demonstrations on disk, one rosbag2 folder each, started and judged by services.

    raw messages -> bounded queue -> a thread of its own -> OUTPUT/.episode_000000.partial/ -> OUTPUT/episode_000000/

Nothing is deserialised. The services ~/start, ~/keep (with the success label), ~/discard and ~/rerecord say what
becomes of an episode; ~/status says once a second what is heard, lost and left of the disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.logging import get_logger
from rclpy.node import Node
from rclpy.parameter import Parameter
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.nodes.common import (
    COMMAND,
    LATCHED,
    NS_PER_S,
    declare_settings,
    diagnostics_name,
    read_robot,
    resolve_topic,
    spin_main,
)
from decoupled_policy_ros.nodes.episode_clock import EpisodeClock
from decoupled_policy_ros.nodes.episode_intake import POLL_S, POLL_SIM_TIME_S, Budget, Poller
from decoupled_policy_ros.nodes.episode_settings import EpisodeSettings, episode_header

if TYPE_CHECKING:  # they need mcap, which rosdep can't install: the node says so if it is missing
    from decoupled_policy_ros.nodes.episode_topics import RecordedTopic

_ADAPT_S = 0.2
_REPORT_S = 0.5
_MIB = 2**20
# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


class EpisodeRecorderNode(Node):
    """Records episodes when it is told to."""

    def __init__(self, **options: Any) -> None:
        from decoupled_policy_ros.data.bags.episodes import EpisodeStore
        from decoupled_policy_ros.nodes.episode_status import EpisodeStatus
        from decoupled_policy_ros.nodes.episode_topics import RecordedTopic, plan_topics
        from decoupled_policy_ros.nodes.episode_worker import EpisodeWorker

        super().__init__('episode_recorder_node', **options)
        settings = self.settings = declare_settings(self, EpisodeSettings)
        self.robot = read_robot(self, settings.robot, settings.robot_description_timeout_s)
        self._header = episode_header(self.robot, settings)
        store = EpisodeStore(Path(settings.output_dir), settings.compression)
        system = Clock(clock_type=ClockType.SYSTEM_TIME)  # what the middleware stamps receptions with
        self._episode_clock = EpisodeClock(lambda: system.now().nanoseconds)
        self._budget = Budget(int(settings.max_memory_mb * _MIB))
        sim_time = self.get_parameter('use_sim_time').value
        self._poller = Poller(POLL_SIM_TIME_S if sim_time else POLL_S)
        self.topics = [
            RecordedTopic(self, plan, self._budget, self._poller, self._episode_clock)
            for plan in plan_topics(self.robot, settings.extra_topics, partial(resolve_topic, self))
        ]
        self._command_topic = resolve_topic(self, self.robot.topics['target_pose'])
        self.worker = EpisodeWorker(store, settings.min_free_mb, self._now_ns, self.get_logger().error)
        self._judge = EpisodeStatus(
            self.worker, self.topics, self._budget, self._episode_clock, self._silence
        ).judge
        self._instruct(settings.instruction)
        self._begin_ns = self._started_ns = 0
        self._say_what_is_left(store)
        self._offer_interface()
        self._poller.start()
        self.worker.start()
        self.get_logger().info(f'episodes of {self.robot.name} go to {store.folder.resolve()}')

    def _offer_interface(self) -> None:
        self.create_service(Trigger, '~/start', self._on_start)
        self.create_service(SetBool, '~/keep', self._on_keep)
        self.create_service(Trigger, '~/discard', self._on_discard)
        self.create_service(Trigger, '~/rerecord', self._on_rerecord)
        self.create_subscription(String, '~/instruction', self._on_instruction, COMMAND)
        self.add_post_set_parameters_callback(self._on_parameters)
        self._status = self.create_publisher(DiagnosticStatus, '~/status', LATCHED)
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', 10)
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # reports go on when simulated time stands still
        self.create_timer(_ADAPT_S, self._look_for_publishers, clock=steady)
        self.create_timer(_REPORT_S, self._report, clock=steady)

    def _say_what_is_left(self, store: Any) -> None:
        left = store.abandoned()
        if left:
            self.get_logger().warning(
                f'{len(left)} episode(s) were left unfinished by a recorder that was killed: '
                f'`decoupled-policy recover {store.folder}` saves them'
            )

    def _now_ns(self) -> int:
        """What episodes are timed by: simulated time, or the system's as if nobody set it."""
        clock = self.get_clock()
        return int(clock.now().nanoseconds) if clock.ros_time_is_active else self._episode_clock.now_ns()

    def _look_for_publishers(self) -> None:
        for topic in self.topics:
            if topic.look() and self.worker.episode:
                try:
                    self._record(topic)
                except DatasetError as error:
                    self.get_logger().error(str(error))

    def _record(self, topic: RecordedTopic) -> None:
        assert topic.intake is not None
        self.worker.add(topic)
        log_ns = self._now_ns if self.get_clock().ros_time_is_active else None
        topic.intake.begin(self._begin_ns, log_ns)

    # --- services -------------------------------------------------------------------------------

    def _on_start(self, _: Any, response: Any) -> Any:
        if self.worker.episode:
            return self._answer(response, False, f'{self.worker.episode} is being recorded already')
        refusal = self._refusal()
        return self._answer(response, *((False, refusal) if refusal else self._start()))

    def _start(self) -> tuple[bool, str]:
        """Begin an episode; returns whether it is being recorded, and a sentence about it."""
        self._begin_ns = self._episode_clock.restart()
        self._started_ns = self._now_ns()
        header = {**self._header, 'started_ns': self._started_ns}
        try:
            name = self.worker.begin(header, self._instruction)
            for topic in self.topics:
                if topic.intake is not None:
                    self._record(topic)
        except DatasetError as error:
            if self.worker.episode:
                with contextlib.suppress(DatasetError):  # a folder that can't be removed: nothing is in it
                    self.worker.discard()
            return False, str(error)
        self._report()
        return True, f'recording {name}'

    def _refusal(self) -> str:
        """Why nothing can be recorded now; '' nothing speaks against it."""
        reasons = [self._silence(topic) for topic in self.topics if topic.plan.required]
        reasons = [reason for reason in reasons if reason] if self.settings.require_topics else []
        free_mb = self.worker.store.free_mb
        if free_mb < self.settings.min_free_mb:
            reasons.append(
                f'{free_mb:.0f} MiB left on the disk, min_free_mb is {self.settings.min_free_mb:.0f}'
            )
        if self.get_clock().ros_time_is_active and not self._now_ns():
            reasons.append('use_sim_time is set and nothing has come on /clock')
        return '; '.join(reasons)

    def _silence(self, topic: RecordedTopic) -> str:
        """Why a topic is not usable now; '' it is."""
        if topic.problem and not topic.has_expected_type:
            return topic.problem
        if topic.intake is None:
            return topic.problem or f'nobody publishes {topic.name}'
        if not topic.intake.publishers:
            return f'nobody publishes {topic.name} any more'
        silent_s = time.monotonic() - topic.intake.heard_at
        if not topic.intake.heard:
            return f'nothing was heard on {topic.name} yet'
        return f'nothing on {topic.name} for {silent_s:.1f} s' if silent_s > self.settings.silence_s else ''

    def _on_keep(self, request: Any, response: Any) -> Any:
        try:
            path = self.worker.finish(bool(request.data))
        except DatasetError as error:
            return self._answer(response, False, str(error))
        finally:
            self._report()
        message = f'kept {path.name} as a {"success" if request.data else "failure"}'
        if self.worker.recorded(self._command_topic):
            return self._answer(response, True, message)
        response.success = True
        response.message = f'{message}; no command was recorded on {self._command_topic}'
        self.get_logger().warning(response.message)
        return response

    def _on_discard(self, _: Any, response: Any) -> Any:
        try:
            name = self.worker.discard()
        except DatasetError as error:
            return self._answer(response, False, str(error))
        finally:
            self._report()
        return self._answer(response, True, f'threw {name} away')

    def _on_rerecord(self, _: Any, response: Any) -> Any:
        refusal = self._refusal()
        if refusal:
            return self._answer(response, False, f'nothing is thrown away: {refusal}')
        try:
            before = self._make_way()
        except (DatasetError, OSError) as error:
            return self._answer(response, False, str(error))
        success, message = self._start()
        return self._answer(response, success, before + message)

    def _make_way(self) -> str:
        """Throw the running episode away, or set the one aside that was kept last; returns what became of it."""
        if self.worker.episode:
            return f'threw {self.worker.discard()} away; '
        last = self.worker.last
        path = self.worker.set_last_aside()
        if last is None or path is None:
            return ''
        self.get_logger().info(f'{last.name} is in {path.resolve()} now')
        return f'moved {last.name} to {path.parent.name}, '

    def _answer(self, response: Any, success: bool, message: str) -> Any:
        """Answer a service, and have the log say the same."""
        response.success, response.message = success, message
        if success:
            self.get_logger().info(message)
        else:
            self.get_logger().warning(f'refused: {message}')
        return response

    def _on_instruction(self, message: String) -> None:
        self._instruct(message.data)
        self.set_parameters([Parameter('instruction', value=message.data)])

    def _on_parameters(self, parameters: list[Parameter]) -> None:
        for parameter in parameters:
            if parameter.name == 'instruction':
                self._instruct(parameter.value)

    def _instruct(self, instruction: str) -> None:
        self._instruction = self.worker.instruction = instruction

    # --- diagnostics ----------------------------------------------------------------------------

    def _report(self) -> None:
        failure = self.worker.failure or self._poller.failure
        if failure is not None:
            raise failure
        level, text, values = self._judge((self._now_ns() - self._started_ns) / NS_PER_S)
        status = DiagnosticStatus(
            level=level,
            name=diagnostics_name(self, 'episodes'),
            message=text,
            hardware_id=self.robot.name,
            values=[KeyValue(key=key, value=str(value)) for key, value in values.items()],
        )
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)
        self._status.publish(status)

    def destroy_node(self) -> None:
        """Keep what is being recorded, then end the node."""
        worker = getattr(self, 'worker', None)
        if worker is not None:
            # Its name is no node's: after Ctrl-C the node's own would not come through to /rosout, and say so.
            worker.close(get_logger(f'{self.get_logger().name}.end').warning)
            self._poller.close()
        super().destroy_node()


def keep_freed_memory() -> None:
    """Have the C library reuse the memory of pictures instead of giving it back to the kernel after each one.

    That halves the processor time of writing: by default each copy of a 900 kB message touches fresh pages, which
    the kernel clears first. Does nothing where the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, size in ((_M_MMAP_THRESHOLD, 2**25), (_M_TRIM_THRESHOLD, 2**28), (_M_TOP_PAD, 2**24)):
            mallopt(option, size)


def main(args: list[str] | None = None) -> int:
    """Console entry point."""
    keep_freed_memory()
    return spin_main(EpisodeRecorderNode, args)


if __name__ == '__main__':
    raise SystemExit(main())
