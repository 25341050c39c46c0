"""The package as others meet it: its metadata, and colcon and pip installing it for real."""

import ast
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import tyro
import yaml
from catkin_pkg.package import parse_package

from decoupled_policy_ros import __version__

PACKAGE = 'decoupled_policy_ros'
EXECUTABLES = {
    'policy_node', 'teleop_node', 'kinematics_recorder_node', 'episode_recorder_node', 'sim_robot_node',
    'coverage_node', 'command_guard_node', 'decoupled-policy',
}  # fmt: skip
ROSDEP_KEYS = {
    'rclpy', 'sensor_msgs', 'geometry_msgs', 'trajectory_msgs', 'std_msgs', 'std_srvs', 'nav_msgs', 'diagnostic_msgs',
    'visualization_msgs', 'lifecycle_msgs', 'cv_bridge', 'ros2_numpy', 'franka_ros2', 'pinocchio', 'python3-opencv',
    'python3-numpy', 'python3-yaml', 'launch', 'launch_ros',
}  # fmt: skip
PIP_NAMES = {'torch', 'pin', 'opencv-python', 'pyyaml', 'numpy', 'sentence-transformers', 'ros-jazzy-rclpy'}
LIGHT_TESTS = ['test/test_resources.py', 'test/test_poses.py']


