"""Trackers: programs that plot a run's metrics, next to metrics.jsonl."""
