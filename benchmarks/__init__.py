"""One file per claim of speed; sides are compared in one run, alternating, and a Markdown table tells medians."""
