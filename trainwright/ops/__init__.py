"""Kernels, each with a plain-torch twin that tests compare it to. Import from the file of the kernel you need.

attention/: one function, several backends. linear_cross_entropy: the chunked loss. norm, rotary, activation: the small
ones. cpu_runtime: process settings for training on a CPU.
"""
