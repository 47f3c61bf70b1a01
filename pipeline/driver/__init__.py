"""The driver: the one process that connects to Ray and steers a job.

Input: a `Config`. Output: the result files. Invariant: it holds references, counts, means and parameters, never pixels,
and names of images only for class folders; no other room imports Ray.
"""
