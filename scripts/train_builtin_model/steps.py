"""Runs whole training steps in the fastest form that works on this machine: CUDA graphs, compiled or not, or plain.

A *body* makes one whole step (draw, forward, backward, update) on tensors that stay where they are; all its random
numbers come from the generator that it is given. Each form is tried, compared with the plain one on the same random
numbers, and timed; a form that fails is reported and left out, so no failure ends a run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

import torch

Body = Callable[[torch.Generator], None]
FORMS = ("plain", "graph", "compiled", "compiled graph")
DEFAULT_FORMS = ("plain", "graph", "compiled graph")
WARM_UP, TIMED = 3, 12
TOLERANCE = 0.05  # relative difference of the loss from that of the plain form; bf16 sums differ in order
IN_FLIGHT, MARK_EVERY = 2, 16


def capture(body: Body, generator: torch.Generator, pool: tuple[int, int] | None) -> Body:
    """Warm up on a side stream, then record `body`. -> replay. The generator's numbers differ at every replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            body(generator)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph, pool=pool):
        body(generator)
    return lambda _: graph.replay()


class StepRunner:
    """`bodies` by their shape's number (frames of a clip). set_compiled switches compilation on or off; loss reads and
    clears the loss that a body adds up.
    """

    def __init__(
        self, bodies: dict[int, Body], set_compiled: Callable[[bool], None], loss: Callable[[], float],
        device: torch.device, seed: int,
    ) -> None:  # fmt: skip
        self.bodies, self.set_compiled, self.loss, self.device, self.seed = bodies, set_compiled, loss, device, seed
        self.generator = torch.Generator(device).manual_seed(seed)
        self.run: dict[int, Body] = dict(bodies)
        self.marks: deque[torch.cuda.Event] = deque()
        self.count = 0

    def choose(self, forms: Iterable[str]) -> str:
        """Try the forms on the first shape, take the fastest, and prepare all shapes in it. -> its name.

        Rates must be zero: the steps made here leave the weights as they are.
        """
        if not torch.cuda.is_available():
            return "plain"
        shape = next(iter(self.bodies))
        expected, times = self._probe(self.bodies[shape])[0], {}
        for form in forms:
            start = time.monotonic()
            try:
                loss, seconds = self._probe(self._prepare(form, [shape])[shape])
                wrong = abs(loss - expected) > TOLERANCE * abs(expected) or loss != loss
                note = f"WRONG, left out (plain: {expected:.5f})" if wrong else f"{seconds * 1e3:.2f} ms a step"
                if not wrong:
                    times[form] = seconds
                print(f"form {form}: loss {loss:.5f}, {note}; tried in {time.monotonic() - start:.1f} s", flush=True)
            except Exception as error:  # any failure of an optional form: say it, go on with the next
                print(f"form {form}: left out, {type(error).__name__}: {str(error)[:400]}", flush=True)
        for form in sorted(times, key=lambda f: times[f]):
            try:
                self.run = self._prepare(form, list(self.bodies))
                speeds = {name: f"{self._probe(body)[1] * 1e3:.2f} ms" for name, body in self.run.items()}
            except Exception as error:  # as above
                print(f"form {form}: failed on another shape, {type(error).__name__}: {str(error)[:400]}", flush=True)
                continue
            print(f"form {form} chosen, a step by frames: {speeds}", flush=True)
            self.generator.manual_seed(self.seed)
            return form
        self.run = self._prepare("plain", list(self.bodies))
        self.generator.manual_seed(self.seed)
        return "plain"

    def _prepare(self, form: str, shapes: list[int]) -> dict[int, Body]:
        self.run = {}  # frees the memory of the form before
        self.generator = torch.Generator(self.device)  # a failed capture may have spoilt the one before
        self.set_compiled(form.startswith("compiled"))
        if not form.endswith("graph"):
            for shape in shapes * WARM_UP:
                self.bodies[shape](self.generator)
            return {shape: self.bodies[shape] for shape in shapes}
        pool = torch.cuda.graph_pool_handle()  # shared: a step leaves nothing behind in it
        return {shape: capture(self.bodies[shape], self.generator, pool) for shape in shapes}

    def _probe(self, body: Body) -> tuple[float, float]:
        """-> loss of a step with fixed random numbers, seconds a step."""
        self.generator.manual_seed(12345)
        self.loss()
        body(self.generator)
        loss = self.loss()
        torch.cuda.synchronize()
        start = time.monotonic()
        for _ in range(TIMED):
            body(self.generator)
        torch.cuda.synchronize()
        seconds = (time.monotonic() - start) / TIMED
        self.loss()
        return loss, seconds

    def __call__(self, shape: int) -> None:
        """One step. The host stays at most a few dozen steps ahead, so that a clock on the host means something."""
        self.run[shape](self.generator)
        self.count += 1
        if self.count % MARK_EVERY == 0 and self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self.marks.append(event)
            if len(self.marks) > IN_FLIGHT:
                self.marks.popleft().synchronize()
