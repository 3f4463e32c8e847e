"""Several forwards of opened models in step, so that each layer is read once for all of them.

Each forward runs in a thread of its own, of which one goes at a time. Where its model is about to read the
weights of a decoder layer, or of a module beside the layers, it waits; when all wait, that part is read, each
goes on through it to the next, and the part is forgotten. What a forward computes is what it computes on its
own, in whatever way its architecture hands things from layer to layer. The hidden states of all forwards are
in memory meanwhile.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from bitassay.models.opened import weights_of
from bitassay.models.opened_weights import Weights
from bitassay.record.memory import release_freed_memory
from bitassay.record.progress import Progress, silent


class Forward(NamedTuple):
    """A function that runs `model`, loaded or opened, and returns something."""

    model: PreTrainedModel
    run: Callable[[], Any]


def in_step(forwards: Sequence[Forward], progress: Progress = silent) -> Iterator[Any]:
    """Yield what the functions return, in their order. Loaded models run when it is their turn. Raises what
    they raise."""
    turns = [_Turn(forward) if weights_of(forward.model) is not None else None for forward in forwards]
    started = [turn for turn in turns if turn is not None]
    given = 0
    try:
        for turn in started:
            turn.go_on()
        while waiting := [turn for turn in started if turn.unit is not None]:
            unit, first = waiting[0].unit, waiting[0].weights
            assert unit is not None
            group = [turn for turn in waiting if turn.unit == unit]
            if unit in first.layers:
                progress("reading layers", first.layers.index(unit), len(first.layers))
            models = list({id(turn.weights): turn.weights for turn in group}.values())
            # A layer is there for one model at a time; the head for all, so that nobody's output has to wait.
            for together in [[model] for model in models] if unit in first.layers else [models]:
                with ExitStack() as stack:
                    for weights in together:
                        stack.enter_context(weights.holding(weights.units[unit]))
                    for turn in group:
                        if turn.weights in together:
                            turn.go_on()
                            release_freed_memory()
                        while given < len(turns) and _is_over(turns[given], unit in first.layers):
                            yield _result(turns[given], forwards[given])
                            turns[given] = None
                            given += 1
        for place in range(given, len(turns)):
            yield _result(turns[place], forwards[place])
    finally:
        for turn in started:
            turn.give_up()


def _is_over(turn: "_Turn | None", on_the_way: bool) -> bool:
    return turn.over if turn is not None else not on_the_way


def _result(turn: "_Turn | None", forward: Forward) -> Any:
    if turn is None:
        return forward.run()
    if turn.error is not None:
        raise turn.error
    result, turn.result = turn.result, None  # the turns stay until the last one's end
    return result


class _Turn:
    """A forward in a thread. unit: the module in front of which it waits; None before and after."""

    def __init__(self, forward: Forward):
        weights = weights_of(forward.model)
        assert weights is not None
        self.weights: Weights = weights
        self.unit: str | None = None
        self.over, self.given_up = False, False
        self.result: Any = None
        self.error: BaseException | None = None
        self._going, self._waiting = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=[forward.run], daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Let the forward go to where it waits next, or to its end."""
        self._going.release()
        self._waiting.acquire()
        if self.error is not None:
            raise self.error

    def give_up(self) -> None:
        """End the thread wherever it is."""
        if not self.over:
            self.given_up = True
            self._going.release()
            self._thread.join()

    def _run(self, run: Callable[[], Any]) -> None:
        self._going.acquire()
        try:
            if not self.given_up:
                with self.weights.waiting(self._wait):
                    self.result = run()
        except BaseException as error:
            self.error = error
        self.over, self.unit = True, None
        self._waiting.release()

    def _wait(self, unit: str) -> None:
        self.unit = unit
        self._waiting.release()
        self._going.acquire()
        if self.given_up:
            raise _GivenUp


class _GivenUp(BaseException):
    """Ends a forward that nobody waits for."""
