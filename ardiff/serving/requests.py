"""Reads the body of a request: JSON, or a form with a file."""

import json
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from ardiff.serving.config import RequestLimits
from ardiff.serving.errors import RequestError, invalid
from ardiff.serving.schemas import RequestBase, VideoRequest, maximum_values

UPLOAD = "input_reference"
"""Field of a form that holds the uploaded picture or clip."""


async def read_request(request: Request) -> tuple[RequestBase, bytes | None]:
    """The fields and the upload of a request. Raises RequestError 400, 415 or 422."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/json":
        return _validate(_parse_json(await request.body()), strict=True), None
    if media_type != "multipart/form-data":
        raise RequestError(415, "unsupported_type", "Send application/json, or multipart/form-data with a file.")
    try:
        form = await request.form(max_files=1, max_fields=32, max_part_size=2**16)
    except HTTPException as error:
        raise RequestError(400, "malformed", f"The form cannot be read: {error.detail}") from error
    try:
        fields: dict[str, Any] = {}
        upload = None
        for name, value in form.multi_items():
            if name in fields or (name == UPLOAD and upload is not None):
                raise invalid(name[:64], f"{name[:64]} is given twice.")
            if isinstance(value, UploadFile) != (name == UPLOAD):
                raise invalid(name[:64], f"{UPLOAD} must be a file, and no other field may be one.")
            if isinstance(value, UploadFile):
                upload = await value.read()
            elif value:
                fields[name] = value
    finally:
        await form.close()
    return _validate(fields, strict=False), upload


def validation_error(errors: Any) -> RequestError:
    """422 for the first of pydantic's errors."""
    error = errors[0]
    path = [str(part) for part in error["loc"] if part not in ("query", "path", "body")]
    param = path[0][:64] if path else None
    return invalid(param, f"{param or 'The body'}: {error['msg'][0].lower()}{error['msg'][1:200]}.")


def document_body(limits: RequestLimits) -> dict[str, Any]:
    """The body of a request for the OpenAPI document, with the limits of this service."""
    schema = VideoRequest.model_json_schema()
    properties = schema["properties"]
    for name, maximum in maximum_values(limits).items():
        number = properties[name].get("anyOf", [properties[name]])[0]  # an optional field lists its types
        number["maximum"] = maximum
    upload = {
        "type": "string",
        "format": "binary",
        "description": "A picture (PNG, JPEG, WebP) or a short clip, which the video continues.",
    }
    form = {**schema, "properties": {**properties, UPLOAD: upload}}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


def _parse_json(body: bytes) -> Any:
    def reject(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        fields = json.loads(body, parse_constant=reject)
        json.dumps(fields, ensure_ascii=False).encode()  # rejects half a surrogate pair, which no response can hold
        return fields
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "malformed", "The body is not valid JSON.") from error


def _validate(fields: Any, strict: bool) -> RequestBase:
    try:
        return VideoRequest.model_validate(fields, strict=strict)
    except ValidationError as error:
        raise validation_error(error.errors()) from error
