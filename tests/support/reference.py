"""VOGN written slowly, from its equations: one example at a time, on plain dicts of tensors."""

from __future__ import annotations

import torch
from torch.func import functional_call


def reference_vogn(
    net, loss, batches, noises, *, dataset_size, lr, beta1, precision_lr, prior_mean, prior_precision,
    init_precision, temperature, damping,
):  # fmt: skip
    """Yield the posterior's (mean, precision), two dicts by parameter name, after each step.

    Args:
        net: An ordinary network; its parameters are the first means.
        loss: Function of (output, y) for a batch, here of one example.
        batches: One (x, y) per step.
        noises: Per step a list of draws, each a dict of standard normal values by parameter name.
    """
    ess = dataset_size / temperature
    mean = {name: p.detach().clone() for name, p in net.named_parameters()}
    precision = {name: torch.full_like(m, init_precision) for name, m in mean.items()}
    momentum = {name: torch.zeros_like(m) for name, m in mean.items()}
    for t, ((x, y), draws) in enumerate(zip(batches, noises, strict=True), start=1):
        g = {name: torch.zeros_like(m) for name, m in mean.items()}
        c = {name: torch.zeros_like(m) for name, m in mean.items()}
        for noise in draws:
            w = {name: (mean[name] + noise[name] / precision[name].sqrt()).requires_grad_() for name in mean}
            for i in range(len(x)):
                value = loss(functional_call(net, w, x[i : i + 1]), y[i : i + 1])
                for name, grad in zip(w, torch.autograd.grad(value, list(w.values())), strict=True):
                    g[name] = g[name] + grad / (len(x) * len(draws))
                    c[name] = c[name] + grad**2 / (len(x) * len(draws))
        for name, m in mean.items():
            momentum[name] = beta1 * momentum[name] + (1 - beta1) * g[name]
            g_bar = momentum[name] / (1 - beta1**t)
            precision[name] = (1 - precision_lr) * precision[name] + precision_lr * (ess * c[name] + prior_precision)
            step = ess * g_bar + prior_precision * (m - prior_mean)
            mean[name] = m - lr * step / (precision[name] + ess * damping)
        yield mean, precision
