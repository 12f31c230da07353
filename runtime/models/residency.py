"""Where a loaded model's weights are: which components live on the CPU, and when they are on the device.

Encoders and VAE move as a whole, for the ops that use them; one of them is on the device at a time. The transformer's
blocks are streamed (`streaming`). Parameters stay the same objects, only their data moves, and never back: weights do
not change, so leaving is to forget the copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from safelight.runtime.models.host_memory import HostMemory, layout, replace_parameters, tensor_at
from safelight.runtime.models.streaming import BlockStream, stream_blocks

T = TypeVar("T")
CPU = torch.device("cpu")
WHOLE = ("text_encoder", "image_encoder", "vae")  # components that move as a whole
DIT = "dit"  # the transformers, whose blocks are streamed


class Visit:
    """One use of a component on the device. Set `more` when the same op sequence uses it again: it stays then."""

    def __init__(self) -> None:
        self.more = False


class _Component:
    """The modules of one component, and the host copies of their parameters."""

    def __init__(self, device: torch.device, *, pin: bool) -> None:
        self._device, self._pin = device, pin
        self._memory: list[HostMemory] = []
        self.homes: list[tuple[nn.Parameter, Tensor]] = []
        self.here = False

    @property
    def nbytes(self) -> int:
        return sum(home.numel() * home.element_size() for _, home in self.homes)

    def take(self, module: nn.Module) -> None:
        """Packs a module's parameters into host memory. Buffers, which are small, go to the device for good."""
        offsets, total = layout(list(module.parameters()))
        places = iter(offsets)
        with torch.inference_mode(False):
            memory = HostMemory(total)
            made = replace_parameters(module, lambda p: tensor_at(memory.bytes, next(places), p).copy_(p))
            self.homes += [(parameter, parameter.data) for parameter in made]
            for child in module.modules():
                for name, buffer in list(child.named_buffers(recurse=False)):
                    setattr(child, name, buffer.to(self._device))
        if self._pin:
            memory.page_lock(self._device)
        self._memory.append(memory)

    def enter(self) -> None:
        """Queues the copies on the current stream: what is launched next finds them done."""
        if self.here:
            return
        with torch.inference_mode(False):
            for parameter, home in self.homes:
                parameter.data = torch.empty_like(home, device=self._device).copy_(home, non_blocking=True)
        self.here = True

    def leave(self) -> None:
        """Also after an `enter` that failed half-way. Memory is free for what is launched next on the same stream."""
        for parameter, home in self.homes:
            parameter.data = home
        self.here = False


class Residency:
    """The weights of one model. `offloaded`: of WHOLE and DIT. Owned by the thread that calls the pipeline."""

    def __init__(self, device: torch.device = CPU, offloaded: Iterable[str] = (), *, pin: bool = False) -> None:
        self._device, self._pin = device, pin and device.type == "cuda"
        self._components = {name: _Component(device, pin=self._pin) for name in WHOLE if name in offloaded}
        self._streams: list[BlockStream] | None = [] if DIT in offloaded else None
        self._visited: str | None = None

    def load(self, name: str, build: Callable[[torch.device], T]) -> T:
        """The component that `build(where its weights go)` loads; each of a model's text encoders is a text_encoder.

        `build` returns a module, or a dataclass that has modules: its tensors, and its fields that name the device,
        are those of the compute device afterwards.
        """
        component = self._components.get(name)
        if component is None:
            return build(self._device)
        made: T = self._taken(component, build(CPU))
        return made

    def _taken(self, component: _Component, built: Any) -> Any:
        if isinstance(built, nn.Module):
            component.take(built)
            return built
        fields = {field.name: getattr(built, field.name) for field in dataclasses.fields(built)}
        for module in (value for value in fields.values() if isinstance(value, nn.Module)):
            component.take(module)
        moved: dict[str, Any] = {n: self._device for n, v in fields.items() if isinstance(v, torch.device)}
        moved |= {n: v.to(self._device) for n, v in fields.items() if isinstance(v, Tensor)}
        return dataclasses.replace(built, **moved)

    @contextmanager
    def on_device(self, name: str) -> Iterator[Visit]:
        """Around every use of the component `name`. It leaves at the end, unless the visit says that there is more.

        One that stayed leaves when another one comes, and when an op fails. Nothing waits for the device. Raises
        RuntimeError for a visit within a visit: memory is planned for one component at a time.
        """
        visit, component = Visit(), self._components.get(name)
        if component is None:
            yield visit
            return
        if self._visited is not None:
            raise RuntimeError(f"{name} is asked for while {self._visited} is in use; use one after the other")
        for other in self._components.values():
            if other is not component:
                other.leave()
        self._visited, done = name, False
        try:
            component.enter()
            yield visit
            done = True
        finally:
            self._visited = None
            if not (done and visit.more):
                component.leave()

    def homes(self, *blocks: str) -> dict[str, torch.device]:
        """For `load_weights`: parameters below these lists of blocks of a transformer are loaded into host memory."""
        return {} if self._streams is None else dict.fromkeys(blocks, CPU)

    def stream(self, transformer: nn.Module, *blocks: str) -> None:
        """Call it when a transformer is loaded (and its blocks are compiled): streams these lists of blocks, named in
        the order in which forward runs through them."""
        if self._streams is not None:
            self._streams.append(stream_blocks(transformer, blocks, self._device, pin=self._pin))

    @property
    def streams(self) -> tuple[BlockStream, ...]:
        """Of the transformers whose blocks are streamed."""
        return tuple(self._streams or ())

    def components_on_device(self) -> tuple[str, ...]:
        """Which of the offloaded components are on the device now."""
        return tuple(name for name, component in self._components.items() if component.here)

    def weights_bytes(self, *modules: nn.Module) -> int:
        """Bytes of the device that the weights of a pipeline with these modules take: what always stays, and room for
        the VAE, which may stay between the ops of a decode."""
        return self._staying_bytes(modules) + self._bytes_of("vae")

    @property
    def encode_bytes(self) -> int:
        """Bytes of the device that an encoder takes on top, while it encodes: the VAE is not there then."""
        return max(
            0,
            self._bytes_of("text_encoder") - self._bytes_of("vae"),
            self._bytes_of("image_encoder") - self._bytes_of("vae"),
        )

    def _bytes_of(self, name: str) -> int:
        return self._components[name].nbytes if name in self._components else 0

    def _staying_bytes(self, modules: Iterable[nn.Module]) -> int:
        moving = {id(p) for component in self._components.values() for p, _ in component.homes}
        storages = {}
        for parameter in (p for module in modules for p in module.parameters() if id(p) not in moving):
            storage = parameter.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()  # streamed blocks share their buffers
        return sum(storages.values())

    def describe(self) -> str:
        """What is offloaded, for the log; empty when nothing is."""
        parts = [
            f"{name} {component.nbytes / 1e9:.2f} GB" for name, component in self._components.items() if component.homes
        ]
        if self._streams:
            parts.append(f"{DIT} blocks {sum(s.host_bytes for s in self._streams) / 1e9:.2f} GB, layer by layer")
        locked = "page-locked" if self._pin else "pageable"
        return f"in {locked} host memory: {'; '.join(parts)}" if parts else ""

    def unused(self) -> list[str]:
        """Components that were to be offloaded and that the model does not have."""
        found = [name for name, component in self._components.items() if not component.homes]
        return found + ([DIT] if self._streams == [] else [])
