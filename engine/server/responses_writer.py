"""Writes a response's output items from the parts of its text, and the events that tell of them.

    output_item.added   content_part.added   ... .delta ...   ... .done   content_part.done   output_item.done

One item is open at a time; a part of another kind closes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from engine.parsers import ContentDelta, Event, ReasoningDelta, ToolCallStart
from engine.server.generation import new_id
from engine.server.logprobs import ChatToken
from engine.server.responses_answer import (
    FunctionCall,
    OutputItem,
    OutputMessage,
    OutputText,
    Reasoning,
    ReasoningText,
    Status,
)

Told = dict[str, Any]
"""An event, but for its sequence number."""


class ResponseWriter:
    """`items` are those written so far; the last one may be open."""

    def __init__(self) -> None:
        self.items: list[OutputItem] = []
        self._is_open = False

    def write(self, events: Iterable[Event], logprobs: list[ChatToken]) -> Iterator[Told]:
        """Take in what became certain; `logprobs` are of the text's new tokens, and go to the next text."""
        for event in events:
            if isinstance(event, ContentDelta):
                yield from self._text(event.text, logprobs)
                logprobs = []
            elif isinstance(event, ReasoningDelta):
                yield from self._reasoning(event.text)
            elif isinstance(event, ToolCallStart):
                yield from self.close("completed")
                yield from self._open(_begun_call(event.name))
            else:
                yield from self._arguments(event.text)

    def close(self, status: Status) -> Iterator[Told]:
        """Close the item that is open, if one is."""
        if not self._is_open:
            return
        self._is_open = False
        item = self.items[-1]
        item.status = status
        if isinstance(item, FunctionCall):
            yield self._told("function_call_arguments.done", arguments=item.arguments, name=item.name)
        elif isinstance(item, OutputMessage):
            part = item.content[0]
            logprobs = [entry.model_dump() for entry in part.logprobs]
            yield self._told("output_text.done", content_index=0, text=part.text, logprobs=logprobs)
            yield self._told("content_part.done", content_index=0, part=part.model_dump())
        else:
            yield self._told("reasoning_text.done", content_index=0, text=item.content[0].text)
            yield self._told("content_part.done", content_index=0, part=item.content[0].model_dump())
        yield self._item_told("output_item.done")

    def finish(self, status: Status) -> Iterator[Told]:
        """The text has ended. A response of no parts at all has an empty message."""
        if not self.items:
            yield from self._text("", [])
        yield from self.close(status)

    def _text(self, text: str, logprobs: list[ChatToken]) -> Iterator[Told]:
        if not (self._is_open and isinstance(self.items[-1], OutputMessage)):
            yield from self.close("completed")
            message = OutputMessage(id=new_id("msg"), status="in_progress", content=[])
            yield from self._open(message)
            message.content.append(OutputText(text=""))
            yield self._told("content_part.added", content_index=0, part=message.content[0].model_dump())
        item = self.items[-1]
        assert isinstance(item, OutputMessage)
        item.content[0].text += text
        item.content[0].logprobs += logprobs
        if text:
            told = [entry.model_dump() for entry in logprobs]
            yield self._told("output_text.delta", content_index=0, delta=text, logprobs=told)

    def _reasoning(self, text: str) -> Iterator[Told]:
        if not (self._is_open and isinstance(self.items[-1], Reasoning)):
            yield from self.close("completed")
            reasoning = Reasoning(id=new_id("rs"), status="in_progress", content=[])
            yield from self._open(reasoning)
            reasoning.content.append(ReasoningText(text=""))
            yield self._told("content_part.added", content_index=0, part=reasoning.content[0].model_dump())
        item = self.items[-1]
        assert isinstance(item, Reasoning)
        item.content[0].text += text
        yield self._told("reasoning_text.delta", content_index=0, delta=text)

    def _arguments(self, text: str) -> Iterator[Told]:
        item = self.items[-1]
        assert isinstance(item, FunctionCall)
        item.arguments += text
        yield self._told("function_call_arguments.delta", delta=text)

    def _open(self, item: OutputItem) -> Iterator[Told]:
        self.items.append(item)
        self._is_open = True
        yield self._item_told("output_item.added")

    def _item_told(self, kind: str) -> Told:
        item = self.items[-1].model_dump()
        return {"type": f"response.{kind}", "output_index": len(self.items) - 1, "item": item}

    def _told(self, kind: str, **facts: Any) -> Told:
        place = {"item_id": self.items[-1].id, "output_index": len(self.items) - 1}
        return {"type": f"response.{kind}", **place, **facts}


def _begun_call(name: str) -> FunctionCall:
    call_id = new_id("call")
    return FunctionCall(id=new_id("fc"), status="in_progress", call_id=call_id, name=name, arguments="")
