"""Tool calls and reasoning in the text of a completion, for the common families of models."""

from engine.parsers.choose import choose_parsers as choose_parsers
from engine.parsers.events import ContentDelta as ContentDelta
from engine.parsers.events import Event as Event
from engine.parsers.events import ParsedMessage as ParsedMessage
from engine.parsers.events import ReasoningDelta as ReasoningDelta
from engine.parsers.events import ToolCall as ToolCall
from engine.parsers.events import ToolCallArguments as ToolCallArguments
from engine.parsers.events import ToolCallStart as ToolCallStart
from engine.parsers.message_parser import REASONING_PARSERS as REASONING_PARSERS
from engine.parsers.message_parser import TOOL_PARSERS as TOOL_PARSERS
from engine.parsers.message_parser import MessageParser as MessageParser
from engine.parsers.message_parser import check_parser_names as check_parser_names
from engine.parsers.message_parser import ends_inside_reasoning as ends_inside_reasoning
from engine.parsers.message_parser import make_parser as make_parser
from engine.parsers.message_parser import message_of as message_of
from engine.parsers.message_parser import parse_message as parse_message