def run(command: list[str], cwd: Path, environment: dict[str, str] | None = None) -> str:
    """Run a command to its end, return what it printed, and show all of it when it fails."""
    result = subprocess.run(
        command, cwd=cwd, env=environment or clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, f'{command} returned {result.returncode}:\n{result.stdout}'
    return result.stdout


def clean_environment() -> dict[str, str]:
    """The environment without the source tree on the Python path, and the marks of this process's own start."""
    hidden = {'_ROS_WHEELS_BOOTSTRAP_COMPLETE', 'PYTEST_ADDOPTS', 'PYTEST_CURRENT_TEST'}
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    source = str(Path(__file__).resolve().parents[1])
    paths = [path for path in environment.pop('PYTHONPATH', '').split(os.pathsep) if path not in ('', source)]
    return environment | ({'PYTHONPATH': os.pathsep.join(paths)} if paths else {})


@pytest.fixture(scope='module')
def copied_tree(tmp_path_factory, repository) -> Path:
    """A copy of what a clone would hold, in a workspace of its own: no build leaves a trace in the source."""
    tree = tmp_path_factory.mktemp('workspace') / 'src' / PACKAGE
    ignored = shutil.ignore_patterns('.*', '__pycache__', '*.egg-info', 'out', 'build', 'install', 'log')
    shutil.copytree(repository, tree, ignore=ignored)
    leftover = tree / 'models' / 'tasks' / 'trained_here' / 'checkpoint.safetensors'
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    return tree


@pytest.fixture(scope='module')
def colcon_workspace(copied_tree) -> Path:
    """A workspace in which `colcon build` has built the package."""
    workspace = copied_tree.parents[1]
    run([sys.executable, '-m', 'colcon', 'build', '--event-handlers', 'console_direct+'], workspace)
    return workspace


def colcon_environment(workspace: Path) -> dict[str, str]:
    """The environment after sourcing the workspace's set-up script, as a user's shell has it."""
    command = f'. {workspace}/install/local_setup.sh && env -0'
    result = subprocess.run(
        ['sh', '-c', command],
        cwd=workspace,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(pair.split('=', 1) for pair in result.stdout.split('\0') if '=' in pair)


def test_package_xml_is_valid_and_an_ament_python_package(repository):
    package = parse_package(str(repository / 'package.xml'))  # raises on anything that ROS's tools refuse
    assert package.package_format == 3
    assert package.name == PACKAGE
    assert package.version == __version__
    assert [str(text) for text in package.licenses] == ['Apache-2.0']
    assert package.get_build_type() == 'ament_python'
    assert all(re.fullmatch(r'[^@\s]+@[^@\s]+\.[a-z]+', person.email) for person in package.maintainers)


def test_package_xml_names_every_dependency(repository):
    tree = ElementTree.parse(repository / 'package.xml')
    keys = {element.text for element in tree.iter() if element.tag.endswith('depend')}
    assert ROSDEP_KEYS <= keys


def test_keys_outside_the_rosdistro_index_wait_to_be_asked_for(repository):
    def names(environment: dict[str, str]) -> set[str]:
        package = parse_package(str(repository / 'package.xml'))
        package.evaluate_conditions(environment)
        return {depend.name for depend in package.exec_depends if depend.evaluated_condition}

    optional = {'ros2_numpy', 'franka_ros2'}
    assert names({'ROS_DISTRO': 'jazzy'}) & optional == set()
    assert names({'WITH_ROS2_NUMPY': '1', 'WITH_FRANKA': '1'}) & optional == optional


def test_every_ros_import_of_the_nodes_is_declared(repository):
    keys = {element.text for element in ElementTree.parse(repository / 'package.xml').iter()}
    imported = set()
    for path in (repository / PACKAGE / 'nodes').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or '').partition('.')[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.partition('.')[0] for alias in node.names}
    ros = {name for name in imported if name == 'rclpy' or name.endswith(('_msgs', '_srvs', '_interfaces'))}
    assert 'rclpy' in ros
    assert ros - keys == set()


def test_parameter_files_are_ros_parameter_files(repository):
    files = sorted((repository / 'config').glob('*.yaml'))
    assert files
    for path in files:
        for node, block in yaml.safe_load(path.read_text()).items():
            assert node.startswith('/'), f'{path.name}: {node}'
            assert set(block) == {'ros__parameters'}, f'{path.name}: {node}'


def test_pip_names_are_declared_and_broken_namesakes_are_not(copied_tree, tmp_path):
    run([sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', str(tmp_path)], copied_tree)
    requires = (tmp_path / f'{PACKAGE}.egg-info' / 'requires.txt').read_text()
    names = set(re.findall(r'^([A-Za-z0-9_.-]+)', requires, re.MULTILINE))
    assert names >= PIP_NAMES
    assert names & {'cv-bridge', 'cv_bridge', 'ros2-numpy', 'ros2_numpy'} == set()
    assert {'[ros]', '[sim]', '[train]', '[dev]', '[language]'} <= set(
        re.findall(r'^\[\w+\]', requires, re.MULTILINE)
    )


@pytest.mark.slow
def test_colcon_builds_it_as_a_ros_package(colcon_workspace):
    listing = run([sys.executable, '-m', 'colcon', 'list'], colcon_workspace)
    assert listing.split() == [PACKAGE, f'src/{PACKAGE}', '(ros.ament_python)']

    prefix = colcon_workspace / 'install' / PACKAGE
    share = prefix / 'share' / PACKAGE
    assert {path.name for path in (prefix / 'lib' / PACKAGE).iterdir()} == EXECUTABLES
    assert (prefix / 'share/ament_index/resource_index/packages' / PACKAGE).is_file()
    assert {'package.xml', 'LICENSE', 'config', 'launch', 'models'} <= {path.name for path in share.iterdir()}
    source = colcon_workspace / 'src' / PACKAGE
    for folder in ('config', 'launch', 'models'):
        files = {path.relative_to(source) for path in (source / folder).rglob('*') if path.is_file()}
        files = {path for path in files if path.name != 'checkpoint.safetensors'}
        assert files
        assert files == {path.relative_to(share) for path in (share / folder).rglob('*') if path.is_file()}


@pytest.mark.slow
def test_colcon_install_runs_on_its_own_files(colcon_workspace, tmp_path):
    environment = colcon_environment(colcon_workspace)
    prefix = colcon_workspace / 'install' / PACKAGE
    code = (
        'from decoupled_policy_ros.resources import share_dir\n'
        'from decoupled_policy_ros.robot.description import load_robot\n'
        'print(share_dir())\nprint(load_robot("panda_sim").name)\n'
    )
    printed = run([sys.executable, '-c', code], tmp_path, environment).splitlines()
    assert printed == [str(prefix / 'share' / PACKAGE), 'panda_sim']
    assert 'evaluate' in run(
        [str(prefix / 'lib' / PACKAGE / 'decoupled-policy'), '--help'], tmp_path, environment
    )


@pytest.mark.slow
def test_colcon_test_runs_its_tests(colcon_workspace):
    run([sys.executable, '-m', 'colcon', 'test', '--pytest-args', *LIGHT_TESTS], colcon_workspace)
    result = run([sys.executable, '-m', 'colcon', 'test-result', '--verbose'], colcon_workspace)
    summary = re.search(r'Summary: (\d+) tests, 0 errors, 0 failures, 0 skipped', result)
    assert summary and int(summary[1]) > 10, result


@pytest.mark.slow
def test_pip_installs_it_into_a_prefix_of_its_own(copied_tree, tmp_path):
    venv = tmp_path / 'venv'
    python = venv / 'bin' / 'python'
    pip = [sys.executable, '-m', 'pip', '-q']
    run([*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', str(tmp_path), str(copied_tree)], tmp_path)
    (wheel,) = tmp_path.glob('*.whl')
    run([sys.executable, '-m', 'venv', '--without-pip', str(venv)], tmp_path)
    run([*pip, '--python', str(python), 'install', '--no-deps', '--no-index', str(wheel)], tmp_path)
    # The dependencies are those of the environment that runs the tests.
    dependencies = Path(tyro.__file__).parents[1]
    site = next(venv.glob('lib/python3*/site-packages'))
    (site / 'dependencies.pth').write_text(f'import site; site.addsitedir({str(dependencies)!r})\n')

    assert {path.name for path in (venv / 'bin').iterdir()} >= EXECUTABLES
    share = venv / 'share' / PACKAGE
    code = 'from decoupled_policy_ros.resources import share_dir; print(share_dir())'
    assert run([str(python), '-c', code], tmp_path).strip() == str(share)
    assert (share / 'config/robots/fr3.yaml').is_file()
    assert 'evaluate' in run([str(venv / 'bin' / 'decoupled-policy'), '--help'], tmp_path)


@pytest.mark.parametrize(('distribution', 'wheels'), [('', True), ('jazzy', False)])
def test_make_installs_ros_wheels_only_where_no_ros_is_sourced(copied_tree, distribution, wheels):
    # This interpreter imports rclpy, as the system's does after sourcing ROS; -n prints what would be run.
    plan = run(['make', '-n', 'venv', f'ROS_DISTRO={distribution}', f'PYTHON={sys.executable}'], copied_tree)
    assert ("'.[ros,sim,train,dev]'" in plan) == wheels
    assert ("'.[sim,train,dev]'" in plan) != wheels
    assert ('--system-site-packages' in plan) != wheels


def test_system_packages_are_named_in_one_line(repository, tmp_path):
    # A Python without the libraries, for a user who may not install them: an interpreter that says no to all.
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\ncase "$2" in *version_info*) exit 0;; *) exit 1;; esac\n')
    identity = tmp_path / 'id'
    identity.write_text('#!/bin/sh\necho 1000\n')
    for script in (python, identity):
        script.chmod(0o755)
    environment = clean_environment() | {'PYTHON': str(python), 'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
    result = subprocess.run(
        [str(repository / 'scripts/system_packages.sh')],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert result.stderr.count('\n') == 1
    assert 'sudo apt-get install libegl1 libegl-mesa0 libgl1' in result.stderr
