"""Plans become pipeline calls exactly as sent; errors of one job leave the others and its own state alone."""

from __future__ import annotations

import dataclasses
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch

from safelight.runtime.errors import JobFailed
from safelight.runtime.messages import (
    Checkpoint,
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointRef,
    ChunkReady,
    Decode,
    Denoise,
    Drop,
    Encode,
    Endpoints,
    FromWorker,
    GenerationRequest,
    HeldState,
    MediaFormat,
    MediaSpec,
    Op,
    Plan,
    PlanDone,
    Prepare,
    Preview,
    PreviewReady,
    Release,
    SlotPool,
    TensorRef,
    UnitRef,
    WorkerSpec,
)
from safelight.runtime.pipelines.protocol import DenoiseState, FrameChunk, SamplerState
from safelight.runtime.worker.checkpoint import CheckpointWriter, read_checkpoint
from safelight.runtime.worker.completer import Completer
from safelight.runtime.worker.executor import Executor, Launched, result_of
from safelight.runtime.worker.link import Link

REQUEST = GenerationRequest(
    prompt="p",
    negative_prompt="",
    token_ids={"prompt": (1,)},
    height=16,
    width=16,
    num_frames=9,
    fps=8,
    num_inference_steps=3,
    guidance_scale=1.0,
    seed=7,
    num_outputs=2,
    sampler="euler",
    media=MediaSpec(MediaFormat.MP4),
)


class FakePipeline:
    """Latents count steps; decoding gives one chunk per latent frame; a request with seed 13 fails in `step`."""

    device = torch.device("cpu")

    def __init__(self, collective_decode: bool = False) -> None:
        self.collective_decode = collective_decode
        self.decoded = 0
        self.colours = True

    def weights_bytes(self) -> int:
        return 0

    def encode(self, request: GenerationRequest) -> Any:
        return f"conditioning of {request.prompt}"

    def prepare(self, request: GenerationRequest, conditioning: Any, index: int) -> DenoiseState:
        latents = torch.full((1, 3, 2, 2), float(request.seed + index))
        sigmas = torch.linspace(1, 0, request.num_inference_steps + 1)
        return DenoiseState(
            latents, 0, sigmas, SamplerState(), torch.empty(0), request.guidance_scale, conditioning, request, index
        )

    def step(self, states: Sequence[DenoiseState]) -> list[DenoiseState]:
        if any(s.request.seed == 13 for s in states):
            raise RuntimeError("a shape does not fit")
        return [dataclasses.replace(s, latents=s.latents + 1, step=s.step + 1) for s in states]

    def decode(self, state: DenoiseState, cursor: Any | None) -> tuple[FrameChunk, Any | None]:
        self.decoded += 1
        frame = cursor or 0
        pixels = torch.full((1, 16, 16, 3), frame, dtype=torch.uint8)
        return FrameChunk(pixels), frame + 1 if frame < 2 else None

    def preview(self, state: DenoiseState) -> torch.Tensor | None:
        return torch.full((2, 2, 3), int(state.latents[0, 0, 0, 0]), dtype=torch.uint8) if self.colours else None

    def save(self, state: DenoiseState) -> dict[str, torch.Tensor]:
        return {"latents": state.latents, "step": torch.tensor(state.step)}

    def load(self, request: GenerationRequest, conditioning: Any, tensors: dict[str, torch.Tensor]) -> DenoiseState:
        fresh = self.prepare(request, conditioning, 0)
        return dataclasses.replace(fresh, latents=tensors["latents"], step=int(tensors["step"]))

    def profile(self, request: GenerationRequest) -> Any:
        raise AssertionError("the executor asks for no profile")


