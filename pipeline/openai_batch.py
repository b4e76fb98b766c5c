"""OpenAI's batch files: their lines to prompts, and results and rejects back to lines of output and error
files.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}      a line of the
    input {"id": ..., "custom_id": "a", "response": {"status_code": 200, ...}, "error": null}    of the output
    {"id": ..., "custom_id": "b", "response": {"status_code": 400, ...}, "error": null}    of the errors

A line is a function of its row and of the run's `created` time alone, ids included, so a run that was killed
and resumed writes the bytes of one that was not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from engine.errors import ModelError, RequestError
from engine.openai_requests import OpenAIRequest, Prompt, parse_request
from engine.openai_responses import AnswerHead, Parse, chat_completion, text_completion
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from pipeline.fingerprint import canonical_json
from pipeline.forms import Content, column_of
from pipeline.rows import REASONS, BatchAnswer, Refused, SourceRow
from pipeline.rows import Prompt as RowPrompt
from pipeline.shards import CUSTOM_ID
from pipeline.strict_json import has_lone_surrogate

COLUMNS = frozenset({"method", "url", "body"})
MakeAnswer = Callable[[RowPrompt, RequestOutput], str]


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A line that was understood: what is generated, how, and what its answer is made with."""

    content: Content
    sampling: SamplingParams
    answer: BatchAnswer


