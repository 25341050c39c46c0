"""ament_python package: `colcon build`, `pip install .[ros,sim,train,dev]` or `make`."""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = 'decoupled_policy_ros'
HERE = Path(__file__).resolve().parent
SHARED_FOLDERS = ('config', 'launch', 'models')
NOT_INSTALLED = ('checkpoint.safetensors',)  # a training run's own, thrice the size of what it trains
TEST = [
    'diffusers>=0.30',
    'h5py>=3.10',
    'hypothesis>=6.100',
    'pytest>=8',
    'pytest-timeout>=2.3',
    'sentence-transformers>=3',
    'tensorboard>=2.13',
]


def data_files():
    """Pair each installed folder with its files: index marker, package.xml, config/, launch/, models/."""
    share = Path('share') / PACKAGE
    pairs = [
        ('share/ament_index/resource_index/packages', [f'resource/{PACKAGE}']),
        (str(share), ['package.xml', 'LICENSE']),
    ]
    folders = [
        folder for name in SHARED_FOLDERS for folder in [HERE / name, *sorted((HERE / name).rglob('*'))]
    ]
    for folder in folders:
        if not folder.is_dir() or folder.name == '__pycache__':
            continue
        files = [
            path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in NOT_INSTALLED
        ]
        if files:
            target = (share / folder.relative_to(HERE)).as_posix()
            pairs.append((target, [path.relative_to(HERE).as_posix() for path in files]))
    return pairs


setup(
    name=PACKAGE,
    version='0.1.0',
    description='Decoupled visuomotor policies for ROS 2 arms: one frozen action backbone, small task files.',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8')
    if (HERE / 'README.md').is_file()
    else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    maintainer='decoupled_policy_ros maintainers',
    maintainer_email='decoupled-policy-ros@example.org',
    python_requires='>=3.10',
    packages=find_packages(include=[PACKAGE, f'{PACKAGE}.*']),
    data_files=data_files(),
    zip_safe=False,
    # ROS's own packages (cv_bridge, ros2_numpy, launch, ...) are in package.xml: PyPI's namesakes are not them.
    install_requires=[
        'filelock>=3',
        'mcap>=1.6',
        'numpy>=1.26,<2.3',
        'opencv-python',
        'pyarrow>=15',
        'pyyaml',
        'rich>=13',
        'rosbags>=0.11',
        'safetensors>=0.4',
        'scipy>=1.11',
        'torch>=2.6',
        'transformers>=4.45',
        'tyro>=0.9',
        'zstandard',
    ],
    extras_require={
        # What a ROS installation has (rosdep installs its Pinocchio), as wheels for a machine without one.
        # Pinocchio's wheels ask for NumPy 2, ROS's compiled packages on Ubuntu 24.04 for NumPy 1.26.
        'ros': [
            'coal>=3',  # finds collisions
            'pin>=3.4',  # the first that was tried with coal
            'ros-jazzy-ament-index-python',
            'ros-jazzy-common-interfaces',
            'ros-jazzy-lifecycle-msgs',
            'ros-jazzy-rclpy',
            'ros-jazzy-rmw-fastrtps-cpp',
        ],
        'sim': ['av>=16', 'mujoco==3.3.0', 'robosuite==1.4.1'],
        'train': ['accelerate>=1.0', 'av>=16', 'matplotlib>=3.8', 'pydantic>=2.5'],
        'datasets': ['h5py>=3.10'],  # robomimic, MimicGen and LIBERO files
        'cluster': ['ray>=2.9'],  # convert --ray, evaluate --ray
        'language': ['sentence-transformers>=3'],
        'test': TEST,  # colcon test looks for pytest in an extra of this name
        'dev': [
            *TEST,
            'colcon-common-extensions',
            'colcon-ros',
            'mypy>=1.10',
            'pytest-xdist>=3',
            'ruff>=0.6',
            'setuptools<80',  # colcon-core's limit; torch alone would pull a newer one
            'threadpoolctl>=3',
            'types-PyYAML',
        ],
    },
    entry_points={
        'console_scripts': [
            'policy_node = decoupled_policy_ros.nodes.policy_node:main',
            'teleop_node = decoupled_policy_ros.nodes.teleop_node:main',
            'kinematics_recorder_node = decoupled_policy_ros.nodes.kinematics_recorder_node:main',
            'episode_recorder_node = decoupled_policy_ros.nodes.episode_recorder_node:main',
            'command_guard_node = decoupled_policy_ros.nodes.command_guard_node:main',
            'coverage_node = decoupled_policy_ros.nodes.coverage_node:main',
            'sim_robot_node = decoupled_policy_ros.nodes.sim_robot_node:main',
            'decoupled-policy = decoupled_policy_ros.cli:main',
        ],
    },
)
