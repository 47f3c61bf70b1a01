"""Bytes of image files to uint8 tensors of one size and mode, shard by shard.

Input: a shard's rows of the listing. Output: a table of tensors, a table of skipped images and the digests of
the pixels. Invariant: every image is in exactly one of the two tables, and the same from a folder, an archive or the
cache.
"""
