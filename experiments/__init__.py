"""What is claimed of the networks, and what was run for it; benchmarks/ is about speed."""
