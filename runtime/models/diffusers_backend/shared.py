"""Settings of modules that a call changes while it runs, although other calls use the same modules.

Some pipelines put attention processors or hooks of their own into the shared transformer for the time of a call (PAG,
SAG, adapters). Between two pieces of a call they are taken out and kept, so that every call sees only its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

Settings = tuple[Any, Any, bool, dict[int, Any], dict[int, Any]]  # processor, forward, training, hooks, pre-hooks


class SharedModules:
    """`enter` gives the modules a call's settings, `leave` takes them back and restores those of nobody."""

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        modules = {id(module): module for root in roots for module in root.modules()}
        self._own = [(module, _read(module)) for module in modules.values()]

    def enter(self, settings: dict[int, Settings]) -> None:
        """`settings` came from `leave`; {} for a call that starts."""
        for number, values in settings.items():
            _write(self._own[number][0], values)

    def leave(self) -> dict[int, Settings]:
        """What the call changed, by the module's number."""
        changed: dict[int, Settings] = {}
        for number, (module, own) in enumerate(self._own):
            if _differs(module, own):
                changed[number] = _read(module)
                _write(module, own)
        return changed


def _processor(module: nn.Module) -> Any:
    """Attention keeps it as an attribute, or as a submodule when it has weights."""
    return module.__dict__.get("processor") or module._modules.get("processor")


def _read(module: nn.Module) -> Settings:
    hooks, before = dict(module._forward_hooks), dict(module._forward_pre_hooks)
    return _processor(module), module.__dict__.get("forward"), module.training, hooks, before


def _differs(module: nn.Module, own: Settings) -> bool:
    return not (
        _processor(module) is own[0]
        and module.__dict__.get("forward") is own[1]
        and module.training == own[2]
        and module._forward_hooks == own[3]
        and module._forward_pre_hooks == own[4]
    )


def _write(module: nn.Module, settings: Settings) -> None:
    processor, forward, module.training, hooks, before = settings
    if _processor(module) is not processor:
        module.__dict__.pop("processor", None)
        module._modules.pop("processor", None)
        module.processor = processor
    module.__dict__.pop("forward", None)
    if forward is not None:
        module.__dict__["forward"] = forward
    for held, wanted in ((module._forward_hooks, hooks), (module._forward_pre_hooks, before)):
        held.clear()
        held.update(wanted)
