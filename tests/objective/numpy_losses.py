"""Each loss again in numpy, from its paper: teacher p and student q, over the columns that are kept."""

import numpy as np


def kl(p, q):
    return (p * np.log(p / q)).sum()


def reverse(q, m):
    return kl(q, m) - q.sum() + m.sum()


def jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def head_share(p, q, mu):
    order = np.argsort(-p)
    head = np.cumsum(p[order]) <= mu
    head[0] = True
    gap = np.abs(p - q)[order]
    return gap[head].sum() / gap.sum()


def akl(p, q, mu):
    share = head_share(p, q, mu)
    return share * kl(p, q) + (1 - share) * reverse(q, p)


def mse(p, q):
    z, y = np.log(p), np.log(q)
    return np.mean(((y - y.mean()) - (z - z.mean())) ** 2)


# Each loss again in numpy, from its paper: teacher p and student q, over the columns that are kept.
NUMPY = {
    "fkl": kl,
    "rkl": lambda p, q: reverse(q, p),
    "jsd": jsd,
    "akl": akl,
    "skl": lambda p, q, alpha: kl(p, alpha * p + (1 - alpha) * q),
    "srkl": lambda p, q, alpha: reverse(q, alpha * q + (1 - alpha) * p),
    "tvd": lambda p, q: 0.5 * np.abs(p - q).sum(),
    "mse": mse,
    "nll": lambda p, q: -(p * np.log(q)).sum(),
}
