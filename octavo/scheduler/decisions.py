"""Why a request waits: what the scheduler decided about it, kept as a short story. Pure Python.

Every request has a story of phases. A phase lasts while the answer stays the same ("waiting, bound
by blocks"), so a step costs nothing for a request about which nothing changes, and a story stays
short however long the request runs. Stories of finished requests are kept in a bounded ring.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from octavo.core import Clock

MAX_PHASES = 64  # of one story; the oldest are folded together
MAX_FINISHED_STORIES = 1000

WAITING_PHASES = ("waiting", "preempted")

QUEUED = "queued"  # nobody asked yet: others are before it


@dataclass(slots=True)
class Phase:
    """A stretch of a request's life in which the scheduler's answer stayed the same."""

    name: str  # "waiting", "running", "preempted" or "finished"
    reason: str  # the constraint that bound it, or a word of the scheduler's own
    detail: str  # numbers behind the reason, as of the phase's begin
    start_s: float
    num_held_back: int = 0  # steps of a running request that gave it less than it asked for


@dataclass(slots=True)
class Story:
    """All phases of one request, oldest first. Sole writer: the decision log."""

    request_id: str
    phases: list[Phase] = field(default_factory=list)

    def sentences(self, now_s: float) -> list[str]:
        """One sentence a phase, with how long it took."""
        ends = [phase.start_s for phase in self.phases[1:]] + [now_s]
        return [_sentence(p, end - p.start_s) for p, end in zip(self.phases, ends, strict=True)]


def _sentence(phase: Phase, seconds: float) -> str:
    because = f"{phase.reason} ({phase.detail})" if phase.detail else phase.reason
    if phase.name == "finished":
        return f"finished: {because}"
    text = f"{phase.name} {seconds * 1e3:.0f} ms: {because}"
    if phase.num_held_back:
        text += f"; {phase.num_held_back} steps gave it fewer tokens than it asked for"
    return text


class DecisionLog:
    """The stories of live and recently finished requests. Sole writer: the scheduler."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._live: dict[str, Story] = {}
        self._finished: OrderedDict[str, Story] = OrderedDict()
        self._num_waiting: Counter[str] = Counter()  # by reason, kept up to date phase by phase

    def arrives(self, request_id: str) -> None:
        """A request joins the queue."""
        story = self._live[request_id] = Story(request_id)
        self._begin(story, "waiting", QUEUED, "")

    def waits(self, request_id: str, reason: str, explain: Callable[[], str]) -> None:
        """The request was considered and got nothing; `explain` is called when that is news."""
        story = self._live[request_id]
        last = story.phases[-1]
        if last.reason != reason:
            self._begin(story, last.name, reason, explain())

    def runs(self, request_id: str, num_computed_tokens: int, num_tokens: int) -> None:
        """The request is admitted, with KV of so many of its tokens."""
        detail = f"{num_computed_tokens} of {num_tokens} tokens had their KV"
        self._begin(self._live[request_id], "running", "admitted", detail)

    def held_back(self, request_id: str) -> None:
        """A running request got fewer tokens than it asked for, perhaps none."""
        self._live[request_id].phases[-1].num_held_back += 1

    def preempted(self, request_id: str, reason: str, outcome: str) -> None:
        """A running request lost its place; `outcome` says what became of its KV."""
        self._begin(self._live[request_id], "preempted", reason, outcome)

    def ends(self, request_id: str, reason: str) -> None:
        """The request is over; its story stays for a while."""
        story = self._live.pop(request_id)
        self._begin(story, "finished", reason, "")
        self._finished[request_id] = story
        if len(self._finished) > MAX_FINISHED_STORIES:
            self._finished.popitem(last=False)

    def why(self, request_id: str) -> dict[str, list[str]]:
        """The stories of all requests whose id begins with this, a sentence for each phase.

        By the beginning, because the answers to one user's request are requests of their own here.
        """
        now_s = self._clock.now()
        return {
            story.request_id: story.sentences(now_s)
            for story in (*self._live.values(), *self._finished.values())
            if story.request_id.startswith(request_id)
        }

    def reason_of(self, request_id: str) -> str:
        """What binds a live request now, in a word."""
        return self._live[request_id].phases[-1].reason

    def waiting_by_reason(self) -> dict[str, int]:
        """How many requests wait, by what binds them."""
        return {reason: count for reason, count in self._num_waiting.items() if count}

    def _begin(self, story: Story, name: str, reason: str, detail: str) -> None:
        if story.phases and story.phases[-1].name in WAITING_PHASES:
            self._num_waiting[story.phases[-1].reason] -= 1
        if name in WAITING_PHASES:
            self._num_waiting[reason] += 1
        story.phases.append(Phase(name, reason, detail, self._clock.now()))
        if len(story.phases) > MAX_PHASES:
            # The first phase keeps the arrival; what follows it is the least interesting.
            del story.phases[1]
