"""What a run reports: phase times, live progress, metrics, rollout files, traces. Effects only, no arithmetic."""
