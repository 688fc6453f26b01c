"""Reads the body of a request: JSON, or a form with a file."""

import base64
import binascii
import json
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from ardiff.serving.config import RequestLimits
from ardiff.serving.errors import RequestError, invalid
from ardiff.serving.records import JobRecord
from ardiff.serving.schemas import (
    ChangeRequest,
    ConditionBase,
    ExtensionRequest,
    RequestBase,
    VideoRequest,
    maximum_values,
)

BodyT = TypeVar("BodyT", bound=BaseModel)
UPLOAD = "input_reference"
"""Field that holds the picture or clip that the video continues."""
MAX_FIELDS = 32
"""Fields of a form."""


async def read_request(request: Request) -> tuple[RequestBase, bytes | None]:
    """The fields and the upload of a request for a video. Raises RequestError 400, 415 or 422."""
    fields, is_json = await _read_fields(request)
    reference = fields.pop(UPLOAD, None) if isinstance(fields, dict) else None
    return _validate(VideoRequest, fields, is_json), _upload(reference)


async def read_extension(request: Request) -> tuple[ExtensionRequest, bytes | None]:
    """The fields of a request for a longer video, and its upload if there is one. Raises RequestError 400, 415, 422."""
    fields, is_json = await _read_fields(request)
    upload = fields.get("video") if isinstance(fields, dict) else None
    if isinstance(upload, bytes):
        return _validate(ExtensionRequest, {**fields, "video": None}, is_json), upload
    extension = _validate(ExtensionRequest, fields, is_json)
    if extension.video is None:
        raise invalid("video", "video must be the id of a completed video, or a file of a form.")
    return extension, None


async def read_change(request: Request) -> ConditionBase:
    """The fields of a change. Raises RequestError 400, 415 or 422."""
    return _validate(ChangeRequest, *await _read_fields(request))


def extension_of(source: JobRecord | None, extension: ExtensionRequest) -> RequestBase:
    """The request for the new frames of a longer video, with the settings of the video that it continues, if known."""
    fields: dict[str, Any] = {"prompt": extension.prompt}
    if source is not None:
        last = source.sampling.condition_of(source.sampling.num_frames - 1).changes()
        params = asdict(source.sampling) | last | {"conditions": []}
        fields |= {name: value for name, value in params.items() if name in VideoRequest.model_fields}
        fields |= {"model": source.model, "fps": source.fps, "seed": None, "ar_step": None}
        if extension.prompt is not None:
            fields["prompt"] = extension.prompt
            if source.params.get("prompt") is None:  # the prompt of a model without text is its class
                fields["class_label"] = None
        fields.pop("num_frames")
    return _validate(VideoRequest, fields | {"seconds": extension.seconds}, is_json=False)


def check_extensible(source: JobRecord, limits: RequestLimits) -> None:
    """Raises RequestError 422 for a video that is too long."""
    if source.sampling.num_frames > limits.upload_frames:
        raise invalid("video", f"A video of at most {limits.upload_frames} frames can be extended.")


def validation_error(errors: Any) -> RequestError:
    """422 for the first of pydantic's errors."""
    error = errors[0]
    path = [str(part) for part in error["loc"] if part not in ("query", "path", "body", "header")]
    param = path[0][:64] if path else None
    return invalid(param, f"{param or 'The body'}: {error['msg'][0].lower()}{error['msg'][1:200]}.")


def document_body(limits: RequestLimits) -> dict[str, Any]:
    """The body of a request for the OpenAPI document, with the limits of this service."""
    schema = VideoRequest.model_json_schema()
    properties = schema["properties"]
    for name, maximum in maximum_values(limits).items():
        number = properties[name].get("anyOf", [properties[name]])[0]  # an optional field lists its types
        number["maximum"] = maximum
    about = "A picture (PNG, JPEG, WebP) or a short clip, which the video continues"
    upload = {"type": "string", "format": "binary", "description": f"{about}."}
    link = {"type": "string", "pattern": "^data:", "description": f"{about}, as a data URL."}
    reference = {"type": "object", "properties": {"image_url": link}, "required": ["image_url"]}
    return _document(
        json_schema=schema | {"properties": properties | {UPLOAD: reference}},
        form_schema=schema | {"properties": properties | {UPLOAD: upload}},
    )


