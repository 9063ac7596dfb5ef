"""The report on runs: figures, a summary and one HTML page, from what a run folder holds."""
