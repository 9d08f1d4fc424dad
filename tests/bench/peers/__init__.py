"""This program beside what people would use instead: `python -m tests.bench.peers`."""
