"""Benchmarks, one module per claim or question. Variants alternate within one run; results are medians in Markdown tables."""
