"""The guard: every motion is checked before the arm is told of it."""
