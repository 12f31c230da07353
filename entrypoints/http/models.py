"""/v1/models, and SGLang Diffusion's /models."""

from __future__ import annotations

import json

from starlette.requests import Request
from starlette.responses import Response

from safelight.configs.families import ModelSpec
from safelight.entrypoints.http import replies
from safelight.entrypoints.http.schemas import Model, ModelInfo, ModelList
from safelight.entrypoints.http.service import Service

_TASKS = {"text-to-video": "T2V", "text-to-image": "T2I", "image-to-video": "I2V", "image-to-image": "I2I"}


async def list_models(request: Request) -> Response:
    """GET /v1/models."""
    return replies.json(ModelList(data=[_model(request)]))


async def get_model(request: Request) -> Response:
    """GET /v1/models/{model}; the id may have slashes."""
    service: Service = request.app.state.service
    service.translator.check_model(request.path_params["model"])
    return replies.json(_model(request))


async def model_info(request: Request) -> Response:
    """GET /models."""
    service: Service = request.app.state.service
    model, spec = service.translator.model, service.translator.spec
    reply = ModelInfo(
        model_path=model.id,
        task_type=_TASKS.get(spec.task, spec.task),
        pipeline_name=spec.variant,
        pipeline_class=_pipeline_class(spec),
        num_gpus=model.num_gpus,
        dit_precision=model.dit_precision,
        vae_precision=model.vae_precision,
    )
    return replies.json(reply)


def _pipeline_class(spec: ModelSpec) -> str:
    """As the checkpoint names it; of a class of its own, without the file."""
    if spec.call is not None:
        return spec.call.name
    index = json.loads((spec.root / "model_index.json").read_text(encoding="utf-8"))
    return str(index.get("_class_name"))


def _model(request: Request) -> Model:
    service: Service = request.app.state.service
    return Model(id=service.translator.model.id, created=request.app.state.started_at)
