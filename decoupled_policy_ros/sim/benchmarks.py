"""MimicGen's eight tasks and LIBERO's four suites, where their own packages are installed.

A thin layer: their scenes, starts and success checks are theirs, this gives them the interface of the other
tasks. Names are `mimicgen/<task>` and `libero_<suite>/<number>`; LIBERO's numbers follow its task order 0.
Horizons, numbers of rollouts, seeds, samplers and steps of waiting are those of the public code of "Decoupled Action
Expert" (arXiv 2511.12101). Both packages run on robosuite 1.4; neither is on PyPI as a whole (MimicGen's name there
belongs to somebody else, LIBERO's package has no meshes), so the tests use packages of the same shape; what was tried
with theirs is in docs/simulation.md.
"""

from __future__ import annotations

import codecs
import functools
import importlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.errors import ConfigError, SimulationError
from decoupled_policy_ros.sim.tasks import SimTask, sim_task


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is evaluated.

    Attributes:
        checkpoint: which weights, 'last' or 'best'.
        episodes: of each task.
        seed: of the first scene; those of the others count up from it.
        denoising_steps: of a chunk.
        sampler: None for the backbone's first.
    """

    checkpoint: str
    episodes: int
    seed: int
    denoising_steps: int = 10
    sampler: str | None = None


MIMICGEN_PROTOCOL = Protocol('best', 50, 100_000, 100, 'ddpm')
#: 50 episodes, each from its own fixed start, of each of a suite's 10 tasks: 500 of a suite.
LIBERO_PROTOCOL = Protocol('last', 50, 0)
#: What is done where no benchmark says otherwise.
OWN_PROTOCOL = Protocol('last', 50, 0)
#: Training seeds over which both benchmarks report mean and deviation.
TRAINING_SEEDS = (0, 42, 420)

#: Task -> (environment, steps, instruction). MimicGen has no words for its tasks; these are ours.
MIMICGEN = {
    'stack_d1': ('Stack_D1', 270, 'stack the red cube on the green cube'),
    'square_d2': ('Square_D2', 383, 'put the square nut on the square peg'),
    'coffee_d2': ('Coffee_D2', 560, 'put the pod into the coffee machine and close its lid'),
    'threading_d2': ('Threading_D2', 568, 'thread the needle through the ring of the tripod'),
    'stack_three_d1': ('StackThree_D1', 638, 'stack the red cube on the green cube and the blue cube on top'),
    'hammer_cleanup_d1': ('HammerCleanup_D1', 715, 'put the hammer into the drawer and close the drawer'),
    'three_piece_assembly_d2': ('ThreePieceAssembly_D2', 838, 'assemble the three pieces'),
    'mug_cleanup_d1': ('MugCleanup_D1', 845, 'put the mug into the drawer and close the drawer'),
}
LIBERO_STEPS = {'libero_spatial': 280, 'libero_object': 280, 'libero_goal': 300, 'libero_10': 520}
LIBERO_TASKS, LIBERO_STARTS = 10, 50


def protocol(name: str) -> Protocol:
    """How a task is evaluated where nobody says otherwise.

    Raises:
        SimulationError: there is no such task.
    """
    if '/' not in name:
        sim_task(name)
        return OWN_PROTOCOL
    suite, _ = _split(name)
    return MIMICGEN_PROTOCOL if suite == 'mimicgen' else LIBERO_PROTOCOL


def require_scenes(name: str, seeds: range) -> None:
    """Refuse scenes that there are not: LIBERO evaluates a task from fixed starts, and from no others.

    Raises:
        ConfigError: a seed below 0 or above 2^32 - 1, or one that is no fixed start.
    """
    fixed = name.partition('/')[0] in LIBERO_STEPS
    if seeds.start < 0 or seeds.stop > (LIBERO_STARTS if fixed else 2**32):
        valid = (
            f'{name} has the fixed starts 0 to {LIBERO_STARTS - 1}' if fixed else 'a seed is in 0 .. 2^32 - 1'
        )
        raise ConfigError(f'{valid}, got scenes {seeds.start} to {seeds.stop - 1}')


def common_protocol(names: Sequence[str]) -> Protocol:
    """How several tasks are evaluated at once.

    Raises:
        SimulationError: see `protocol`.
        ConfigError: there are none, or they are evaluated in different ways.
    """
    protocols = {protocol(name): name for name in names}
    if len(protocols) != 1:
        different = ' and '.join(protocols.values()) or 'no task'
        raise ConfigError(
            f'{different} can not be evaluated at once: their scenes, numbers of episodes or weights differ'
        )
    return next(iter(protocols))


def expanded(names: str | Sequence[str]) -> tuple[str, ...]:
    """The tasks that a name, or each of several, stands for: a benchmark's all of its tasks, any other itself."""
    if not isinstance(names, str):
        return tuple(task for name in names for task in expanded(name))
    if names == 'mimicgen':
        return tuple(f'mimicgen/{task}' for task in MIMICGEN)
    return tuple(f'{names}/{number}' for number in range(LIBERO_TASKS)) if names in LIBERO_STEPS else (names,)


