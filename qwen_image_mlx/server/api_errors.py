"""Errors as HTTP responses: one sentence and a code, in this API's format or in OpenAI's.

The messages never mention the server's files. The details are logged where the error occurs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..outside import one_line

STATUS = {
    "malformed": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "slow": 408,
    "cancelled": 409,
    "too_large": 413,
    "unsupported_media_type": 415,
    "misdirected": 421,
    "invalid_request": 422,
    "queue_full": 429,
    "internal": 500,
    "busy": 503,
    "gpu_error": 503,
    "model_error": 503,
    "rank_error": 503,
    "stopping": 503,
    "timeout": 504,
}
INTERNAL = "internal error; the server's log says more"
OPENAI_PREFIX = "/v1/"
_MAX_LENGTH = 400  # characters of a message


class ApiError(Exception):
    """A request that the server refuses or cannot complete.

    Args:
        code: a key of `STATUS`.
        message: one sentence for the user.
        headers: headers of the response, such as Retry-After.
        param: the invalid field, if known.
    """

    def __init__(self, code: str, message: str, headers: Mapping[str, str] | None = None, param: str | None = None):
        super().__init__(message)
        self.code = code
        self.message: str = one_line(message, _MAX_LENGTH)
        self.headers: dict[str, str] = dict(headers or {})
        self.param = param

    def status(self, path: str) -> int:
        """HTTP status; OpenAI's API uses 400 for errors that are 422 here."""
        status = STATUS[self.code]
        return 400 if status == 422 and path.startswith(OPENAI_PREFIX) else status

    def body(self, path: str) -> bytes:
        """The error as JSON, in the format of the API that `path` belongs to."""
        error: dict[str, Any] = {"message": self.message, "code": self.code}
        if path.startswith(OPENAI_PREFIX):
            kind = "server_error" if STATUS[self.code] >= 500 else "invalid_request_error"
            error |= {"type": kind, "param": self.param}
        return dumps({"error": error})


def dumps(value: Any) -> bytes:
    """Compact JSON; raises ValueError for NaN and infinity."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