class Rig:
    def __init__(
        self,
        folder: Path,
        world_size: int = 1,
        rank: int = 0,
        collective_decode: bool = False,
        **changes: Any,
    ) -> None:
        endpoints = Endpoints(*["ipc:///unused"] * 6)
        self.sent: list[FromWorker] = []
        self.checkpoints = CheckpointWriter(folder)
        spec = WorkerSpec(
            endpoints=endpoints,
            group=0,
            rank=rank,
            world_size=world_size,
            group_epoch=0,
            local_rank=0,
            store="",
            model_path="",
            vae_path=None,
            device="cpu",
            dit_precision="fp32",
            vae_precision="fp32",
            checkpoint_dir=str(folder),
            slots=SlotPool(str(folder), 1, 1),
            num_threads=1,
            ranks_on_host=1,
            log_level="info",
        )
        self.spec = spec = msgspec.structs.replace(spec, **changes)
        self.pipeline = FakePipeline(collective_decode)
        self.executor = Executor(self.pipeline, spec, self.checkpoints, self.sent.append)
        self.number = 0

    def run(self, *ops: Op) -> Launched:
        plan = Plan(scheduler_epoch=0, group=0, group_epoch=0, number=self.number, ops=ops)
        self.number += 1
        return self.executor.execute(plan)

    def codes(self, *ops: Op) -> list[str | None]:
        return [op.error.code if op.error else None for op in self.run(*ops).ops]


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def start(job: str = "a", seed: int = 7) -> list[Op]:
    request = GenerationRequest(**{f: getattr(REQUEST, f) for f in REQUEST.__struct_fields__} | {"seed": seed})
    return [Encode(job, 0, request), Prepare(job, 0, 0)]


def step(job: str, number: int) -> Denoise:
    return Denoise((UnitRef(job, 0, 0, number),))


def test_a_job_runs_from_encoding_to_its_last_chunk(rig: Rig) -> None:
    assert rig.codes(*start(), step("a", 0), step("a", 1), step("a", 2)) == [None] * 5
    launched = rig.run(*(Decode("a", 0, 0, 0, chunk, 0) for chunk in range(3)))
    results = [result_of(op) for op in launched.ops]
    assert [r.last_chunk for r in results] == [False, False, True]
    assert [int(op.chunk.frames[0, 0, 0, 0]) for op in launched.ops if op.chunk] == [0, 1, 2]


class FakeLink:
    def __init__(self) -> None:
        self.chunks: list[tuple[ChunkReady, bytes]] = []
        self.sent: list[tuple[FromWorker | PreviewReady, bytes]] = []

    def send_chunk(self, message: ChunkReady, frames: Sequence[memoryview] = ()) -> None:
        self.chunks.append((message, b"".join(frames)))

    def send(self, message: FromWorker) -> None:
        self.sent.append((message, b""))

    def send_preview(self, message: PreviewReady, pixels: memoryview) -> None:
        self.sent.append((message, bytes(pixels)))

    def note_done(self, plan: Plan) -> None: ...


def test_frames_for_another_host_travel_with_their_message_and_keep_their_slots(tmp_path: Path) -> None:
    rig, link, failures = Rig(tmp_path, slots=None), FakeLink(), list[Exception]()
    rig.run(*start(), step("a", 0))
    completer = Completer(rig.spec, cast(Link, link), torch.device("cpu"), 0, failures.append)
    completer.submit(rig.run(Decode("a", 0, 0, 0, 0, slot=3), Decode("a", 0, 0, 0, 1, slot=1)))
    completer.close()
    assert not failures
    sent = [(m.slot, m.chunk, m.remote, m.nbytes, m.crc32) for m, _ in link.chunks]
    parts = [bytes(16 * 16 * 3), bytes([1]) * (16 * 16 * 3)]
    assert [part for _, part in link.chunks] == parts
    assert sent == [(3, 0, True, 768, zlib.crc32(parts[0])), (1, 1, True, 768, zlib.crc32(parts[1]))]


def test_a_preview_follows_the_acknowledgement_of_its_plan(tmp_path: Path) -> None:
    rig, link, failures = Rig(tmp_path), FakeLink(), list[Exception]()
    rig.spec = msgspec.structs.replace(rig.spec, slots=None)
    completer = Completer(rig.spec, cast(Link, link), torch.device("cpu"), 0, failures.append)
    completer.submit(rig.run(*start(), step("a", 0), Preview("a", 0, 0, 0, 1)))
    completer.close()
    assert not failures
    done, (preview, pixels) = link.sent
    assert isinstance(done[0], PlanDone)
    assert [result.error for result in done[0].results] == [None] * 4
    assert pixels == bytes([8]) * 12  # seed 7, one step
    assert preview == PreviewReady("a", 0, 0, 0, 1, TensorRef((2, 2, 3), "uint8", 12, zlib.crc32(pixels)))


