"""The verb of `decoupled-policy` that tries policies in the simulator."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from decoupled_policy_ros.errors import ConfigError

if TYPE_CHECKING:
    from decoupled_policy_ros.sim.benchmarks import Protocol
    from decoupled_policy_ros.training.rollout import Evaluation


@dataclass(frozen=True)
class EvaluateOptions:
    """How policies are evaluated, and what is kept of it.

    Attributes:
        episodes: of each policy in each task, seeded seed, seed + 1, ...; 50 by default.
        seed: of the first scene; 0 by default, 100000 for MimicGen as in the literature.
        backbone: folder or name; the one that the task names by default.
        robot: robot description; panda_sim, ur5e_sim, iiwa_sim or kinova3_sim.
        denoising_steps: of a chunk; 10 by default, 100 for MimicGen.
        sampler: ddim or ddpm for a backbone of diffusion, euler for one of flow matching; the first by default, and
            ddpm for MimicGen.
        checkpoint: last weights of a policy, or the best in its folder `best`; last by default, best for MimicGen.
        instruction: what a policy with language is told; by default what each simulated task is about.
        guard: send chunks through the guard, with its defaults for the robot.
        inpaint: begin each chunk with what has been executed; see docs/timing.md.
        blend: waypoints after that which are drawn towards the motion under way.
        ensemble: decay of temporal ensembling, such as 0.01; none by default.
        samples: chunks that are drawn of each observation, of which one is followed.
        shared_noise: denoise all waypoints of a chunk from the same noise; for dp_mlp.
        workers: processes; one per core by default. On a cluster its CPUs decide.
        lanes: episodes that a process plays at a time, their chunks denoised together; 8 by default, 1 with pictures.
        ray: address of a Ray cluster whose machines share this file system; local for one on this machine.
        json: write the numbers here.
        video: film the first 5 episodes of the first policy into this file.
        report: new folder for report.html, report.md, report.json, plots and films.
        films: first episodes of each policy and task that the report has films of.
        paired: the first policy does the first task only, the second the second, and so on, around again for more
            policies (of other training seeds); for a benchmark with a policy for each of its tasks.
    """

    episodes: int | None = None
    seed: int | None = None
    backbone: str | None = None
    robot: str = 'panda_sim'
    denoising_steps: int | None = None
    sampler: str | None = None
    checkpoint: Literal['last', 'best'] | None = None
    instruction: str | None = None
    guard: bool = False
    inpaint: bool = False
    blend: int = 4
    ensemble: float | None = None
    samples: int = 1
    shared_noise: bool = False
    workers: int | None = None
    lanes: int | None = None
    ray: str | None = None
    json: Path | None = None
    video: Path | None = None
    report: Path | None = None
    films: int = 3
    paired: bool = False


def evaluate(
    policy: tuple[str, ...],
    task: tuple[str, ...],
    options: Annotated[EvaluateOptions, tyro.conf.arg(name='')] = EvaluateOptions(),
) -> None:
    """Run policies in the closed loop with the simulator, and report success with a 95 % Wilson interval.

    With several policies (of several training seeds, say) or tasks each policy does each task, unless they are paired,
    and the report has a summary over the policies of a task and over the tasks of a benchmark besides.

    Args:
        policy: task folders, or names in models/tasks.
        task: lift, stack, stack_green, lift_red, lift_green, square, can, detour, a whole benchmark (mimicgen,
            libero_spatial, libero_object, libero_goal, libero_10) or a task of it (mimicgen/stack_d1, libero_goal/3).
        options: how.
    """
    from decoupled_policy_ros.files import require_file_name, whole_folder, write_json
    from decoupled_policy_ros.sim.benchmarks import common_protocol, expanded
    from decoupled_policy_ros.training.evaluation import Films, evaluate_all, require_unchanged

    if options.report is not None:  # now, and not after an hour of episodes: it needs a plotting library
        from decoupled_policy_ros.training.evaluation_report import VIDEOS, write_report
    if options.json is not None:
        require_file_name(options.json)
    if not task:
        raise ConfigError('no task is given; name some after --task, such as lift')
    if options.films < 0:
        raise ConfigError(f'films must be at least 0, got {options.films}')
    tasks = expanded(task)
    asked: dict[str, Any] = {
        'checkpoint': options.checkpoint,
        'episodes': options.episodes,
        'seed': options.seed,
        'denoising_steps': options.denoising_steps,
        'sampler': options.sampler,
    }
    how = replace(common_protocol(tasks), **{key: value for key, value in asked.items() if value is not None})
    specs = [_spec(p, t, how, options) for p, t in _pairs(policy, tasks, options.paired)]
    with nullcontext() if options.report is None else whole_folder(options.report) as folder:
        films = Films(folder / VIDEOS, options.films) if folder is not None else None
        evaluation = evaluate_all(
            specs, how.episodes, how.seed, options.workers,
            video=options.video, lanes=options.lanes, ray=options.ray, films=films,
        )  # fmt: skip
        if options.json is not None:
            write_json(options.json, evaluation if len(specs) > 1 else evaluation['reports'][0])
        if folder is not None:
            write_report(evaluation, folder)
    _print_success(evaluation)
    if options.report is not None:
        Console().print(f'{options.report / "report.html"}', soft_wrap=True, markup=False)
    require_unchanged(evaluation['reports'])  # at the end: those of the others are good


def _pairs(policies: Sequence[str], tasks: Sequence[str], paired: bool) -> list[tuple[str, str]]:
    """Which policy does which task."""
    if not paired:
        return [(policy, task) for policy in policies for task in tasks]
    if len(policies) % len(tasks):
        raise ConfigError(
            f'--paired takes one policy for each of the {len(tasks)} tasks, or a multiple of that; got {len(policies)}'
        )
    return list(zip(policies, itertools.cycle(tasks), strict=False))


def _spec(policy: str, task: str, how: Protocol, options: EvaluateOptions) -> Evaluation:
    from decoupled_policy_ros.runtime.joining import JoinSettings
    from decoupled_policy_ros.training.rollout import Evaluation

    return Evaluation(
        policy,
        task,
        options.backbone,
        options.robot,
        how.denoising_steps,
        checkpoint=how.checkpoint,
        sampler=how.sampler,
        instruction=options.instruction,
        guard=options.guard,
        join=JoinSettings(options.inpaint, options.blend, options.ensemble, options.samples),
        shared_noise=options.shared_noise,
    )


def _print_success(evaluation: dict[str, Any]) -> None:
    """One line for each task, over all policies that did it."""
    for row in evaluation['summary']:
        low, high = row['wilson_95']
        Console().print(
            f'{", ".join(row["policies"])} on {row["task"]}: {row["successes"]} of {row["episodes"]} episodes '
            f'succeeded ({row["success_rate"]:.0%}, 95 % interval {low:.0%} to {high:.0%})',
            soft_wrap=True,
            markup=False,
        )