def document_change() -> dict[str, Any]:
    """The body of a change, for the OpenAPI document."""
    schema = ChangeRequest.model_json_schema()
    return _document(json_schema=schema, form_schema=schema)


def document_extension() -> dict[str, Any]:
    """The body of a request for a longer video, for the OpenAPI document."""
    schema = ExtensionRequest.model_json_schema()
    reference = schema.pop("$defs")["VideoReference"]
    upload = {"type": "string", "format": "binary", "description": "A picture or a short clip."}
    forms = {"json_schema": reference, "form_schema": upload}
    return _document(
        **{kind: schema | {"properties": schema["properties"] | {"video": video}} for kind, video in forms.items()}
    )


def _document(json_schema: dict[str, Any], form_schema: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": json_schema}, "multipart/form-data": {"schema": form_schema}}
    return {"requestBody": {"required": True, "content": content}}


async def _read_fields(request: Request) -> tuple[Any, bool]:
    """The fields of a body, files as bytes, and whether it is JSON."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError(415, "unsupported_encoding", "Compressed bodies are not supported: send the body as it is.")
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/json":
        return _parse_json(await request.body()), True
    if media_type != "multipart/form-data":
        raise RequestError(415, "unsupported_type", "Send application/json, or multipart/form-data with a file.")
    body = await request.body()
    boundary = parse_options_header(request.headers["content-type"])[1].get(b"boundary", b"")
    if b"--" + boundary + b"--" not in body:  # the parser of forms accepts the beginning of one
        raise RequestError(400, "malformed", "The form cannot be read: its closing boundary is missing.")
    try:
        form = await request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=len(body))
    except HTTPException as error:
        raise RequestError(400, "malformed", f"The form cannot be read: {error.detail}") from error
    try:
        fields: dict[str, Any] = {}
        for name, value in form.multi_items():
            outer, bracket, inner = name.partition("[")
            if bracket:  # other clients send {"video": {"id": "x"}} as video[id]=x
                group = fields.setdefault(outer, {})
                if not isinstance(group, dict):
                    raise invalid(outer[:64], f"{outer[:64]} is given twice.")
                outer, fields_of_name = inner.removesuffix("]"), group
            else:
                fields_of_name = fields
            if outer in fields_of_name:
                raise invalid(name[:64], f"{name[:64]} is given twice.")
            if isinstance(value, UploadFile) and name not in (UPLOAD, "video"):
                raise invalid(name[:64], f"{name[:64]} must not be a file.")
            if isinstance(value, UploadFile):
                fields_of_name[outer] = await value.read()
            elif value:
                fields_of_name[outer] = value
    finally:
        await form.close()
    return fields, False


def _upload(reference: Any) -> bytes | None:
    """The bytes of a picture or clip: a file of a form, or a data URL."""
    match reference:
        case None | bytes():
            return reference
        case {"image_url": str(url)} if len(reference) == 1 and url.startswith("data:") and ";base64," in url:
            try:
                return base64.b64decode(url.partition(";base64,")[2], validate=True)
            except binascii.Error as error:
                raise invalid(UPLOAD, f"The data URL of {UPLOAD} is not valid base64.") from error
    raise invalid(UPLOAD, f"{UPLOAD} must be a file of a form, or an image_url with a data URL (data:TYPE;base64,...).")


def _parse_json(body: bytes) -> Any:
    def reject(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        fields = json.loads(body, parse_constant=reject)
        json.dumps(fields, ensure_ascii=False).encode()  # rejects half a surrogate pair, which no response can hold
        return fields
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "malformed", "The body is not valid JSON.") from error


def _validate(model: type[BodyT], fields: Any, is_json: bool) -> BodyT:
    try:
        return model.model_validate(fields, strict=is_json)
    except ValidationError as error:
        raise validation_error(error.errors()) from error
