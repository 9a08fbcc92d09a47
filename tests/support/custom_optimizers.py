"""Optimizers with the interfaces of those in other packages."""

import torch


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """Schedule-free AdamW, as in the package `schedulefree`: its modes replace the weights."""

    def __init__(self, parameters, lr=1e-2, beta=0.9):
        defaults = {"lr": lr, "beta": beta, "k": 0, "weight_sum": 0.0, "lr_max": -1.0, "train_mode": False}
        super().__init__(parameters, defaults)

    def train(self):
        self._switch(train_mode=True, weight=lambda beta: 1 - beta)

    def eval(self):
        self._switch(train_mode=False, weight=lambda beta: 1 - 1 / beta)

    @torch.no_grad()
    def _switch(self, *, train_mode, weight):
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                group["train_mode"] = train_mode
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        parameter.lerp_(self.state[parameter]["z"], weight(group["beta"]))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["train_mode"]:
                raise AssertionError("Optimizer was not in train mode when step is called.")
            group["k"] += 1
            group["lr_max"] = max(group["lr"], group["lr_max"])
            group["weight_sum"] += group["lr_max"] ** 2
            share = group["lr_max"] ** 2 / group["weight_sum"]
            for parameter in (parameter for parameter in group["params"] if parameter.grad is not None):
                state = self.state[parameter]
                if "z" not in state:
                    state["z"], state["exp_avg_sq"] = parameter.clone(), torch.zeros_like(parameter)
                state["exp_avg_sq"].mul_(0.99).addcmul_(parameter.grad, parameter.grad, value=0.01)
                update = parameter.grad / ((state["exp_avg_sq"] / (1 - 0.99 ** group["k"])).sqrt() + 1e-8)
                parameter.lerp_(state["z"], share)
                parameter.add_(update, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                state["z"].sub_(update, alpha=group["lr"])


class Quantized(torch.Tensor):
    """A tensor subclass that wraps codes and a scale, as those of `torchao.optim`."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


class AdamW8bit(torch.optim.Optimizer):
    """Like torchao's: the learning rate must be a tensor, and moments of large parameters are quantized."""

    def __init__(self, parameters, lr=1e-2, min_elements=256):
        super().__init__(parameters, {"lr": torch.tensor(lr)})
        self.min_elements = min_elements

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not isinstance(group["lr"], torch.Tensor):
                raise RuntimeError("lr was changed to a non-Tensor object.")
            for parameter in (parameter for parameter in group["params"] if parameter.grad is not None):
                state = self.state[parameter]
                if not state:
                    codes = torch.zeros_like(parameter, dtype=torch.uint8)
                    is_large = parameter.numel() >= self.min_elements
                    state["exp_avg"] = Quantized(codes, torch.ones(1)) if is_large else torch.zeros_like(parameter)
                parameter.sub_(parameter.grad * group["lr"])