def benchmark_task(name: str) -> SimTask:
    """The task of that name; LIBERO's instructions come from its package.

    Raises:
        SimulationError: unknown name, or the benchmark's package isn't installed.
    """
    suite, task = _split(name)
    if suite == 'mimicgen':
        environment, max_steps, instruction = MIMICGEN[task]
        return SimTask(name, environment, None, instruction, max_steps, suite=suite, settle_steps=0)
    language = _libero_suite(suite).get_task(int(task)).language
    return SimTask(name, name, None, language, LIBERO_STEPS[suite], suite=suite)


def _split(name: str) -> tuple[str, str]:
    suite, _, task = name.partition('/')
    if suite == 'mimicgen' and task in MIMICGEN:
        return suite, task
    if suite in LIBERO_STEPS and task in map(str, range(LIBERO_TASKS)):
        return suite, task
    valid = [f'mimicgen/{task}' for task in MIMICGEN]
    valid += [f'{suite}/0..{LIBERO_TASKS - 1}' for suite in LIBERO_STEPS]
    raise SimulationError(f'unknown benchmark task {name!r}, valid: {", ".join(valid)}')


def make_benchmark_environment(task: SimTask, settings: dict[str, Any]) -> Any:
    """The benchmark's environment of a task; `settings` are robosuite's.

    Raises:
        SimulationError: the package isn't installed, has no such environment, or lacks a mesh or texture of it.
    """
    try:
        return _environment(task, settings)
    except (OSError, ValueError) as error:  # MuJoCo's for a file that it can't open
        raise SimulationError(f'{task.name}: its scene can not be built: {error}') from error


def _environment(task: SimTask, settings: dict[str, Any]) -> Any:
    if task.suite == 'mimicgen':
        _import('mimicgen', task.name)
        base = importlib.import_module('robosuite.environments.base')
        if task.environment not in base.REGISTERED_ENVS:
            raise SimulationError(
                f'{task.name}: the installed package mimicgen has registered no environment {task.environment}; '
                'it has to be the one of github.com/NVlabs/mimicgen, with robosuite_task_zoo for hammer_cleanup'
            )
        return importlib.import_module('robosuite').make(task.environment, **settings)
    envs = _import('libero.libero.envs', task.name)
    parser = _import('libero.libero.envs.bddl_utils', task.name)
    suite, number = _split(task.name)
    bddl = _libero_suite(suite).get_task_bddl_file_path(int(number))
    if not os.path.isfile(bddl):
        raise SimulationError(f'{task.name}: LIBERO is installed without its file {bddl}')
    problem = envs.TASK_MAPPING[parser.get_problem_info(bddl)['problem_name']]
    # As LIBERO's own wrapper does it: the arm begins where the fixed start has it, without noise.
    ours = {'robots': [settings['robots']], 'initialization_noise': None}
    return problem(bddl_file_name=bddl, **{**settings, **ours})


def set_start(task: SimTask, env: Any, seed: int) -> None:
    """Put the scene of a LIBERO task into the fixed start number `seed`.

    With a seed that has none, as those of validation, it stays where the benchmark's own chance put it, as with all
    other tasks.

    Raises:
        SimulationError: LIBERO's file of starts can't be read.
    """
    if not task.suite.startswith('libero'):
        return
    states = _starts(task.name)
    if seed < len(states):
        env.sim.set_state_from_flattened(states[seed])
        env.sim.forward()


@functools.lru_cache(maxsize=1)
def _starts(name: str) -> NDArray[np.float64]:
    """States (n, dim) that a task's episodes start from."""
    suite, number = _split(name)
    try:
        with _numpy_allowed():
            return np.asarray(_libero_suite(suite).get_task_init_states(int(number)), float)
    except Exception as error:  # LIBERO reads its files with whatever torch is installed
        raise SimulationError(
            f'{name}: LIBERO could not read its fixed starts: {" ".join(str(error).split())[:200]}'
        ) from error


def _numpy_allowed() -> AbstractContextManager[Any]:
    """Let torch read arrays of numbers, and nothing else, from the files that LIBERO gives it.

    Since 2.6 it reads tensors only unless told otherwise; the starts are arrays of numpy, saved by numpy 1.
    """
    serialization = importlib.import_module('torch').serialization
    reconstruct = np.zeros(1).__reduce__()[0]
    names = ('numpy.core.multiarray._reconstruct', 'numpy._core.multiarray._reconstruct')  # numpy 1 and 2
    functions = [(reconstruct, name) for name in names]
    return serialization.safe_globals(
        [*functions, np.ndarray, np.dtype, type(np.dtype(float)), codecs.encode]
    )


@functools.lru_cache(maxsize=1)
def _libero_suite(suite: str) -> Any:
    return _import('libero.libero.benchmark', suite).get_benchmark_dict()[suite]()


def _import(module: str, task: str) -> Any:
    package = module.partition('.')[0]
    source = {
        'mimicgen': 'github.com/NVlabs/mimicgen', 'libero': 'github.com/Lifelong-Robot-Learning/LIBERO',
    }  # fmt: skip
    try:
        return importlib.import_module(module)
    except EOFError as error:
        raise SimulationError(
            f'{task}: LIBERO asks where its data shall lie when it is first imported: '
            "run python -c 'import libero.libero' once"
        ) from error
    except ImportError as error:
        raise SimulationError(
            f'{task} needs the package {package} of {source[package]}, which is not installed here ({error})'
        ) from error