class BatchForms:
    """Reads lines of a batch file.

    Args:
        defaults: the sampling of what a body leaves out.
        endpoint, served_model: what every line has to name; None takes any endpoint, any model.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        defaults: SamplingParams,
        *,
        endpoint: str | None,
        served_model: str | None,
        max_prompt_chars: int,
    ):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._defaults = defaults
        self._endpoint = endpoint
        self._served_model = served_model
        self._max_prompt_chars = max_prompt_chars

    @property
    def columns(self) -> frozenset[str]:
        return COLUMNS

    @property
    def template_sources(self) -> dict[str, str | None]:
        return {"chat_template": getattr(self._tokenizer, "chat_template", None) or None}

    def read(self, row: SourceRow) -> BatchRow:
        """What the line asks for. Raises Refused."""
        if not isinstance(custom_id := column_of(row, CUSTOM_ID, "input.id_column"), str):
            raise Refused("wrong_type", f"custom_id is a {type(custom_id).__name__}; give text", custom_id)
        method = row.columns.get("method")
        if method != "POST":
            raise Refused(
                "bad_method", f"method is {str(method)[:40]!r}; every line has the method POST", method
            )
        url = row.columns.get("url")
        if self._endpoint is not None and url != self._endpoint:
            message = f"url is {str(url)[:80]!r}; this batch is for {self._endpoint} alone"
            raise Refused("bad_url", message, url)
        body = column_of(row, "body", "a body")
        try:
            request = parse_request(str(url), body, self._defaults)
            self._check(request)
            content = self._content(request.prompts[0])
        except RequestError as error:
            raise Refused(error.reason, str(error), body) from error
        except ModelError as error:
            raise Refused("template_error", str(error), body) from error
        answer = BatchAnswer(request.model, request.has_max_tokens, request.options)
        return BatchRow(content, request.sampling, answer)

    def _check(self, request: OpenAIRequest) -> None:
        if self._served_model not in (None, request.model):
            message = f"model: {request.model[:80]!r} is not the model of this batch, {self._served_model!r}"
            raise RequestError("wrong_model", message, "model")
        if request.options.stream:
            raise RequestError("not_supported", "stream: a batch cannot stream; leave it out", "stream")
        if len(request.prompts) != 1:
            message = f"prompt: has {len(request.prompts)} prompts; give each a line of its own"
            raise RequestError("not_supported", message, "prompt")
        request.sampling.check_vocab(self._vocab_size)

    def _content(self, prompt: Prompt) -> Content:
        if isinstance(prompt, tuple):
            for token in prompt:
                if not 0 <= token < self._vocab_size:
                    raise RequestError(
                        "bad_token_id",
                        f"prompt: {token} is no token; ids go from 0 to {self._vocab_size - 1}",
                    )
            return Content(None, None, list(prompt))
        if isinstance(prompt, str):
            return Content(self._checked(prompt), None, None)
        if sum(len(message["content"]) for message in prompt.messages) > self._max_prompt_chars:
            self._checked("".join(message["content"] for message in prompt.messages))
        return Content(self._checked(prompt.text(self._tokenizer)), list(prompt.messages), None)

    def _checked(self, text: str) -> str:
        if len(text) > self._max_prompt_chars:
            limit = f"{self._max_prompt_chars} (prompt.max_prompt_chars)"
            raise RequestError("prompt_too_long", f"a text of {len(text)} characters, more than {limit}")
        if has_lone_surrogate(text):
            raise RequestError("lone_surrogate", "the prompt holds half of a surrogate pair; mend the text")
        return text


def answers(tokenizer: Any, created: int) -> MakeAnswer:
    """What makes the bodies of responses, as JSON text. `created`: Unix seconds that they bear."""
    template = getattr(tokenizer, "chat_template", None)
    return partial(_answer, tokenizer, template if isinstance(template, str) else None, created)


def _answer(
    tokenizer: Any, template: str | None, created: int, prompt: RowPrompt, output: RequestOutput
) -> str:
    answer = prompt.answer
    assert answer is not None, "a row of a batch file"
    options = answer.options
    is_chat = options.kind == "chat.completion"
    asked = [prompt.row_id, created, list(prompt.token_ids), asdict(prompt.sampling), answer.model]
    head = AnswerHead(
        id=f"{'chatcmpl' if is_chat else 'cmpl'}-{_digest(asked)}", created=created, model=answer.model
    )
    if is_chat:
        parse = _parser(template, prompt.text, options.tool_use.tools)
        body = chat_completion(output, options, head, tokenizer, parse, with_cached_tokens=False)
    else:
        # The row's own text: the engine was given tokens.
        output = replace(output, prompt=prompt.text)
        body = text_completion([output], options, head, tokenizer, with_cached_tokens=False)
    return _json(body)


def _parser(template: str | None, prompt: str | None, tools: Sequence[Mapping[str, Any]]) -> Parse | None:
    """What takes this model's texts apart; None where its template shows no reasoning and there are no
    tools."""
    from engine.parsers import choose_parsers, ends_inside_reasoning, parse_message

    tool, reasoning = choose_parsers(template)
    # A template without tools has them told in the form of Hermes.
    tool = (tool or "hermes") if tools else None
    if tool is None and reasoning is None:
        return None
    inside = ends_inside_reasoning(prompt or "", reasoning)
    return lambda text: parse_message(text, tool, reasoning, tools, inside_reasoning=inside)


def output_line(custom_id: str, body: str) -> str:
    """A line of the output file, from a response's body as JSON text."""
    request_id = _digest([custom_id, body])
    response = {"status_code": 200, "request_id": request_id, "body": json.loads(body)}
    line = {"id": f"batch_req_{request_id}", "custom_id": custom_id, "response": response, "error": None}
    return _json(line) + "\n"


def error_line(reject: Mapping[str, Any]) -> str:
    """A line of the error file, from a line of rejects/: a response for what the client can mend."""
    reason, message, custom_id = reject["reason"], reject["message"], reject["row_id"]
    if reason not in REASONS:
        return not_run_line(custom_id, reject["position"], reason, message)
    request_id = _digest([custom_id, reject["position"], reason, message])
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": reason}
    response = {"status_code": 400, "request_id": request_id, "body": {"error": error}}
    line = {"id": f"batch_req_{request_id}", "custom_id": custom_id, "response": response, "error": None}
    return _json(line) + "\n"


def not_run_line(custom_id: str | None, position: int, code: str, message: str) -> str:
    """A line of the error file for a row that has no result through no fault of its own."""
    line = {
        "id": f"batch_req_{_digest([custom_id, position, code, message])}",
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }
    return _json(line) + "\n"


def _digest(value: Any) -> str:
    return hashlib.blake2b(canonical_json(value), digest_size=12).hexdigest()


def _json(value: Any) -> str:
    # A lone surrogate has no UTF-8 form.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace").decode("utf-8")
