"""The parts of ``python -m benchmarks.survey``: which models, what of each, and the page."""
