"""One file per claim of speed; each compares its sides in one run, alternating, and prints medians as a Markdown table."""
