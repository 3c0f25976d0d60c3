"""How the recorded numbers were made: deterministic weights and batches, from numpy alone.

Every tensor is drawn from its own PCG64 stream, seeded by the CRC-32 of ``salt + name``, so that the same values can be
rebuilt anywhere without storing them. The files beside this one hold what the original VLMo code computes for these
weights and inputs in float32 on a CPU (eval mode, drop_path_rate 0, batch of two); ``salt`` is "" for all of them.
"""

import zlib

import numpy as np


def stream(name):
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def uniform(name, shape, low=-1.0, high=1.0):
    """float32 array of `shape`, uniform in [low, high), from the stream called `name`."""
    count = int(np.prod(shape)) if len(shape) else 1
    return (low + (high - low) * stream(name).random(count)).astype(np.float32).reshape(shape)


def weight(name, shape, salt=""):
    """The value of the state-dict entry `name`."""
    u = uniform(salt + name, shape)
    if name.endswith(("logit_scale", "logit_vl_scale")):
        return np.float32(2.0) + 0.1 * u
    if "gamma_" in name:
        return 0.1 + 0.05 * u
    if "relative_position_bias_table" in name:
        return 0.5 * u
    owner = name.split(".")[-2] if "." in name else ""
    if name.endswith(".weight") and ("norm" in owner.lower() or (owner == "1" and "classifier" in name)):
        return 1.0 + 0.1 * u
    return (0.035 if len(shape) >= 2 else 0.05) * u


def text(batch_size, length, salt="", vocab_size=30522):
    """ids, mask, ids with [MASK], labels: int64 arrays (batch_size, length); labels are -100 where not masked."""
    r = stream(salt + "text")
    ids = np.zeros((batch_size, length), np.int64)
    mask, masked = np.zeros_like(ids), np.zeros_like(ids)
    labels = np.full_like(ids, -100)
    for b in range(batch_size):
        n = int(r.integers(6, length + 1))
        ids[b, 0] = 101
        ids[b, 1 : n - 1] = r.integers(1000, vocab_size, n - 2)
        ids[b, n - 1] = 102
        mask[b, :n] = 1
        masked[b] = ids[b]
        for p in range(1, n - 1):
            if r.random() < 0.3 or p == 1:
                labels[b, p] = ids[b, p]
                masked[b, p] = 103
    return ids, mask, masked, labels


def batch(config, batch_size=2, salt=""):
    """numpy batch for a resolved config (see facts/named_configs.json); images are float32 (B, 3, S, S) in [-1, 1)."""
    ids, mask, masked, labels = text(batch_size, config["max_text_len"], salt)
    out = {
        "text_ids": ids,
        "text_masks": mask,
        "text_ids_mlm": masked,
        "text_labels_mlm": labels,
        "text_labels": np.full_like(ids, -100),
    }
    shape = (batch_size, 3, config["image_size"], config["image_size"])
    names = ["image_0", "image_1"] if config["loss_names"]["nlvr2"] else ["image"]
    out.update({n: uniform(salt + n, shape) for n in names})
    if config["loss_names"]["nlvr2"]:
        out["answers"] = [bool(i % 2) for i in range(batch_size)]
        out["table_name"] = ["nlvr2_train"] * batch_size
    if config["loss_names"]["vqa"]:
        out["vqa_labels"] = [[3, 77, 3000], [12]][:batch_size]
        out["vqa_scores"] = [[1.0, 0.3, 0.6], [0.9]][:batch_size]
    return out
