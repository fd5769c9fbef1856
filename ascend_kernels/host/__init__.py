"""Runs the AscendC operators without CANN: kernels by harness.py, their tiling and infer functions by tiling.py."""
