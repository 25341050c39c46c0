"""One error tree. A message names the bad value and what would have been valid.

Everything a user can cause derives from :class:`DecoupledPolicyError`; the command line prints its
message without a traceback, nodes log it.
"""


class DecoupledPolicyError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(DecoupledPolicyError):
    """A configuration file or argument has an unknown key, a wrong type or a value out of range."""


class RobotDescriptionError(DecoupledPolicyError):
    """A robot description lacks a frame, a joint or a limit, or can't be found or parsed."""


class FingerprintMismatch(DecoupledPolicyError):
    """Two kinematic fingerprints that must be equal differ; the message holds both values."""


class MessageError(DecoupledPolicyError):
    """A message can't be turned into an array: unknown encoding, wrong size, missing joint, NaN."""


class ObservationError(DecoupledPolicyError):
    """No valid observation exists for the time asked for. Nothing is ever filled in."""

    def __init__(
        self, message: str, *, stream: str, age_s: float | None = None, limit_s: float | None = None
    ):
        super().__init__(message)
        self.stream = stream
        self.age_s = age_s
        self.limit_s = limit_s


class StreamMissing(ObservationError):
    """A stream of the contract has no sample at or before the time asked for."""


class StreamStale(ObservationError):
    """A stream's latest sample is older than the contract allows."""


class StreamSkewed(ObservationError):
    """Two streams' samples are further apart in time than the contract allows."""


class CheckpointError(DecoupledPolicyError):
    """A backbone or task file is truncated, altered, incomplete or belongs to another partner."""


class DatasetError(DecoupledPolicyError):
    """A dataset or recording can't be read, or does not fit what it is used for."""


class TrainingError(DecoupledPolicyError):
    """Training can't go on: the frozen backbone changed, a loss is not finite, a resume does not fit."""


class EvaluationError(DecoupledPolicyError):
    """Episodes of an evaluation could not be played; the message names policy, task, seeds and the reason."""


class SimulationError(DecoupledPolicyError):
    """The simulator or its renderer can't start; the message names what to install."""


class ChunkExhausted(DecoupledPolicyError):
    """A chunk was asked for a time past its last waypoint or before its first."""


class InferenceError(DecoupledPolicyError):
    """The network's output is not a usable chunk, for example not finite."""
