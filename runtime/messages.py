"""Every message that crosses a process boundary. Imports msgspec only.

One tagged union per link and direction; the link table:

    link                     sender -> receiver                     union
    submit (ipc/tcp)         frontend DEALER -> scheduler ROUTER    ToScheduler   (replies: FromScheduler)
    plans                    scheduler ROUTER -> worker DEALER      ToWorker      (replies: FromWorker)
    decisions                scheduler ROUTER -> output DEALER      ToOutput      (replies: FromOutput)
    chunks                   worker DEALER -> output ROUTER         ToChunks
    join                     torchrun's rank DEALER -> supervisor   ToJoin        (replies: FromJoin)
    events                   frontend DEALER -> output ROUTER       ToEvents      (replies: FromEvents)
    control                  supervisor ROUTER -> the children      ToControlled  (replies: FromControlled)

Tensors and media never travel in a message: they are extra ZMQ frames or slots in shared memory. Epochs: the scheduler
raises `scheduler_epoch` in its journal at each start; the supervisor raises `group_epoch` at each start of a group; a
message with an old epoch is ignored by its receiver. Identity of one try of a job is (job, attempt); of one output
image or video (job, attempt, index); `take` counts restarts of the decoding of one output (the output process died
while it encoded), so that chunks of an earlier take are recognised as stale.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec


class Wire(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all tagged messages; the tag is the class name."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of structs that appear only inside messages."""


# --------------------------------------------------------------------------------------------------------------------
# Requests


class MediaFormat(StrEnum):
    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"
    MP4 = "mp4"
    NPY = "npy"  # raw uint8 frames (F, H, W, 3)


class MediaSpec(Part):
    """How one output is written. `quality` is 0-100 for JPEG and WebP (None: the format's default)."""

    format: MediaFormat
    quality: int | None = None
    with_frames: bool = False  # also write the raw frames as .npy (--return-frames)


class InputImage(Part):
    """A picture that a request brings, as `runtime.inputs` keeps it."""

    sha256: str
    width: int
    height: int


class GenerationRequest(Part):
    """One job's work, complete: nothing is filled in after submission.

    `token_ids` maps "prompt" and "negative" (and "<encoder>.prompt", ... for families with several tokenizers) to ids
    without padding; the frontend cleans and tokenizes, workers never see raw text of another tokenizer.
    `seed` is always set (the frontend draws an unset one); output i uses seed + i. `previews` small pictures are made
    of each output while it is denoised.
    """

    prompt: str
    negative_prompt: str
    token_ids: dict[str, tuple[int, ...]]
    height: int
    width: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    num_outputs: int
    sampler: str
    media: MediaSpec
    images: tuple[InputImage, ...] = ()
    true_cfg_scale: float | None = None  # None where the family has none
    cfg_normalization: float | None = None  # the same
    cfg_truncation: float | None = None
    previews: int = 0


class ErrorInfo(Part):
    """A `runtime.errors` error on the wire."""

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


class Artifact(Part):
    """One finished file. `path` is absolute; `index` is the output's number within its job."""

    index: int
    path: str
    media_type: str
    nbytes: int
    sha256: str
    frames_path: str | None = None


class Stage(StrEnum):
    QUEUED = "queued"
    ENCODING = "encoding"
    DENOISING = "denoising"
    DECODING = "decoding"
    SAVING = "saving"