def test_a_copy_that_is_late_waits_for_the_next_plan_and_no_plan_for_it(tmp_path: Path) -> None:
    rig, link, failures = Rig(tmp_path), FakeLink(), list[Exception]()
    rig.spec = msgspec.structs.replace(rig.spec, slots=None)
    copied = FakeEvent()
    launched = rig.run(*start(), step("a", 0), Preview("a", 0, 0, 0, 1))
    late = dataclasses.replace(launched.ops[-1].preview, copied=copied)  # type: ignore[type-var]
    launched = Launched(launched.plan, (*launched.ops[:-1], dataclasses.replace(launched.ops[-1], preview=late)))
    completer = Completer(rig.spec, cast(Link, link), torch.device("cpu"), 0, failures.append)
    completer.submit(launched)
    completer.submit(rig.run(step("a", 1)))
    assert copied.asked.wait(10)
    copied.passed = True
    completer.submit(rig.run(step("a", 2)))
    completer.close()
    assert not failures
    kinds = [type(message) for message, _ in link.sent]
    assert sorted(kinds, key=str) == [PlanDone, PlanDone, PlanDone, PreviewReady]
    assert kinds[0] is PlanDone


class FakeEvent:
    """A CUDA event that nobody may wait for."""

    passed = False

    def __init__(self) -> None:
        self.asked = threading.Event()

    def query(self) -> bool:
        self.asked.set()
        return self.passed


def test_previews_are_rank_zeros_and_what_fails_with_one_fails_nothing(tmp_path: Path) -> None:
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        rig = Rig(tmp_path, rank=rank, world_size=world_size)
        launched = rig.run(*start(), step("a", 0), Preview("a", 0, 0, 0, 1))
        assert (launched.ops[-1].preview is not None) == (rank == 0)
        stale = rig.run(Preview("a", 0, 0, 0, 3), Preview("gone", 0, 0, 0, 1))
        assert [(op.error, op.preview) for op in stale.ops] == [(None, None)] * 2
        rig.pipeline.colours = False
        assert rig.run(Preview("a", 0, 0, 0, 1)).ops[0].preview is None

        def broken(state: DenoiseState) -> torch.Tensor:
            raise RuntimeError("no memory for colours")

        rig.pipeline.preview = broken  # type: ignore[method-assign]
        assert rig.codes(Preview("a", 0, 0, 0, 1), step("a", 1)) == [None, None]


def test_without_a_folder_that_all_ranks_see_checkpoints_fail_and_none_is_resumed(tmp_path: Path) -> None:
    rig = Rig(tmp_path, checkpoint_dir="")
    rig.checkpoints.close()
    rig.checkpoints = CheckpointWriter(None)
    rig.executor = Executor(rig.pipeline, rig.spec, rig.checkpoints, rig.sent.append)
    rig.run(*start(), step("a", 0), Checkpoint("a", 0, 0, 1))
    rig.checkpoints.close()
    (failed,) = rig.sent
    assert isinstance(failed, CheckpointFailed)
    assert "--state-dir" in failed.error.message
    ref = CheckpointRef(str(tmp_path / "a"), 1, "0")
    assert rig.codes(Prepare("a", 0, 0, ref)) == ["job_failed"]


def test_chunk_zero_starts_over_and_a_skipped_chunk_is_refused(rig: Rig) -> None:
    rig.run(*start())
    assert rig.codes(Decode("a", 0, 0, 0, 0, 0), Decode("a", 0, 0, 0, 2, 0)) == [None, "not_found"]
    assert rig.codes(Decode("a", 0, 0, 1, 1, 0)) == ["not_found"]
    assert rig.codes(Decode("a", 0, 0, 1, 0, 0), Decode("a", 0, 0, 1, 1, 0)) == [None, None]


def test_an_unknown_attempt_or_a_wrong_step_is_reported_and_changes_nothing(rig: Rig) -> None:
    rig.run(*start())
    assert rig.codes(step("b", 0), step("a", 1), Denoise((UnitRef("a", 1, 0, 0),))) == ["not_found"] * 3
    assert rig.executor.held() == (HeldState("a", 0, -1, 0), HeldState("a", 0, 0, 0))


def test_an_error_of_one_job_leaves_the_others_and_its_own_state(rig: Rig) -> None:
    rig.run(*start("a"), *start("bad", seed=13))
    launched = rig.run(step("a", 0), step("bad", 0))
    assert launched.ops[0].error is None
    assert launched.ops[1].error is not None
    assert "a shape does not fit" in launched.ops[1].error.message
    assert {(h.job, h.step) for h in rig.executor.held() if h.index == 0} == {("a", 1), ("bad", 0)}


