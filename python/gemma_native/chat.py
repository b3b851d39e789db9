"""Conversations: turns built from token ids, so that no text can forge a control token; only new tokens are prefilled.

    <bos><start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n{answer}<end_of_turn>\n...

A system text stands, with a blank line after it, before the first user text: as Gemma 3's own template does it, and for
Gemma 1 and 2 too, whose templates would refuse it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from ._native import Cache, CancelFlag, Cancelled
from .gemma import Gemma
from .sampling import SamplingParams, make_params
from .sequence import Completion, Prefix, Running
from .stream import Stream

Message = tuple[str, str] | Mapping[str, str]


class Chat:
    """One conversation. `send` answers whole, `stream` in pieces; `messages` shows the history as (role, text): changing it changes
    nothing, `reset()` begins anew. For one thread at a time. Make one with `Gemma.chat`."""

    def __init__(self, gemma: Gemma, system: str | None = None, messages: Iterable[Message] = ()) -> None:
        tokenizer = gemma.tokenizer
        turn, end = tokenizer.id("<start_of_turn>"), tokenizer.id("<end_of_turn>")
        if turn is None or end is None:
            raise ValueError("this vocabulary has no <start_of_turn> and <end_of_turn>: its model cannot chat")
        if system is not None and not isinstance(system, str):
            raise TypeError(f"system must be text, not {type(system).__name__}")
        history = [_role_and_text(i, m) for i, m in enumerate(messages)]
        if history and history[0][0] == "system":
            if system is not None:
                raise ValueError("messages[0] is a system text, and so is system=: give one of them")
            system = history.pop(0)[1]
        self._gemma = gemma
        self._turn, self._end = turn, end
        self._system = system
        self._prefix: Prefix | None = None  # what was read so far; an open stream has it
        self.reset()
        self._recall(history)

    def reset(self) -> None:
        """Forgets the conversation; the system text stays."""
        self.messages: list[tuple[str, str]] = []
        self._tokens: list[int] = []  # the conversation so far
        self._answering: Running | None = None  # of the open stream, which goes with its last user
        self._open: Callable[[], ChatStream | None] = lambda: None
        self._give_back()

    def __del__(self) -> None:
        if hasattr(self, "_prefix"):
            self._give_back()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a chat can be neither copied nor pickled; gemma.chat(messages=chat.messages) goes on like it")

    def _give_back(self) -> None:
        """The cache, since another conversation may begin like this one."""
        prefix, self._prefix = self._prefix, None
        if prefix is not None:
            self._gemma._keep(prefix)

    def send(self, text: str, params: SamplingParams | None = None, **settings: Any) -> Completion:
        """Says `text` and returns the whole answer. Raises ValueError when the conversation no longer fits the context."""
        stream = self.stream(text, params, **settings)
        for _ in stream:
            pass
        assert stream.result is not None
        return stream.result

    def stream(self, text: str, params: SamplingParams | None = None, **settings: Any) -> ChatStream:
        """Says `text` and gives the answer in pieces. An answer that is left early stays in the history as far as it went, from
        when its stream is closed or gone, or the next turn begins."""
        if not isinstance(text, str):
            raise TypeError(f"a message is text, not {type(text).__name__}")
        chosen = make_params(params, settings)
        if chosen.n != 1:
            raise ValueError(f"a conversation has one answer; n is {chosen.n}")
        open_stream = self._open()
        if open_stream is not None:
            open_stream.close()
        gemma = self._gemma
        prompt = gemma._ids(self._asked(text))
        gemma._check(chosen)
        ends = gemma._ends(chosen) | {self._end}
        flag = gemma._begin()
        try:
            sequence = Running(prompt, chosen, 0, self._take_cache(prompt, flag), gemma.tokenizer, ends)
            stream = ChatStream(self, text, sequence, flag)
            self._answering, self._open = sequence, weakref.ref(stream)
        except BaseException:
            gemma._end(flag)
            raise
        return stream

    def _take_cache(self, prompt: list[int], flag: CancelFlag) -> Cache:
        prefix, self._prefix = self._prefix, None
        try:
            if prefix is not None:
                return prefix.rewind(prompt, flag)
        except Cancelled:  # the first pass will say so, and the next turn reads everything again
            prefix = None
        return self._gemma._cache(prompt, self._gemma._context, flag)

    def _recall(self, messages: list[tuple[str, str]]) -> None:
        for i, (role, text) in enumerate(messages):
            if role != ("user", "model")[i % 2]:
                raise ValueError(
                    f"the message {text!r:.40} is the {role}'s; user and model take turns, the user first, "
                    "and a system text stands before them all"
                )
        if len(messages) % 2:
            raise ValueError("the last of the messages is the user's; give it to send() or stream()")
        for (_, text), (_, answer) in zip(messages[::2], messages[1::2], strict=True):
            self._tokens = self._answered(self._asked(text), self._encode(answer))
        self.messages = messages

    def _encode(self, text: str) -> list[int]:
        return self._gemma.tokenizer.encode(text, bos=False)

    def _asked(self, text: str) -> list[int]:
        """The conversation so far, what the user says, and the beginning of the model's turn."""
        said = text.strip()
        if self._system and not self._tokens:
            said = f"{self._system}\n\n{said}"
        turn = [self._turn, *self._encode(f"user\n{said}"), self._end, *self._encode("\n")]
        return [*(self._tokens or [self._gemma.config.bos_token_id]), *turn, self._turn, *self._encode("model\n")]

    def _answered(self, asked: list[int], answer: list[int]) -> list[int]:
        return [*asked, *answer, self._end, *self._encode("\n")]

    def _close_turn(self, text: str, sequence: Running, failed: bool) -> None:
        """The answer is over: it becomes history, unless it failed or not even its prompt was read."""
        self._answering = None
        self._prefix = sequence.prefix()
        sequence.cache = None  # the prefix has it
        if failed or self._prefix is None or self._prefix.cache.length < len(sequence.prompt):
            return
        answer = sequence.text.text if sequence.text is not None else ""
        said = self._encode(answer) if sequence.cut else sequence.tokens  # without what a stop string took away
        self._tokens = self._answered(sequence.prompt, said)
        self.messages += [("user", text), ("model", answer)]


def _role_and_text(index: int, message: Any) -> tuple[str, str]:
    if isinstance(message, Mapping):
        message = (message.get("role"), message.get("content"))
    if not isinstance(message, (tuple, list)) or len(message) != 2 or not all(isinstance(x, str) for x in message):
        raise TypeError(f"messages[{index}] must be (role, text), or role and content in a dict, not {message!r:.80}")
    role, text = message
    if role not in ("system", "user", "model", "assistant"):
        raise ValueError(f"messages[{index}]: the role is system, user, model or assistant, not {role!r:.40}")
    return "model" if role == "assistant" else role, text


class ChatStream(Stream):
    """The pieces of an answer; see `Stream`."""

    def __init__(self, chat: Chat, text: str, sequence: Running, flag: CancelFlag) -> None:
        self._chat, self._said = chat, text
        gemma = chat._gemma
        super().__init__(sequence, gemma._steps([sequence], flag), flag, gemma._end)

    def _finish(self) -> None:
        super()._finish()
        if self._chat._answering is self._sequence:
            self._chat._close_turn(self._said, self._sequence, self._failed)

    def __del__(self) -> None:
        """A loop that was left: what it took is the answer."""
        if hasattr(self, "_end") and not sys.is_finalizing():
            self.close()
        super().__del__()