class Status(StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Priority(StrEnum):
    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


# --------------------------------------------------------------------------------------------------------------------
# submit: frontend <-> scheduler


class Submit(Wire):
    """The same (owner, job) with the same body returns the existing job; another body is a Conflict.

    `attached` jobs hold a lease that the client renews (RenewLease) every 2 s; 10 s without renewal cancels them.
    `deadline_s` is seconds from acceptance until the job is cancelled if it is not done. `origin` names the collection
    that lists the job ("videos"); it is no part of the body.
    """

    job: str  # ULID
    owner: str
    request: GenerationRequest
    attached: bool = True
    priority: Priority = Priority.NORMAL
    deadline_s: float | None = None
    origin: str = ""


class Cancel(Wire):
    job: str
    owner: str
    reason: str = "cancelled by the client"


class Forget(Wire):
    """Ends the job if it is not over, and deletes its record and its files."""

    job: str
    owner: str


class RenewLease(Wire):
    jobs: tuple[str, ...]
    owner: str


class QueryJob(Wire):
    job: str
    owner: str


class ListJobs(Wire):
    """A page of the owner's jobs of one origin in order of acceptance; `after` is the last job of the page before."""

    ask: str  # echoed by the answer
    owner: str
    origin: str
    after: str | None = None
    limit: int = 20
    descending: bool = True


class QueryStatus(Wire):
    """Readiness and load of the whole server."""


ToScheduler = Submit | Cancel | Forget | RenewLease | QueryJob | ListJobs | QueryStatus


class Accepted(Wire):
    job: str
    existing: bool = False
    position: int = 0
    predicted_ms: float | None = None


class Refused(Wire):
    """A submit, cancel or query that was not carried out."""

    job: str
    error: ErrorInfo


class CancelAccepted(Wire):
    job: str


class Forgotten(Wire):
    job: str


class JobInfo(Part):
    """What a job was asked for, and when. Times are seconds since 1970."""

    origin: str
    prompt: str
    height: int
    width: int
    num_frames: int
    fps: int
    num_inference_steps: int
    seed: int
    num_outputs: int
    created_at: float
    ended_at: float | None = None
    expires_at: float | None = None


class JobState(Wire):
    """`progress` is the share of steps and chunks that is done, `eta_ms` the time left with the work before it."""

    job: str
    stage: Stage
    status: Status | None = None  # set once terminal
    artifacts: tuple[Artifact, ...] = ()
    error: ErrorInfo | None = None
    info: JobInfo | None = None
    progress: float = 0.0
    position: int = 0
    eta_ms: float | None = None


class JobPage(Wire):
    ask: str
    jobs: tuple[JobState, ...]
    has_more: bool = False


class GroupState(Part):
    group: int
    group_epoch: int
    phase: str  # "starting", "loading", ..., "ready", "dead"
    ready_ranks: int
    world_size: int
    silent_s: float = 0.0  # since the last word of its quietest rank
    busy_ms: float = 0.0  # of computing, since this scheduler started


class ServerStatus(Wire):
    ready: bool
    draining: bool
    groups: tuple[GroupState, ...]
    output_alive: bool
    queued: int
    running: int
    output_silent_s: float = 0.0
    backlog_ms: float = 0.0  # predicted work of everything accepted
    stored_bytes: int = 0  # of the artifacts of ended jobs


FromScheduler = Accepted | Refused | CancelAccepted | Forgotten | JobState | JobPage | ServerStatus


# --------------------------------------------------------------------------------------------------------------------
# plans: scheduler <-> worker


class UnitRef(Part):
    """One denoising state, and the step (0-based) that it executes next."""

    job: str
    attempt: int
    index: int
    step: int


class CheckpointRef(Part):
    path: str
    step: int  # steps already done in the saved state
    sha256: str


class Encode(Wire):
    """Text encoding of a job: the worker keeps its conditioning under (job, attempt)."""

    job: str
    attempt: int
    request: GenerationRequest


class Prepare(Wire):
    """Make the denoising state of output `index`: fresh noise, or a checkpoint."""

    job: str
    attempt: int
    index: int
    resume: CheckpointRef | None = None


class Denoise(Wire):
    """Advance each unit by one step, in one batched forward when there are several."""

    units: tuple[UnitRef, ...]


class Decode(Wire):
    """Decode chunk `chunk` of an output into `slot`; chunk 0 starts with a fresh cursor (also when decoded before)."""

    job: str
    attempt: int
    index: int
    take: int
    chunk: int
    slot: int


class Checkpoint(Wire):
    """Save the state of an output after `step` steps (asynchronously: CheckpointCommitted follows)."""

    job: str
    attempt: int
    index: int
    step: int


class Preview(Wire):
    """Make the `number`-th preview (from 0) of an output that has done `step` steps: PreviewReady follows to output.

    A courtesy: what goes wrong with it is nobody's error, and nothing waits for it.
    """

    job: str
    attempt: int
    index: int
    number: int
    step: int


class Release(Wire):
    """Free the state of one finished output; the job's conditioning stays for its other outputs."""

    job: str
    attempt: int
    index: int


class Drop(Wire):
    """Free everything of (job, attempt). Unknown attempts are ignored."""

    job: str
    attempt: int


Op = Encode | Prepare | Denoise | Decode | Checkpoint | Preview | Release | Drop


class Plan(Wire):
    scheduler_epoch: int
    group: int
    group_epoch: int
    number: int  # from 0, without gaps, within (scheduler_epoch, group_epoch)
    ops: tuple[Op, ...]


class InventoryRequest(Wire):
    """A new scheduler's first message: ranks answer with Inventory and then accept plan 0 of its epoch."""

    scheduler_epoch: int


class Shutdown(Wire):
    reason: str


ToWorker = Plan | InventoryRequest | Shutdown


class OpResult(Part):
    """Outcome of one op, in plan order. `error` is an error of the job alone (the group stays healthy)."""

    ms: float = 0.0
    error: ErrorInfo | None = None
    last_chunk: bool = False  # Decode: no chunk follows
    frames: int = 0  # Decode: frames written to the slot


class PlanDone(Wire):
    """A rank finished a plan: all of its GPU work is complete."""

    scheduler_epoch: int
    group: int
    rank: int
    group_epoch: int
    number: int
    results: tuple[OpResult, ...]
    peak_bytes: int = 0


class PhaseReport(Wire):
    """A long start-up phase ("loading", "warming up", ...) and its own limit."""

    group: int
    rank: int
    group_epoch: int
    phase: str
    limit_s: float


class Ready(Wire):
    """A rank can take plans. Bytes are of its device (host memory on CPU)."""

    group: int
    rank: int
    world_size: int
    group_epoch: int
    capacity_bytes: int
    weights_bytes: int
    reserve_bytes: int
    device: str
    roles: tuple[str, ...] = ("encode", "denoise", "decode")
    encode_bytes: int = 0  # of weights that are on the device, beyond weights_bytes, only while it encodes


class GroupFailed(Wire):
    """This rank met an error that its group cannot survive; it exits after sending this."""

    group: int
    rank: int
    group_epoch: int
    error: ErrorInfo


class Heartbeat(Wire):
    """Twice a second from each rank, from its first moment; a new scheduler learns of ranks by it."""

    group: int
    rank: int
    world_size: int
    group_epoch: int
    pid: int
    ready: bool
    scheduler_epoch: int = -1  # of the last plan received
    last_received: int = -1
    last_done: int = -1


class HeldState(Part):
    job: str
    attempt: int
    index: int  # -1: conditioning only
    step: int


class Inventory(Wire):
    """`received_epoch`, `last_received`, `last_done`: the last plan received, of whichever scheduler epoch."""

    scheduler_epoch: int  # the asker's
    group: int
    rank: int
    group_epoch: int
    received_epoch: int
    last_received: int
    last_done: int
    states: tuple[HeldState, ...]


class CheckpointCommitted(Wire):
    group: int
    group_epoch: int
    job: str
    attempt: int
    index: int
    ref: CheckpointRef


class CheckpointFailed(Wire):
    """The job goes on; it only resumes from an earlier point if its group dies."""

    group: int
    group_epoch: int
    job: str
    attempt: int
    index: int
    error: ErrorInfo


FromWorker = (
    PhaseReport | Ready | PlanDone | GroupFailed | Heartbeat | Inventory | CheckpointCommitted | CheckpointFailed
)


# --------------------------------------------------------------------------------------------------------------------
# chunks: worker -> output


class ChunkReady(Wire):
    """A slot holds frames: uint8 (frames, height, width, 3), C order, `nbytes` after the slot's header.

    `remote`: they are the message's extra ZMQ frame (a worker on another host); the slot is the credit all the same.
    """

    job: str
    attempt: int
    index: int
    take: int
    chunk: int
    last: bool
    slot: int
    frames: int
    height: int
    width: int
    nbytes: int
    crc32: int
    remote: bool = False


class TensorRef(Part):
    """Describes a tensor in C order that is the message's extra ZMQ frame."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    crc32: int


class PreviewReady(Wire):
    """A preview: uint8 (h, w, 3), one pixel for each place of the latents, as an extra frame. Takes no slot."""

    job: str
    attempt: int
    index: int
    number: int
    step: int
    pixels: TensorRef


ToChunks = ChunkReady | PreviewReady


# --------------------------------------------------------------------------------------------------------------------
# decisions: scheduler <-> output


class OpenJob(Wire):
    """A job was accepted: output starts its event stream (again after either process restarted)."""

    job: str
    owner: str
    media: MediaSpec
    fps: int
    num_frames: int
    height: int
    width: int
    num_outputs: int


class OpenTake(Wire):
    """Chunks of this (attempt, index, take) will come; those of earlier takes and attempts are stale."""

    job: str
    attempt: int
    index: int
    take: int


class Progress(Wire):
    """Something a client may like to know. `step` of `steps` within `stage` of output `index`."""

    job: str
    stage: Stage
    index: int = 0
    step: int = 0
    steps: int = 0
    position: int = 0  # in the queue, 0 when running
    eta_ms: float | None = None


class DropOutput(Wire):
    """Abort what is being made of (job, attempt); answered by OutputDropped when no slot of it is read any more."""

    job: str
    attempt: int


class Publish(Wire):
    """The one terminal of a job, journalled before it is sent. Files of the job not listed are deleted."""

    job: str
    status: Status
    artifacts: tuple[Artifact, ...] = ()
    error: ErrorInfo | None = None


class OutputReset(Wire):
    """A new scheduler's first message: abandon every open take, keep committed files, answer OutputReady."""

    scheduler_epoch: int


ToOutput = OpenJob | OpenTake | Progress | DropOutput | Publish | OutputReset | Shutdown


class OutputHello(Wire):
    """Twice a second. `instance` is drawn at each start of the output process: a new value means that it restarted."""

    instance: str
    pid: int


class OutputReady(Wire):
    instance: str
    scheduler_epoch: int


class SlotReleased(Wire):
    """The chunk was read; the slot may be granted again. Matched exactly against the grant."""

    slot: int
    job: str
    attempt: int
    index: int
    take: int
    chunk: int


class ArtifactCommitted(Wire):
    """The file is renamed to its final name and fsynced."""

    job: str
    attempt: int
    take: int
    artifact: Artifact


class ArtifactFailed(Wire):
    job: str
    attempt: int
    index: int
    take: int
    error: ErrorInfo


class OutputDropped(Wire):
    job: str
    attempt: int


FromOutput = OutputHello | OutputReady | SlotReleased | ArtifactCommitted | ArtifactFailed | OutputDropped


# --------------------------------------------------------------------------------------------------------------------
# events: frontend <-> output


class Subscribe(Wire):
    """Stream the job's events from its current snapshot on; again with `after_seq` after a reconnect."""

    job: str
    owner: str
    after_seq: int = -1


class Unsubscribe(Wire):
    job: str
    owner: str


ToEvents = Subscribe | Unsubscribe


class Event(Wire):
    """`seq` grows by one per event of a job within one output instance; a terminal event has `status` set.

    Progress may be lost when output restarts, the terminal never (the scheduler publishes it again). `known` is False
    when output has no such job of this owner (yet): the subscription stays and fires when the job is opened.
    """

    job: str
    seq: int
    known: bool = True
    progress: Progress | None = None
    status: Status | None = None
    artifacts: tuple[Artifact, ...] = ()
    error: ErrorInfo | None = None


class PreviewMade(Wire):
    """A preview, encoded, as an extra frame; in the order of `seq` with a job's Events, and one of them fewer if the
    subscriber is slow. It comes at most once for each (index, number), in ascending order."""

    job: str
    seq: int
    index: int
    number: int
    step: int
    width: int
    height: int
    media_type: str
    nbytes: int


FromEvents = Event | PreviewMade


# --------------------------------------------------------------------------------------------------------------------
# control: supervisor <-> scheduler, output


class RankExited(Wire):
    """The supervisor saw a rank's process end (or killed it); the whole group is being killed and started again.

    Sent again on every ControlHeartbeat of a new scheduler instance, for the newest epoch of each group.
    """

    group: int
    group_epoch: int  # the dead one
    reason: str


class GroupStarting(Wire):
    """A group's processes were started with this epoch."""

    group: int
    group_epoch: int
    world_size: int


class GroupGivenUp(Wire):
    """A group failed to start too often; it will not come back. With no group left all its jobs fail."""

    group: int
    error: ErrorInfo


class Drain(Wire):
    """Accept nothing new, finish what runs within `grace_s` (then checkpoint detached jobs, cancel attached ones)."""

    grace_s: float


ToControlled = RankExited | GroupStarting | GroupGivenUp | Drain | Shutdown


class ControlHeartbeat(Wire):
    """Every second or oftener from each child to the supervisor. `instance` changes with each start."""

    role: str  # "scheduler" | "output" | "frontend"
    instance: str
    pid: int


class RankSilent(Wire):
    """No heartbeat for `seconds`: the supervisor looks at the process and kills the group if it is stopped or gone."""

    group: int
    rank: int
    group_epoch: int
    seconds: float


class KillGroup(Wire):
    """End this group: silent for too long, an op past its deadline, diverging inventories."""

    group: int
    group_epoch: int
    reason: str


class Drained(Wire):
    """Nothing runs and nothing is queued any more (or the grace is over)."""


FromControlled = ControlHeartbeat | RankSilent | KillGroup | Drained


# --------------------------------------------------------------------------------------------------------------------
# Process specifications (supervisor -> child, as bytes through a pipe)


class Endpoints(Part):
    """ZMQ endpoints; ipc paths live in a 0700 folder."""

    submit: str
    plans: str
    decisions: str
    chunks: str
    events: str
    control: str


class SlotPool(Part):
    """Frame slots: files `<folder>/slot-<n>` of header + `slot_bytes` each."""

    folder: str
    count: int
    slot_bytes: int


class SchedulerSpec(Part):
    endpoints: Endpoints
    journal: str  # path of the SQLite file
    checkpoint_dir: str
    model_path: str
    groups: int
    world_size: int  # ranks per group
    slots: SlotPool
    policy: str
    max_queue: int
    max_plan_ms: float | None
    checkpoint_every: int  # steps, 0: never
    log_level: str
    min_op_deadline_s: float = 30.0  # no plan is overdue before
    keys: str | None = None  # folder of the CURVE keys, for tcp endpoints
    artifact_ttl_s: float | None = None  # an ended job and its files are forgotten after this
    artifact_quota_bytes: int | None = None  # the oldest ended jobs are forgotten above this
    backend: str = "auto"
    trust_remote_code: bool = False
    input_dir: str = ""


class OutputSpec(Part):
    endpoints: Endpoints
    artifact_dir: str
    slots: SlotPool
    encode_threads: int
    log_level: str
    keys: str | None = None


class RequestLimits(Part):
    """What the frontend refuses before any work."""

    max_pixels: int
    max_frames: int
    max_steps: int
    max_outputs: int
    max_body_bytes: int
    max_input_bytes: int  # of bodies that may bring pictures


class ServedModel(Part):
    """What clients are told of the model; `root` is its directory on this host."""

    id: str
    root: str
    num_gpus: int
    dit_precision: str
    vae_precision: str
    backend: str = "auto"
    trust_remote_code: bool = False
    vae_path: str | None = None  # of another VAE


class FrontendSpec(Part):
    """`listen_fd` is a bound, listening socket that the child inherits. `api_keys`: (owner, key); none: no check."""

    endpoints: Endpoints
    listen_fd: int
    model: ServedModel
    limits: RequestLimits
    api_keys: tuple[tuple[str, str], ...]
    log_level: str
    input_dir: str  # where pictures of requests are kept
    allow_url_inputs: bool = False


class WorkerSpec(Part):
    endpoints: Endpoints
    group: int
    rank: int
    world_size: int
    group_epoch: int
    local_rank: int
    store: str  # "file:///..." of the group's own torch store, or "env://PREFIX" in the store that torchrun runs
    model_path: str
    vae_path: str | None
    device: str  # "cpu" | "cuda"
    dit_precision: str
    vae_precision: str
    checkpoint_dir: str  # empty: not every rank sees the server's folder, so there are no checkpoints
    slots: SlotPool | None  # None: on another host, so that frames travel with their message
    num_threads: int
    ranks_on_host: int  # they share its memory
    log_level: str
    cfg_degree: int = 1  # cfg x ring x ulysses is world_size
    ring_degree: int = 1
    ulysses_degree: int = 1
    sp_impl: str = "native"
    ulysses_transport: str = "auto"
    attention_backend: str = "auto"
    vae_tiling: bool = False
    tp_size: int = 1  # ranks that share the text encoder's matrices
    encoder_sets: int = 1  # sets of so many ranks that share the prompts
    keys: str | None = None
    interface: str | None = None  # of NCCL and gloo
    input_dir: str = ""
    backend: str = "auto"  # this and what follows: of pipelines that diffusers runs
    trust_remote_code: bool = False
    vae_slicing: bool = False
    diffusers_attention_backend: str | None = None
    diffusers_kwargs: dict[str, Any] = {}
    offload: tuple[str, ...] = ()  # components whose weights live on the CPU
    pin_cpu_memory: bool = True
    cuda_graphs: bool = True


# --------------------------------------------------------------------------------------------------------------------
# join: a rank that torchrun started <-> supervisor


class Join(Wire):
    """Twice a second from a rank, from its first moment to its end. `instance` is drawn by each process."""

    instance: str
    run: str  # torchrun's job id
    rank: int  # of torchrun's world
    world_size: int
    local_rank: int
    local_world_size: int
    device: str
    version: str
    waiting: bool  # for the Welcome


ToJoin = Join | PhaseReport | Ready | GroupFailed


class Noted(Wire):
    """Answers every Join: the server lives. `joined` ranks are here."""

    joined: int


class Welcome(Wire):
    """All ranks are here: the rank's specification, to be completed with what differs between hosts.

    `model` is what --model-path named (None: the built-in model), `host` the server's kernel, `marker` the name of a
    file in the checkpoint folder.
    """

    spec: WorkerSpec
    model: str | None
    host: str
    marker: str


class JoinRefused(Wire):
    """This rank cannot work for this server; it ends with the error."""

    error: ErrorInfo


class Leave(Wire):
    """The rank ends: for good, or (`failed`) so that torchrun starts its ranks again."""

    reason: str
    failed: bool


FromJoin = Noted | Welcome | JoinRefused | Leave