def test_on_several_ranks_an_error_ends_the_group(tmp_path: Path) -> None:
    rig = Rig(tmp_path, world_size=2)
    rig.run(*start("bad", seed=13))
    with pytest.raises(RuntimeError, match="does not fit"):
        rig.run(step("bad", 0))


def test_on_several_ranks_a_refused_request_or_checkpoint_fails_its_job_alone(tmp_path: Path) -> None:
    rig = Rig(tmp_path, world_size=2)
    gone = CheckpointRef(str(tmp_path / "gone"), 1, "")
    assert rig.codes(*start("a"), *start("b"), Prepare("b", 0, 0, gone), step("a", 0)) == [None] * 4 + [
        "job_failed",
        None,
    ]


def test_only_rank_zero_decodes(tmp_path: Path) -> None:
    rig = Rig(tmp_path, world_size=2, rank=1)
    launched = rig.run(*start(), Decode("a", 0, 0, 0, 0, 0))
    assert [op.chunk for op in launched.ops] == [None] * 3
    assert rig.pipeline.decoded == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_takes_part_in_a_collective_decode_and_rank_zero_delivers(tmp_path: Path, rank: int) -> None:
    rig = Rig(tmp_path, world_size=2, rank=rank, collective_decode=True)
    chunks = [Decode("a", 0, 0, 0, chunk, 0) for chunk in range(3)]
    launched = rig.run(*start(), *chunks)
    assert rig.pipeline.decoded == 3
    assert [op.chunk is not None for op in launched.ops[2:]] == [rank == 0] * 3
    assert rig.codes(Decode("a", 0, 0, 1, 2, 0)) == ["not_found"]  # on every rank, before any of them waits


def test_release_keeps_the_conditioning_and_drop_frees_everything(rig: Rig) -> None:
    rig.run(*start(), Prepare("a", 0, 1))
    rig.run(Release("a", 0, 0))
    assert rig.executor.held() == (HeldState("a", 0, -1, 0), HeldState("a", 0, 1, 0))
    assert rig.codes(Drop("a", 0), Drop("unknown", 0)) == [None, None]
    assert rig.executor.held() == ()


def test_a_checkpoint_resumes_where_it_was_taken(rig: Rig) -> None:
    rig.run(*start(), step("a", 0), step("a", 1), Checkpoint("a", 0, 0, 2), step("a", 2))
    rig.checkpoints.close()
    [committed] = rig.sent
    assert isinstance(committed, CheckpointCommitted)
    assert committed.ref.step == 2
    rig.run(Encode("a", 1, REQUEST), Prepare("a", 1, 0, committed.ref), Denoise((UnitRef("a", 1, 0, 2),)))
    held = rig.executor._jobs
    assert torch.equal(held["a", 1].states[0].latents, held["a", 0].states[0].latents)


def test_a_checkpoint_that_is_not_the_journalled_file_is_refused(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"other")
    with pytest.raises(JobFailed, match="sha256 differs"):
        read_checkpoint(CheckpointRef(str(path), 1, "0" * 64))
    assert rig.codes(*start(), Prepare("a", 0, 0, CheckpointRef(str(tmp_path / "gone"), 1, ""))) == [
        None,
        None,
        "job_failed",
    ]


def test_a_checkpoint_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "missing")
    rig.run(*start(), Checkpoint("a", 0, 0, 0))
    rig.checkpoints.close()
    [failed] = rig.sent
    assert isinstance(failed, CheckpointFailed)
    assert "was not written" in failed.error.message


def test_a_slow_disk_does_not_make_checkpoints_pile_up(rig: Rig) -> None:
    begun, resume = threading.Event(), threading.Event()
    save = rig.pipeline.save

    def slowly(state: DenoiseState) -> dict[str, torch.Tensor]:
        begun.set()
        assert resume.wait(10)
        return save(state)

    rig.pipeline.save = slowly  # type: ignore[method-assign]
    rig.run(*start(), step("a", 0), Checkpoint("a", 0, 0, 1))
    assert begun.wait(10)
    rig.run(step("a", 1), Checkpoint("a", 0, 0, 2), step("a", 2), Checkpoint("a", 0, 0, 3))
    resume.set()
    rig.checkpoints.close()
    assert [m.ref.step for m in rig.sent if isinstance(m, CheckpointCommitted)] == [1, 3]
