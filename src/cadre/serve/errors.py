"""What a client is told when something is wrong: OpenAI's error object, whatever the cause."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from cadre.errors import UsageError, one_line

# A message may quote the request, which may be megabytes.
_LONGEST = 600

# Of pydantic's names for the branches of a union.
_BRANCH = re.compile(r"(constrained-)?(str|list|dict|function-after)($|\[)")

# FastAPI's own refusals, in our words.
_SAID = {
    400: (
        "the body cannot be read as JSON: it is not UTF-8, is nested too deeply, or has a number of thousands of digits",
        "invalid_json",
    ),
    404: ("there is nothing at this address: the API is under /v1", "not_found"),
    405: ("this address does not take this method", "method_not_allowed"),
}


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's shape of an error."""

    error: ErrorObject


class ApiError(Exception):
    """A refusal that the client can act on. `param` names the field at fault, `code` is for programs to read."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code, self.headers = status, kind, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        message = one_line(self)
        if len(message) > _LONGEST:
            message = message[:_LONGEST] + "..."
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def json(self) -> bytes:
        # ASCII: a quoted half of a surrogate pair has no UTF-8.
        return json.dumps(self.body).encode("ascii")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(message: str, param: str) -> ApiError:
    """A field whose meaning this server cannot honour: ignoring it would give another output than asked for."""
    return bad_request(message, param, "unsupported_parameter")


def server_error(status: int, message: str, code: str, *, retry: bool | None = None) -> ApiError:
    """`retry`: whether the `openai` client should try again; None leaves it to the status."""
    headers = None if retry is None else {"x-should-retry": "true" if retry else "false"}
    return ApiError(status, message, kind="server_error", code=code, headers=headers)


def too_late() -> ApiError:
    # The same again would take as long: the client should not simply repeat it.
    return server_error(504, "the request took longer than this server allows", "deadline_exceeded", retry=False)


class ErrorResponse(JSONResponse):
    def __init__(self, error: ApiError) -> None:
        super().__init__(error, error.status, error.headers)

    def render(self, content: ApiError) -> bytes:
        return content.json


def install_handlers(app: FastAPI) -> None:
    """Give every error that reaches the application OpenAI's shape."""

    async def refused(_: Request, error: Exception) -> ErrorResponse:
        return ErrorResponse(as_api_error(error))

    for kind in (ApiError, UsageError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, refused)


def as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError):
        return bad_request(str(error))
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors())
    if isinstance(error, HTTPException):
        said = _SAID.get(error.status_code)
        message, code = said or (str(error.detail), "request_too_large" if error.status_code == 413 else None)
        return ApiError(error.status_code, message, code=code, headers=error.headers)
    return server_error(500, "the server failed at this request; its log says why", "internal_error")


def _invalid(problems: Sequence[Any]) -> ApiError:
    """The first of pydantic's complaints in one line."""
    first = problems[0]
    if first["type"] == "json_invalid":
        what = f"{first['ctx']['error']} at character {first['loc'][-1]}"
        return bad_request(f"the body is not JSON: {what}", code="invalid_json")
    field = first["loc"][:2]
    if len(field) < 2:
        if first["type"] in ("value_error", "string_unicode"):
            return bad_request(_said(first))
        missing = "there is no body: " if first["type"] == "missing" else ""
        wanted = "the body must be a JSON object, sent as Content-Type: application/json"
        return bad_request(missing + wanted, code="invalid_body")
    param = str(field[1])
    if first["type"] == "extra_forbidden":
        return unsupported(f"{_dotted(first)} is not a field that this server knows", param)
    own = [problem for problem in problems if problem["loc"][:2] == field]
    # Of a union, pydantic complains about every branch: the branch that the value got furthest into is the one meant.
    best = max(own, key=lambda problem: (not problem["type"].endswith("_type"), len(problem["loc"])))
    if len(own) > 1 and best["type"].endswith("_type") and len(best["loc"]) <= 3:
        return bad_request(f"{param} has none of the types that it may have: {_either(own)}", param)
    return bad_request(f"{_dotted(best)}: {_said(best)}", param)


def _either(problems: Sequence[Any]) -> str:
    said = (_said(problem).removeprefix("Input should be a valid ") for problem in problems)
    return " or ".join(dict.fromkeys(said))


def _said(problem: Any) -> str:
    return str(problem["msg"]).removeprefix("Value error, ")


def _dotted(problem: Any) -> str:
    """Where in the body, without the names that pydantic gives to a union's branches."""
    return ".".join(str(part) for part in problem["loc"][1:] if isinstance(part, int) or not _BRANCH.match(part))
