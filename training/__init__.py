"""Training: the loop, moving averages, schedules, and the small systems the embedded default stands on."""
