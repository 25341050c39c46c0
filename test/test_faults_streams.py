"""Faults of what the policy sees: each stream lost, late, slow, out of order, unstamped, wrong, or restarted."""

import math
from collections.abc import Iterator

import pytest
from fault_cell import changed_robot, running_policy
from live_robot import CAMERAS, JOINTS, STREAMS, Faults
from ros_harness import NodeProcess

pytestmark = pytest.mark.process

NAMES = {JOINTS: 'proprioception'} | {camera: camera for camera in CAMERAS}


@pytest.fixture(scope='module')
def node(tmp_path_factory) -> Iterator[NodeProcess]:
    """The policy of an arm whose file says how large the pictures are."""
    folder = tmp_path_factory.mktemp('faults')

    def sized(description: dict) -> None:
        for camera in description['cameras'].values():
            camera['size'] = [84, 84]

    with running_policy(folder, robot=changed_robot(folder, sized)) as node:
        yield node


@pytest.fixture(autouse=True)
def no_faults(node, cell) -> None:
    cell.body.faults = Faults()


@pytest.mark.parametrize('stream', STREAMS)
def test_a_stream_that_is_lost(cell, stream):
    cell.stops_and_goes_on(f"stream '{NAMES[stream]}' is", silent={stream})


@pytest.mark.parametrize('stream', STREAMS)
def test_a_stream_that_is_late(cell, stream):
    cell.is_moving()
    cell.body.faults = Faults(late_s={stream: 0.5})
    cell.status('holding', f"stream '{NAMES[stream]}' is")
    cell.reported('streams', f'{NAMES[stream]} is 0.')
    cell.is_at_rest()
    cell.body.faults = Faults()
    cell.is_moving()


@pytest.mark.parametrize('stream', STREAMS)
def test_a_stream_from_the_future(cell, stream):
    """What is stamped far ahead is left out: in the buffer it would bar all that come after it."""
    cell.stops_and_goes_on('s in the future, limit 0.2 s', late_s={stream: -3600.0})


@pytest.mark.parametrize('stream', STREAMS)
def test_a_stream_that_is_slow(cell, stream):
    """Slower than its limit of age: between two messages the arm stops again and again."""
    cell.is_moving()
    cell.body.faults = Faults(every={stream: 60 if stream == JOINTS else 24})
    cell.status('holding', f"stream '{NAMES[stream]}' is")
    assert float(cell.diagnostics('streams', after=2)[f'{NAMES[stream]}_rate_hz']) < 20.0
    cell.body.faults = Faults()
    cell.is_moving()


@pytest.mark.parametrize('stream', STREAMS)
def test_a_stream_out_of_order(cell, stream):
    """What comes after a newer one is left out and counted; what is left is enough here."""
    before = int(cell.diagnostics('streams')[f'{NAMES[stream]}_refused'])
    cell.goes_on(out_of_order={stream})
    assert int(cell.diagnostics('streams')[f'{NAMES[stream]}_refused']) >= before + 5


@pytest.mark.parametrize('stream', STREAMS)
def test_zero_stamps(cell, stream):
    cell.stops_and_goes_on('a zero stamp is no stamp', unstamped={stream})


def test_a_wrong_encoding(cell):
    cell.stops_and_goes_on("unknown image encoding 'yuv9'", encoding='yuv9')


def test_a_wrong_size(cell):
    cell.stops_and_goes_on('has 60 x 80 pixels (height x width), its description says 84 x 84', size=(60, 80))


def test_joints_in_another_order(cell):
    """Joints are found by their names."""
    cell.goes_on(shuffled=True)


def test_a_joint_that_is_missing(cell):
    cell.stops_and_goes_on('joint state lacks joint3', lacking=('joint3',))


@pytest.mark.parametrize('value', [math.nan, math.inf], ids=['nan', 'inf'])
def test_a_joint_that_is_not_finite(cell, value):
    cell.stops_and_goes_on(f"positions that are not finite: {{'joint4': {value}}}", values={'joint4': value})


@pytest.mark.parametrize('camera', CAMERAS)
def test_a_camera_that_is_restarted(cell, camera):
    cell.is_moving()
    cell.body.close(camera)
    cell.status('holding', f"stream '{camera}' is")
    cell.is_at_rest()
    cell.body.open(camera)
    cell.is_moving()
