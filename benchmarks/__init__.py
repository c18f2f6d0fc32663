"""Measurements, each a module that runs by itself; `python -m benchmarks.bench` sets peftctl beside its peers."""
