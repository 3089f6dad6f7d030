"""PyTorch state dicts of ResNets, as the golden files hold them, into our variables."""

import re

import numpy as np


def resnet_variables(state_dict):
    """{torch name: array} -> ({"params", "batch_stats"}, weights of `branch4` [in, out] or None).

    `branch1` to `branch3` are parameters of the released code's networks that nothing reads.
    """
    params, stats, branch = {}, {}, None
    for name, array in state_dict.items():
        if name.endswith("num_batches_tracked") or re.match("branch[123]", name):
            continue
        if name == "branch4.weight":
            branch = array[:, :, 0, 0].T
        elif name.startswith("fc"):
            leaf, value = ("bias", array) if name.endswith("bias") else ("kernel", array.T)
            params.setdefault("classifier", {})[leaf] = value
        else:
            path, collection, leaf, value = _unit(name, array)
            target = {"params": params, "batch_stats": stats}[collection]
            for key in path:
                target = target.setdefault(key, {})
            target[leaf] = value
    return {"params": params, "batch_stats": stats}, branch


def _unit(name, array):
    """Path of the ConvBatchNorm that a tensor belongs to, its collection, its name there, its value."""
    prefix, _, leaf = name.rpartition(".")
    path = []
    if match := re.match(r"layer(\d)\.(\d+)\.(.*)", prefix):
        path.append(f"stage{match[1]}_block{int(match[2]) + 1}")
        prefix = match[3]
        path.append("downsample" if prefix.startswith("downsample") else "conv" + prefix[-1])
    else:
        path.append("stem")
    if prefix.startswith("conv") or prefix == "downsample.0":
        return path, "params", "kernel", np.transpose(array, (2, 3, 1, 0))
    leaf = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}[leaf]
    return path, "batch_stats" if leaf in ("mean", "var") else "params", leaf, array
