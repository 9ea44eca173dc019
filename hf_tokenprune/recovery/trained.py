"""The parameters that a recovery trains: which, their values in float32, and the state that a run goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..atomic import write_bytes
from ..engine import unwrapped
from ..errors import ConfigError, TokenPruneError, UnsupportedModelError
from ..weights import OF_PEFT, check_at_hand

DECAY = 0.98
"""Of the moving average of the values, which is judged and kept: single steps are noisy."""
EPSILON = 1e-6
"""Of AdamW. Attention does not see the biases of keys, whose gradients are rounding: with the usual 1e-8 they would
wander, and so would the keys that methods compare."""
MOMENTS = ("exp_avg", "exp_avg_sq")
Values = dict[str, Tensor]


class Trained:
    """Some parameters of a model, and values for them that are float32 whatever its dtype.

    Args:
        model: dense, as the dense model is.
        now: values of parameters that differ in the model that is trained, by name.

    Raises:
        UnsupportedModelError: it is in float16, or a parameter is not whole in this process.
    """

    def __init__(self, model: nn.Module, now: Mapping[str, Tensor], learning_rate: float) -> None:
        self.parameters = dict(trainable(model))
        if not self.parameters:
            raise UnsupportedModelError(f"{type(model).__name__} has no parameters to train: no norms and no biases")
        if any(parameter.dtype == torch.float16 for parameter in self.parameters.values()):
            raise UnsupportedModelError("float16 has no room for small gradients: load the model in float32")
        self.dense = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.values = {name: now.get(name, value).float().clone() for name, value in self.dense.items()}
        self.average = {name: value.clone() for name, value in self.values.items()}
        self.shown: Mapping[str, Tensor] = self.dense
        self.steps = 0
        self.optimizer = torch.optim.AdamW(list(self.values.values()), learning_rate, eps=EPSILON, weight_decay=0.0)

    def show(self, values: Mapping[str, Tensor]) -> None:
        """Write values into the model."""
        self.shown = values
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)

    def step(self, learning_rate: float, accelerator: Any) -> None:
        """One of AdamW, by the mean of the gradients of all processes.

        What the first gradients do not reach, such as a text tower, is not trained.
        """
        if any(parameter.grad is None for parameter in self.parameters.values()):
            self._keep([name for name, parameter in self.parameters.items() if parameter.grad is not None])
        gradients = [self._gradient(parameter) for parameter in self.parameters.values()]
        if accelerator.num_processes > 1:
            flat = accelerator.reduce(torch.cat([each.flatten() for each in gradients]), "mean")
            gradients = [*flat.split([each.numel() for each in gradients])]
        for value, gradient in zip(self.values.values(), gradients, strict=True):
            value.grad = gradient.view_as(value)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.steps += 1
        weight = max(1 - DECAY, 9 / (self.steps + 9))  # of what is new: in the first steps more
        for name, value in self.average.items():
            value.lerp_(self.values[name], weight)
        self.show(self.values)

    def save(self, path: Path, best: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Write a file that ``load`` reads: no pickle."""
        kinds = {"value": self.values, "average": self.average, "best": best}
        tensors = {f"{kind}/{name}": own[name] for kind, own in kinds.items() for name in self.values}
        for name, value in self.values.items():
            tensors |= {f"{moment}/{name}": self.optimizer.state[value][moment] for moment in MOMENTS}
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_bytes(path, save(on_cpu, metadata={"progress": json.dumps({**progress, "steps": self.steps})}))

    def load(self, path: Path) -> tuple[Values, dict[str, Any]]:
        """Take over the values and moments of a file; the best values in it, and what ``save`` was given as progress.

        Raises:
            ConfigError: it is another file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                progress = json.loads(file.metadata()["progress"])
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self._keep([name for name in self.parameters if f"value/{name}" in found])
            self.steps = progress["steps"]
            for name, value in self.values.items():
                value.copy_(found[f"value/{name}"])
                self.average[name].copy_(found[f"average/{name}"])
                moments = {moment: found[f"{moment}/{name}"].to(value.device) for moment in MOMENTS}
                self.optimizer.state[value] = {"step": torch.tensor(float(self.steps)), **moments}
            return {name: found[f"best/{name}"].to(value.device) for name, value in self.values.items()}, progress
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{path} is no state of such a recovery ({error}); delete it, or name another") from error

    def _keep(self, names: list[str]) -> None:
        """Train these only."""
        self.show({name: value for name, value in self.dense.items() if name not in names})
        for each in (self.parameters, self.dense, self.values, self.average):
            for name in set(each) - set(names):
                del each[name]
        self.optimizer.param_groups[0]["params"] = list(self.values.values())

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None or not bool(gradient.isfinite().all()):
            raise TokenPruneError("gradients are NaN or infinite, so nothing was changed: a lower learning_rate")
        return gradient.float()


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Norms and biases, by name; of a ``PeftModel`` what requires gradients.

    Raises:
        UnsupportedModelError: one is offloaded or sharded.
    """
    stock = unwrapped(model)
    if stock is not model:
        yield from ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
        return
    found = {
        id(parameter)
        for module in stock.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point() and (name.endswith("bias") or type(module).__name__.endswith("Norm"))
    }
    every = stock.named_parameters()
    names = {name.replace(OF_PEFT, ""): parameter for name, parameter in every if id(parameter) in found}
    check_at_hand(stock, names)
    yield from names.items()


@contextmanager
def alone(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients are made of these parameters alone; afterwards of those as before, and none are left."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    own = {id(parameter) for parameter in parameters.values()}
    try:
        for parameter, _ in flags:
            parameter.requires_grad = id(parameter) in own
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad = flag
            if id(parameter) in own:
                parameter.grad = None
