"""One output's call of a diffusers pipeline, run step by step through its callback."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import SchedulerMixin

from safelight.runtime.errors import InvalidRequest, JobFailed, SafelightError
from safelight.runtime.models.diffusers_backend.frames import to_frames
from safelight.runtime.models.diffusers_backend.shared import Settings, SharedModules
from safelight.runtime.models.diffusers_backend.stepped import SteppedCall

# Not of the job alone, or typed well already.
_AS_THEY_ARE = (SafelightError, torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)


class PipelineCall:
    """`begin` runs up to the first step, `reach(n)` until n loop iterations are done, `finish` to the end.

    The call has a shallow copy of the pipeline with schedulers of its own (those keep their progress in themselves), so
    calls of one pipeline interleave and give the same bits as alone. Owned by the executor's thread.
    """

    def __init__(
        self, pipe: Any, shared: SharedModules, inputs: Mapping[str, Any], shape: tuple[int, int, int]
    ) -> None:
        """`inputs` are the arguments of the call, `shape` the frames, height and width that it has to return."""
        self.done = 0  # iterations of the denoising loop
        self._own = _copy_for_one_call(pipe)
        self._shared = shared
        self._inputs = dict(inputs)
        self._shape = shape
        self._settings: dict[int, Settings] = {}
        self._frames: torch.Tensor | None = None
        self._begun = False
        self._stepped = SteppedCall("diffusers call", self._body)

    @property
    def iterations(self) -> int:
        """Of the whole loop; it may differ from the steps asked for (strength, schedulers of second order)."""
        counted = getattr(self._own, "_num_timesteps", None) or len(getattr(self._own.scheduler, "timesteps", ()))
        return int(counted)

    def begin(self) -> None:
        """Text encoding, noise, timesteps. A wrong argument is an InvalidRequest."""
        try:
            self._advance()
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{type(self._own).__name__} refuses the request: {error}") from error

    def reach(self, iterations: int) -> None:
        while self.done < iterations and self._advance():
            pass

    def finish(self) -> torch.Tensor:
        """The frames, (F, H, W, 3) uint8 on the CPU; they are kept, so that they can be delivered again."""
        if self._frames is None:
            while self._advance():
                pass
            self._frames = self._stepped.result
        return self._frames

    def close(self) -> None:
        """Ends the call wherever it stands; nothing of it is left."""
        self._shared.enter(self._settings)
        try:
            self._stepped.close()
        finally:
            self._shared.leave()
        vars(self._own).pop("progress_bar", None)  # which refers to this call
        self._settings, self._inputs, self._frames, self._own = {}, {}, None, None

    def _advance(self) -> bool:
        self._shared.enter(self._settings)
        try:
            return self._stepped.advance()
        except _AS_THEY_ARE:
            raise
        except (TypeError, ValueError) as error:
            if not self._begun:
                raise
            raise self._failed(error) from error
        except Exception as error:  # whatever a pipeline raises is an error of its job
            raise self._failed(error) from error
        finally:
            self._settings = self._shared.leave()

    def _failed(self, error: Exception) -> JobFailed:
        return JobFailed(f"{type(self._own).__name__} failed: {type(error).__name__}: {error}")

    def _body(self, pause: Callable[[], None]) -> torch.Tensor:
        device = self._own.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a new thread is on device 0
        with torch.no_grad():
            return to_frames(self._own(**self._inputs, **self._hooks(pause)), *self._shape)

    def _hooks(self, pause: Callable[[], None]) -> dict[str, Any]:
        """The step callback; and the progress bar, which pipelines make just before their first step."""
        own = self._own
        make_bar = own.progress_bar

        def begin(*args: Any, **kwargs: Any) -> Any:
            if not self._begun:
                self._begun = True
                pause()
            return make_bar(*args, **kwargs)

        def step_ended(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self._begun = True
            self.done += 1
            pause()
            return tensors

        def older_step_ended(step: int, timestep: Any, latents: Any) -> None:
            step_ended(own, step, timestep, {})

        own.progress_bar = begin
        if "callback_on_step_end" in inspect.signature(type(own).__call__).parameters:
            return {"callback_on_step_end": step_ended}
        return {"callback": older_step_ended, "callback_steps": 1}


def _copy_for_one_call(pipe: Any) -> Any:
    own = copy.copy(pipe)
    with torch.inference_mode(False):  # a scheduler may change its tensors in place, out of the executor's mode
        for name, part in pipe.components.items():
            if isinstance(part, SchedulerMixin):
                own_part: Any = part
                setattr(own, name, type(own_part).from_config(own_part.config))
    own.set_progress_bar_config(disable=True)
    return own
