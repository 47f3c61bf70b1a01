"""What runs in an actor: images of some lanes and parts, class means, a model, the classifiers.

Input: decoded tables, a shard each. Output: counts, epoch records and scored parts. Invariant: which actor holds which
lanes changes no bit of the results. The modules may import torch, except the table of classifiers and
`exchange`, which the driver reads.
"""
