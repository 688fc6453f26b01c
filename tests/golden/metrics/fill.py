"""Named rule 'sorted-normal-v1': fills any state_dict deterministically (numpy + torch only).

One RandomState(seed) stream is consumed over the keys in sorted() order. Keys with integer
dtype (num_batches_tracked) are set to 0 and draw nothing. Every other key draws
z = rs.standard_normal(shape) (float64, C order) and stores, as float32:
  *.running_var                  0.6 + 0.5 * |z|
  *.running_mean                 0.1 * z
  1-d *.weight (norm scale)      1.0 + 0.1 * z
  1-d *.bias                     0.1 * z
  >=2-d weight                   z * sqrt(2 / fan_in),  fan_in = prod(shape[1:])
"""

import numpy as np


def value(key, shape, rs):
    z = rs.standard_normal(tuple(shape))
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_var":
        v = 0.6 + 0.5 * np.abs(z)
    elif leaf == "running_mean":
        v = 0.1 * z
    elif len(shape) >= 2:
        v = z * np.sqrt(2.0 / np.prod(shape[1:]))
    elif leaf == "weight":
        v = 1.0 + 0.1 * z
    else:
        v = 0.1 * z
    return v.astype(np.float32)


def fill(shapes, seed):
    """shapes: {key: list} ; an entry whose key ends in num_batches_tracked becomes int64 0."""
    rs = np.random.RandomState(seed)
    out = {}
    for k in sorted(shapes):
        if k.endswith("num_batches_tracked"):
            out[k] = np.zeros(tuple(shapes[k]), np.int64)
        else:
            out[k] = value(k, shapes[k], rs)
    return out


def clip(seed, shape):
    """float32 video in [-1, 1): RandomState(seed).random_sample(shape) * 2 - 1, lightly smoothed in time.

    x[:, :, t] = 0.5 * u[t] + 0.5 * u[t-1] (t>0) keeps values in [-1,1) and gives frames some correlation.
    """
    u = np.random.RandomState(seed).random_sample(tuple(shape)) * 2.0 - 1.0
    x = u.copy()
    x[:, :, 1:] = 0.5 * u[:, :, 1:] + 0.5 * u[:, :, :-1]
    return x.astype(np.float32)
