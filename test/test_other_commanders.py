"""Who else commands the arm is heard, however he publishes."""

import time

import pytest
from geometry_msgs.msg import PoseStamped
from spun_node import SpunNode

from decoupled_policy_ros.nodes.common import COMMAND, SENSOR
from decoupled_policy_ros.nodes.other_commanders import OtherCommanders, Said

pytestmark = pytest.mark.process

TIMEOUT_S = 60.0


@pytest.mark.parametrize(('name', 'qos'), [('reliable', COMMAND), ('best_effort', SENSOR)])
def test_another_commander_is_heard_whatever_his_quality_of_service(name, qos):
    mine, other = SpunNode(f'mine_{name}'), SpunNode(f'other_{name}')
    heard: list[str] = []
    try:
        said = Said(mine.create_publisher(PoseStamped, f'commanded_{name}', COMMAND))
        OtherCommanders(mine, heard.append).watch([said])
        publisher = other.create_publisher(PoseStamped, f'commanded_{name}', qos)
        mine.spin_in_background()
        other.spin_in_background()
        deadline = time.monotonic() + TIMEOUT_S
        while not heard:
            assert time.monotonic() < deadline, 'nobody was heard'
            said.publish(PoseStamped())
            theirs = PoseStamped()
            theirs.pose.position.x = 0.5
            publisher.publish(theirs)
            time.sleep(0.05)
        assert heard[0] == f'/other_{name} commands /commanded_{name} too'
    finally:
        mine.close()
        other.close()
